import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_adamerging as reference
from expert_sets import expert_set
from references_masks import assert_close, assert_like, other_buffers

import retex_jax as rtx
from retex_jax.calibration import Calibration
from retex_jax.mergers import adamerging, task_arithmetic

FAST = {"steps": 12, "learning_rate": 0.05}


def _calibration(num_tasks, count=3, batches=None, heads=None):
    heads = reference.heads(num_tasks) if heads is None else heads

    def logits(params, head, batch):
        return reference.logits(rtx.tree.flatten(params), head, batch)

    batches = reference.batches(num_tasks, count) if batches is None else batches
    return Calibration(batches, features=None, logits=logits, heads=heads)


def _both(model, **options):
    """Coefficients, entropies and the merged model."""
    pretrained, experts = model
    given = {"calibration": _calibration(len(experts)), **FAST, **options}
    experts = expert_set(pretrained, experts)
    coefficients, entropies = adamerging.fit_coefficients(experts, **given)
    vectors = {name: given[name] for name in ("plus_plus", "density") if name in given}
    merged = adamerging.merge(experts, coefficients, **vectors)
    return coefficients, entropies, references.flat(merged)


def _reference(model, count=3, **options):
    pretrained, experts = model
    given = {"granularity": "layer", "batches_per_step": 2, "clamp": True, **FAST, **options}
    tasks = len(experts)
    return reference.adamerging(
        pretrained, experts, reference.heads(tasks), reference.batches(tasks, count), **given
    )


@pytest.mark.parametrize(
    ("num_tasks", "granularity", "variant"),
    [
        (1, "layer", "official"),
        (1, "task", "fusion_bench"),
        (2, "layer", "official"),
        (2, "layer", "fusion_bench"),
        (2, "task", "official"),
        (2, "task", "fusion_bench"),
        (8, "layer", "official"),
    ],
)
def test_it_is_the_definition(num_tasks, granularity, variant):
    model = reference.model(num_tasks)
    protocol = {"official": (2, True), "fusion_bench": (1, False)}[variant]
    want, merged, values = _reference(
        model, granularity=granularity, batches_per_step=protocol[0], clamp=protocol[1]
    )
    coefficients, entropies, found = _both(model, granularity=granularity, variant=variant)
    assert_close(coefficients, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropies, values, rtol=1e-4, atol=1e-5)
    assert_close(found, merged, rtol=1e-4, atol=1e-5)
    assert_like(found, model[0])
    assert entropies.shape == (12, num_tasks)
    assert all(row.shape == (num_tasks,) for row in coefficients.values())
    spread = max(np.abs(row - 0.3).max() for row in coefficients.values())
    assert spread > 0.1  # far from where it started


@pytest.mark.parametrize(
    ("num_tasks", "grid", "density"),
    [
        (1, False, 0.2),
        (1, True, 0.7),
        (2, False, 0.7),
        (2, True, 0.2),
        (2, True, 1.0),
        (8, True, 0.2),
    ],
)
def test_plus_plus_is_the_definition(num_tasks, grid, density):
    # The grid has many entries that tie in magnitude, that are 0 and that cancel.
    model = reference.model(num_tasks, grid=grid)
    want, merged, values = _reference(model, density=density)
    coefficients, entropies, found = _both(model, plus_plus=True, density=density)
    assert_close(coefficients, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropies, values, rtol=1e-4, atol=1e-5)
    assert_close(found, merged, rtol=1e-4, atol=1e-5)


def test_agreeing_by_hand():
    vectors = jnp.array([[4.0, 2.0, -2.0, 1.0, 3.0], [5.0, -3.0, 0.5, -1.0, -3.0]])
    for majority, last in ((1.0, [3.0, 0.0]), (-1.0, [0.0, -3.0])):
        found = adamerging.agreeing(vectors, jnp.array([2.0, 1.0]), majority)
        want = np.array([[4, 0, -2, 0, last[0]], [5, -3, 0, -1, last[1]]])
        np.testing.assert_array_equal(found, want)


