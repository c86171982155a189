import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_routed as ref
import routed_model as net
from expert_sets import host_peak

from retex_jax.personalized import magnitude, router, twin

FAST = {"epochs": 5, "batch_size": 16}


def _fit(case, names=None, **options):
    pretrained, models, _, _, calibration = case
    options = {"router_options": FAST, "calibration": calibration, **options}
    return twin.fit(net.experts(pretrained, models, names), **options)


def _vectors(case, density, trim, scaling=0.3):
    shared = ref.task_arithmetic(case[0], case[1], scaling)
    return shared, [trim(d, density) for d in ref.differences(shared, case[1])]


STRATEGIES = {"svd": ref.trimmed_svd, "magnitude": ref.trimmed_magnitude}


@pytest.mark.parametrize(
    ("strategy", "num_tasks", "mask_rate"),
    [("svd", 1, 0.9), ("svd", 2, 0.4), ("magnitude", 2, 0.4), ("magnitude", 8, 0.7)],
)
def test_against_the_reference(strategy, num_tasks, mask_rate):
    case = net.case(num_tasks)
    state = _fit(
        case,
        mask_rate=mask_rate,
        mask_strategy=strategy,
        scaling=0.2,
        router_options={"epochs": 1},
    )
    shared, vectors = _vectors(case, 1 - mask_rate, STRATEGIES[strategy], 0.2)
    for task in (0, num_tasks - 1):
        net.assert_model(
            twin.recover(state, task), ref.mixture(shared, vectors, np.eye(num_tasks)[task])
        )
    weights = np.linspace(-0.5, 1, num_tasks)
    net.assert_model(twin.mix(state, weights), ref.mixture(shared, vectors, weights))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_trimmed_gives_the_experts(strategy):
    case = net.case(2)
    state = _fit(case, mask_rate=0, mask_strategy=strategy)
    for task, expert in enumerate(case[1]):
        want = {name: leaf for name, leaf in expert.items() if name != "steps"}
        net.assert_model(twin.recover(state, task), want, 1e-6, 1e-6)
        net.assert_model(twin.mix(state, np.eye(2)[task]), want, 1e-6, 1e-6)