def test_one_step_by_hand():
    # theta = (0, a + 0.3 * 2) and logits theta * x, x = 1: two classes at z = (0, 0.8).
    pretrained = {"w": np.float32([0, 0.2])}
    experts = [{"w": np.float32([0, 2.2])}]
    calibration = Calibration(
        [[{"x": np.ones((1, 1), np.float32)}]],
        features=None,
        logits=lambda params, head, batch: batch["x"] * params["w"],
        heads=[None],
    )
    options = {"calibration": calibration, "variant": "fusion_bench", "steps": 1}
    p = 1 / (1 + np.exp(-0.8))
    coefficients, entropies = adamerging.fit_coefficients(
        expert_set(pretrained, experts), learning_rate=0.1, **options
    )
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(entropies, [[entropy]], rtol=1e-6)
    # Adam's first step is the learning rate, towards the more certain class.
    np.testing.assert_allclose(coefficients["w"], [0.4], rtol=1e-5)


def test_the_published_numbers_are_the_defaults():
    assert adamerging.PROTOCOLS == {
        "official": (500, 2, True),
        "fusion_bench": (1000, 1, False),
    }
    assert adamerging.NEEDS == "unlabelled test inputs"
    model = reference.model(1)
    for variant, (steps, batches, clamp) in adamerging.PROTOCOLS.items():
        want, _, _ = _reference(
            model, steps=steps, batches_per_step=batches, clamp=clamp, learning_rate=1e-3
        )
        coefficients, entropies = adamerging.fit_coefficients(
            expert_set(*model), calibration=_calibration(1), variant=variant
        )
        assert len(entropies) == steps
        assert_close(coefficients, want, rtol=1e-3, atol=1e-3)


def test_entropy_falls():
    model = reference.model(2)
    for granularity in ("task", "layer"):
        _, entropies, _ = _both(
            model, granularity=granularity, batches_per_step=3, steps=40, learning_rate=0.02
        )
        totals = entropies.sum(axis=1)
        assert totals[-1] < 0.9 * totals[0]
        assert np.all(np.diff(totals) < 1e-3)


@pytest.mark.parametrize("plus_plus", [False, True])
def test_without_steps_it_is_task_arithmetic_with_the_initial_coefficient(plus_plus):
    model = reference.model(8)
    coefficients, entropies, found = _both(model, steps=0, init=0.4, plus_plus=plus_plus)
    assert entropies.shape == (0, 8)
    for row in coefficients.values():
        np.testing.assert_array_equal(row, np.float32(0.4))
    if plus_plus:
        want = references.ties(*model, keep=int(0.2 * _size(model[0])), merge="sum", scaling=0.4)
    else:
        want = references.flat(task_arithmetic.fit(expert_set(*model), scaling=0.4))
    assert_close(found, want, 1e-6, 1e-6)


def _size(pretrained):
    return sum(leaf.size for leaf in pretrained.values() if references.is_float(leaf))


def test_one_leaf_has_the_same_coefficients_task_wise_and_layer_wise():
    pretrained, experts = reference.model(2)
    rest = {name: leaf for name, leaf in pretrained.items() if name != "dense/kernel"}
    names = ["dense/kernel"]
    model = [{name: tree[name] for name in names} for tree in (pretrained, *experts)]

    def logits(params, head, batch):
        return reference.logits({**rest, **rtx.tree.flatten(params)}, head, batch)

    calibration = Calibration(
        reference.batches(2, 3), features=None, logits=logits, heads=reference.heads(2)
    )
    found = [
        adamerging.fit_coefficients(
            expert_set(model[0], model[1:]), calibration=calibration, granularity=kind, **FAST
        )
        for kind in ("task", "layer")
    ]
    np.testing.assert_allclose(found[0][0]["dense/kernel"], found[1][0]["dense/kernel"], rtol=1e-6)
    assert np.abs(found[0][0]["dense/kernel"] - 0.3).max() > 0.1


def test_order_of_tasks_does_not_matter():
    order = [2, 0, 1]
    pretrained, experts = reference.model(3)
    heads, batches = reference.heads(3), reference.batches(3, 3)
    found = []
    for tasks in (range(3), order):
        calibration = _calibration(
            3, batches=[batches[t] for t in tasks], heads=[heads[t] for t in tasks]
        )
        made = expert_set(pretrained, [experts[t] for t in tasks])
        coefficients, entropies = adamerging.fit_coefficients(made, calibration=calibration, **FAST)
        merged = references.flat(adamerging.merge(made, coefficients))
        found.append((coefficients, entropies, merged))
    assert_close(found[1][0], {name: row[order] for name, row in found[0][0].items()}, 1e-4, 1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1][:, order], rtol=1e-4, atol=1e-5)
    assert_close(found[1][2], found[0][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plus_plus", [False, True])
def test_task_vectors_may_be_read_again_each_step(plus_plus):
    model = reference.model(2)
    held, read = (
        _both(model, plus_plus=plus_plus, resident=resident) for resident in (True, False)
    )
    for name in held[0]:
        np.testing.assert_array_equal(held[0][name], read[0][name])
    np.testing.assert_array_equal(held[1], read[1])


def _live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("resident", [False, True])
def test_memory_does_not_grow_with_the_tasks_but_by_their_vectors(resident):
    held = {}
    for num_tasks in (2, 8):
        model = reference.model(num_tasks)
        experts = expert_set(*model)
        calibration = _calibration(num_tasks)
        gc.collect()
        before, after_steps = _live_bytes(), []

        def measure(done, steps, after_steps=after_steps):
            after_steps.append(_live_bytes())

        adamerging.fit_coefficients(
            experts, calibration=calibration, resident=resident, steps=4, progress=measure
        )
        assert len(set(after_steps[1:])) == 1  # nothing piles up
        held[num_tasks] = after_steps[-1] - before
    vectors = 4 * _size(reference.model(1)[0])
    growth = held[8] - held[2]
    # The coefficients, their derivative, Adam's two means and its update: 6 leaves, 6 more tasks.
    small = 5 * 6 * 6 * 4
    assert growth <= (6 * vectors if resident else 0) + small


def test_clamped_coefficients_stay_in_the_interval_and_others_leave_it():
    model = reference.model(2)
    options = {"steps": 30, "learning_rate": 0.2}
    for clamp in (True, False):
        want, merged, _ = _reference(model, clamp=clamp, **options)
        coefficients, _, found = _both(model, clamp=clamp, **options)
        values = np.concatenate(list(coefficients.values()))
        assert (values.min() >= 0 and values.max() <= 1) == clamp
        assert_close(coefficients, want, rtol=1e-4, atol=1e-4)
        assert_close(found, merged, rtol=1e-4, atol=1e-4)


def test_batches_are_taken_in_order_again_and_again():
    pretrained, experts = reference.model(1)
    seen = []

    class Counting(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                seen.append(number)
                yield batch

    calibration = _calibration(1, batches=[Counting(reference.batches(1, 3)[0])])
    adamerging.fit_coefficients(
        expert_set(pretrained, experts), calibration=calibration, steps=4, batches_per_step=2
    )
    assert seen[1:] == [0, 1, 2, 0, 1, 2, 0, 1]  # after the look whether there is one


@pytest.mark.parametrize("plus_plus", [False, True])
def test_fit_merges_with_the_coefficients(plus_plus):
    model = reference.model(2)
    options = {"plus_plus": plus_plus, "density": 0.4, "granularity": "task"}
    _, _, want = _both(model, **options)
    found = adamerging.fit(
        expert_set(*model), key=jax.random.key(0), calibration=_calibration(2), **FAST, **options
    )
    assert_close(references.flat(found), want, 0, 0)


def test_merge_takes_given_coefficients():
    pretrained, experts = reference.model(2)
    names = [name for name, leaf in pretrained.items() if references.is_float(leaf)]
    rows = {name: np.float32([0.1 * index, -0.2]) for index, name in enumerate(names)}
    found = references.flat(adamerging.merge(expert_set(pretrained, experts), rows))
    for name in names:
        start = pretrained[name].astype(np.float64)
        want = start + sum(rows[name][t] * (experts[t][name] - start) for t in range(2))
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"coefficients: those of \['other', 'scale'\]"):
        adamerging.merge(
            expert_set(pretrained, experts), {**rows, "scale": np.zeros(3), "other": np.zeros(2)}
        )


def test_compiled_equals_eager():
    model = reference.model(2)
    compiled = _both(model, steps=2)
    with jax.disable_jit():
        eager = _both(model, steps=2)
    for name in compiled[0]:
        np.testing.assert_allclose(compiled[0][name], eager[0][name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(compiled[1], eager[1], rtol=1e-5, atol=1e-5)
    assert_close(compiled[2], eager[2])


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision_experts(dtype, step):
    model = reference.model(2, dtype=dtype)
    want, merged, _ = _reference(model)
    coefficients, _, found = _both(model)
    assert_close(coefficients, want, rtol=1e-4, atol=1e-5)
    assert_like(found, model[0])
    assert_close(found, merged, rtol=step, atol=1e-5)  # rounded once, at the end


def test_buffers_are_the_pretrained_models():
    pretrained, experts = reference.model(2)
    _, _, found = _both((pretrained, other_buffers(experts)))
    assert_like(found, pretrained)
    assert found["buffers/big"] == 2**40


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b": (24,), "c": ()}
    trees = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    batches = [[{"x": rng.normal(size=(4, 16)).astype(np.float32)}] for _ in range(2)]

    def logits(params, head, batch):
        return (batch["x"] @ params["a"]["kernel"] + params["b"]) * params["c"] / head

    calibration = Calibration(batches, features=None, logits=logits, heads=[5.0, 6.0])
    sharded = [place_on_8_devices(tree) for tree in trees]
    assert not sharded[0]["a/kernel"].sharding.is_fully_replicated
    for options in ({"plus_plus": True}, {"resident": False}):
        found = [
            adamerging.fit_coefficients(
                expert_set(start, experts), calibration=calibration, **FAST, **options
            )
            for start, *experts in (trees, sharded)
        ]
        assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)
    merged = adamerging.fit(expert_set(sharded[0], sharded[1:]), calibration=calibration, **FAST)
    kernel = merged["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(sharded[0]["a/kernel"].sharding, kernel.ndim)


@pytest.mark.parametrize("where", ["batch", "gradient"])
def test_what_is_not_finite_stops_it_with_the_step(where):
    batches = reference.batches(2, 3)
    calibration = _calibration(2, batches=batches)
    if where == "batch":
        batches[1][2]["x"][0, 0] = np.nan
        match = r"the entropy of \['task_1'\] is not finite at step 3"
    else:

        def logits(params, head, batch):  # the square root of 0 has no derivative
            return jnp.sqrt(0.0 * params["scale"]) + batch["x"]

        calibration = Calibration(batches, features=None, logits=logits, heads=[None] * 2)
        match = "the gradient is not finite at step 1"
    with pytest.raises(FloatingPointError, match=match):
        adamerging.fit_coefficients(
            expert_set(*reference.model(2)),
            calibration=calibration,
            steps=5,
            batches_per_step=1,
        )


def test_progress():
    calls = []
    _both(reference.model(1), steps=3, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_all_wrong_settings_are_listed():
    wrong = {
        "granularity": "block",
        "variant": "code",
        "steps": -1,
        "batches_per_step": 0,
        "init": np.nan,
        "learning_rate": 0.0,
        "b1": 1.0,
        "b2": -0.1,
        "density": 20,
    }
    with pytest.raises(ValueError) as error:
        adamerging.fit(expert_set(*reference.model(1)), calibration=_calibration(1), **wrong)
    assert [line.split(":")[0] for line in str(error.value).split("; ")] == list(wrong)
    with pytest.raises(ValueError, match=r"steps: got 2\.5"):
        adamerging.fit(expert_set(*reference.model(1)), calibration=_calibration(1), steps=2.5)


def test_the_calibration_is_checked():
    experts = expert_set(*reference.model(2))
    with pytest.raises(ValueError, match="calibration: got None, but AdaMerging"):
        adamerging.fit(experts)
    with pytest.raises(ValueError, match="got 1, expected one for each of the 2 tasks"):
        adamerging.fit(experts, calibration=_calibration(1))

    class Once:
        def __init__(self, batches):
            self.rest = iter(batches)

        def __iter__(self):
            return self.rest

    once = [Once(batches) for batches in reference.batches(2, 3)]
    with pytest.raises(ValueError, match="those of task_0 ran out"):
        adamerging.fit(experts, calibration=_calibration(2, batches=once))