def test_trimming_by_hand():
    # theta* = 0 + 0.5 * (4, 0; -2, 1) for one task, so v is (2, 0; -1, 0.5): half of it is kept.
    pretrained = {"w": {"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    expert = {"w": {"kernel": np.float32([[4, 0], [-2, 1]]), "bias": np.float32([3, 1])}}
    calibration = net.Calibration(
        [[{"x": np.ones((4, 3), np.float32)}]],
        lambda params, batch: batch["x"],
        lambda *_: None,
        [None],
    )
    state = twin.fit(
        net.rtx.ExpertSet.from_trees(pretrained, [expert]),
        calibration=calibration,
        scaling=0.5,
        mask_rate=0.5,
        mask_strategy="magnitude",
        router_options={"epochs": 1},
    )
    found = twin.recover(state, 0)["w"]
    np.testing.assert_array_equal(found["kernel"], [[4, 0], [-2, 0.5]])
    np.testing.assert_array_equal(found["bias"], [3, 1])
    # Two values and one byte of bits, two values whole; a router 3 -> 6 -> 6 -> 1 with two batch norms.
    layers = 3 * 6 + 6 + 6 * 6 + 6 + 6 + 1 + 2 * 4 * 6
    assert twin.extra_bytes(state) == 2 * 4 + 1 + 2 * 4 + 4 * layers


def test_of_equal_magnitudes_the_first_are_kept():
    pretrained = {"a": np.zeros((2, 4), np.float32), "b": np.zeros((2, 2, 2), np.float32)}
    expert = {
        "a": np.float32([[1, -2, 2, 0], [2, 1, -2, 0]]),
        "b": np.zeros((2, 2, 2), np.float32),
    }
    state = magnitude.fit(net.rtx.ExpertSet.from_trees(pretrained, [expert]), density=0.375)
    found = magnitude.recover(state, 0)
    np.testing.assert_array_equal(found["a"], [[0, -2, 2, 0], [2, 0, 0, 0]])
    np.testing.assert_array_equal(found["b"], 0)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_magnitude_of_all_ranks(num_tasks):
    pretrained, experts = references.flax_model(num_tasks)
    state = magnitude.fit(
        net.rtx.ExpertSet.from_trees(
            references.nested(pretrained), [references.nested(expert) for expert in experts]
        ),
        density=0.21,
    )
    for task, expert in enumerate(experts):
        found = references.flat(magnitude.recover(state, task))
        for name, leaf in pretrained.items():
            if not references.is_float(leaf):
                np.testing.assert_array_equal(found[name], leaf)
                continue
            difference = {name: expert[name].astype(np.float64) - leaf.astype(np.float64)}
            want = leaf + ref.trimmed_magnitude(difference, 0.21)[name]
            np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype):
    pretrained, models, *_, calibration = net.case(2)

    def cast(model):
        return {n: x if n == "steps" else x.astype(dtype) for n, x in model.items()}

    state = twin.fit(
        net.experts(cast(pretrained), [cast(model) for model in models]),
        calibration=calibration,
        mask_rate=0,
        router_options={"epochs": 1},
    )
    for name, leaf in references.flat(twin.recover(state, 1)).items():
        want = cast(models[1])[name]
        assert leaf.dtype == want.dtype
        np.testing.assert_allclose(
            leaf.astype(np.float64), want.astype(np.float64), rtol=2**-7, atol=1e-6
        )


@pytest.mark.parametrize("batch_norm", [True, False])
def test_router_and_prediction(batch_norm):
    case = net.case(3)
    state = _fit(case, mask_rate=0.5, router_options={**FAST, "batch_norm": batch_norm})
    shared, vectors = _vectors(case, 0.5, ref.trimmed_svd)
    batch, _ = net.mixed_batch(case[2])
    start = ref.features(shared, batch["x"])
    variables = jax.device_get(state.router.variables)
    weights = ref.softmax(ref.mlp_router(variables, start, batch_norm))
    np.testing.assert_allclose(twin.weights(state, start), weights, rtol=1e-4, atol=1e-5)
    want = [
        ref.features(ref.mixture(shared, vectors, w), x[None])[0]
        for w, x in zip(weights, batch["x"], strict=True)
    ]
    for chunk in (1, 5, 100):  # 36 inputs: whole chunks, a remainder, fewer than a chunk
        found = twin.predict(state, case[4], batch, chunk=chunk)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_router_tells_tasks_apart_and_expertise_follows():
    case = net.case(3)
    # With eight hidden units, half of them dropped is too few.
    options = {"epochs": 60, "batch_size": 15, "learning_rate": 1e-2, "dropout": 0.0}
    state = _fit(case, mask_rate=0, router_options=options)
    batch, tasks = net.mixed_batch(case[2], seed=3)
    start = net.features(state.vectors.base, batch)
    weights = np.asarray(twin.weights(state, start))
    np.testing.assert_array_equal(weights.argmax(axis=1), tasks)
    assert weights[np.arange(len(tasks)), tasks].mean() > 0.9


def test_no_true_task_or_label_decides():
    case = net.case(3)
    state = _fit(case)
    batch, tasks = net.mixed_batch(case[2])
    labelled = batch | {"label": tasks.astype(np.int32), "task": tasks.astype(np.int32)}
    wrong = labelled | {"label": labelled["label"][::-1], "task": (labelled["task"] + 1) % 3}
    want = np.asarray(twin.predict(state, case[4], batch))
    for other in (labelled, wrong):
        np.testing.assert_array_equal(twin.predict(state, case[4], other), want)
    order = np.random.default_rng(1).permutation(len(tasks))
    shuffled = twin.predict(state, case[4], {"x": batch["x"][order]})
    np.testing.assert_allclose(shuffled, want[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_order_of_tasks_does_not_matter_to_a_router(kind):
    features = [x.mean(axis=1) for x in ref.inputs(3)]
    order = [2, 0, 1]
    first = router.fit(features, "abc", jax.random.key(0), kind=kind, **FAST)
    second = router.fit([features[t] for t in order], "cab", jax.random.key(0), kind=kind, **FAST)
    x = np.concatenate(features)
    np.testing.assert_array_equal(
        router.logits(second, x), np.asarray(router.logits(first, x))[:, order]
    )


def test_order_of_tasks_does_not_matter():
    pretrained, models, xs, heads, calibration = net.case(3)
    # Adam amplifies the rounding of theta*, whose sum has an order; less so in a linear router.
    options = {"mask_rate": 0.5, "router_options": {**FAST, "kind": "linear"}}
    order = [2, 0, 1]
    other = net.calibration([xs[t] for t in order], heads)
    first = _fit((pretrained, models, xs, heads, calibration), "abc", **options)
    second = _fit((pretrained, [models[t] for t in order], None, None, other), "cab", **options)
    batch, _ = net.mixed_batch(xs)
    np.testing.assert_allclose(
        twin.predict(second, calibration, batch),
        twin.predict(first, calibration, batch),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_key_decides_the_router():
    case = net.case(2)
    first, again, other = (
        jax.device_get(_fit(case, key=jax.random.key(seed)).router) for seed in (3, 3, 4)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [r.variables["params"]["out"]["kernel"] for r in (first, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_one_task_needs_no_router():
    case = net.case(1)
    state = _fit(case, scaling=0, mask_rate=0)
    features = np.ones((2, ref.WIDTH), np.float32)
    np.testing.assert_array_equal(twin.weights(state, features), 1)


def test_the_best_epoch_on_held_out_inputs_is_kept(monkeypatch):
    # The best accuracy wins, of equal ones the lowest loss, whatever the last epoch is.
    scores = [(0.5, 0.1), (0.9, 0.5), (0.9, 0.4), (0.9, 0.4), (0.8, 0.1)]
    seen = []
    programs = router._programs

    def scripted(*args):
        init, train_epoch, _ = programs(*args)

        def measure(variables, x, y):
            assert x.shape == (2 * 3, 3)  # 0.25 of 12 inputs a task
            assert list(y) == [0] * 3 + [1] * 3
            seen.append(variables)
            return scores[len(seen) - 1]

        return init, train_epoch, measure

    monkeypatch.setattr(router, "_programs", scripted)
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(12, 3)).astype(np.float32) for _ in range(2)]
    found = router.fit(features, "ab", jax.random.key(0), epochs=5, batch_size=6, held_out=0.25)
    jax.tree.map(np.testing.assert_array_equal, found.variables, seen[2])
    assert np.any(found.variables["params"]["out"]["bias"] != seen[1]["params"]["out"]["bias"])


def test_jit_traced_task_and_eager_are_equal():
    state = _fit(net.case(2), mask_rate=0.5, mask_strategy="magnitude")
    want = references.flat(twin.recover(state, 1))
    want.pop("steps")
    net.assert_model(jax.jit(twin.recover)(state, 1), want, 1e-6, 1e-6)
    with jax.disable_jit():
        net.assert_model(twin.recover(state, 1), want, 1e-6, 1e-6)
    weights = jnp.array([0.3, 0.6])
    mixed = references.flat(twin.mix(state, weights))
    mixed.pop("steps")
    net.assert_model(jax.jit(twin.mix)(state, weights), mixed, 1e-6, 1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    pretrained = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"a": (8, 6), "b": (8,)}.items()
    }
    experts = [
        {n: np.float32(x + rng.normal(size=x.shape)) for n, x in pretrained.items()}
        for _ in range(2)
    ]
    plain = magnitude.fit(net.rtx.ExpertSet.from_trees(pretrained, experts), density=0.3)
    sharded = magnitude.fit(
        net.rtx.ExpertSet.from_trees(
            place_on_8_devices(pretrained), [place_on_8_devices(expert) for expert in experts]
        ),
        density=0.3,
    )
    want, found = magnitude.recover(plain, 1), magnitude.recover(sharded, 1)
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_rate": 1.0, "mask_strategy": "svb"}, r"(?s)mask_rate: got 1.0.*mask_strategy: got"),
        ({"mask_rate": -0.1}, "mask_rate: got -0.1"),
        ({"calibration": None}, "Twin-Merging needs inputs of every task"),
        ({"router_options": {"dropout": 1, "epochs": 0}}, r"(?s)dropout: got 1.*epochs: got 0"),
        ({"router_options": {"kind": "mpl"}}, "kind: got 'mpl'"),
        (
            {"router_options": {"learning_rate": 0, "batch_size": 0, "held_out": 1}},
            r"(?s)learning_rate: got 0.*batch_size: got 0.*held_out: got 1",
        ),
        ({"scaling": np.nan}, "scaling: got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(net.case(2), **options)


def test_magnitude_holds_the_experts_differences_once():
    model = {"a": np.random.default_rng(3).normal(size=(256, 256)).astype(np.float32)}
    experts = net.rtx.ExpertSet.from_trees(model, [model] * 32)
    _, peak = host_peak(lambda: magnitude.fit(experts, density=0.1))
    assert peak < 2 * 32 * model["a"].nbytes


def test_bad_task_weights_chunk_density_and_inputs():
    case = net.case(2)
    for strategy in STRATEGIES:
        state = _fit(case, mask_strategy=strategy)
        with pytest.raises(ValueError, match="task: got 2"):
            twin.recover(state, 2)
        with pytest.raises(ValueError, match=r"weights: got shape \(3,\)"):
            twin.mix(state, np.ones(3))
    with pytest.raises(ValueError, match="chunk: got 0"):
        twin.predict(state, case[4], {"x": case[2][0]}, chunk=0)
    with pytest.raises(ValueError, match="density: got 0"):
        magnitude.fit(net.experts(case[0], case[1]), density=0)
    few = net.calibration([case[2][0], case[2][1][:1]], case[3])
    with pytest.raises(ValueError, match=r"tasks \['task_1'\] have 1 input"):
        _fit(case, calibration=few)
    with pytest.raises(FloatingPointError, match="loss of epoch 1"):
        router.fit([np.full((4, 2), np.inf, np.float32)] * 2, "ab", jax.random.key(0))
