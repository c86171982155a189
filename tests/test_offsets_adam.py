import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from expert_sets import expert_set

import retex_jax as rtx
from retex_jax.offsets import adam, generator
from retex_jax.preemption import Preempted

RETEX = rtx.METHODS["retex"]
FAST = {
    "solver": "adam",
    "rank": 2,
    "learning_rate": 1e-2,
    "steps": 40,
    "warmup_steps": 10,
    "chunk_steps": 10,
    "checkpoint_every": 10,
}
ONE_STEP = {"steps": 2, "warmup_steps": 1, "chunk_steps": 1, "checkpoint_every": 1}
MATRIX = {"dense/kernel": ((1, 0), 1)}


class DictCheckpoints:
    """Keeps steps in a dict, as NumPy, so that no buffer is shared with the fit."""

    def __init__(self):
        self.steps = {}
        self.facts = {}
        self.restored = []

    def latest(self):
        return max(self.steps, default=None)

    def metadata(self, step):
        return self.facts[step]

    def save(self, step, tree, metadata):
        self.steps[step] = jax.tree.map(np.array, tree)
        self.facts[step] = json.loads(json.dumps(metadata))

    def restore(self, step, like):
        self.restored.append(step)
        saved = jax.tree.map(jnp.asarray, self.steps[step])
        assert jax.tree.structure(saved) == jax.tree.structure(like)
        return saved


def _model(num_tasks=3, *, whole=False):
    """One kernel, or with leaves of 0 and 1 axes as well: each group of leaves is compiled."""
    rng = np.random.default_rng(0)
    pretrained = {"dense/kernel": rng.normal(size=(5, 6)).astype(np.float32)}
    if whole:
        pretrained["dense/bias"] = rng.normal(size=6).astype(np.float32)
        pretrained["scale"] = np.array(1, np.float32)
    experts = [
        {
            name: np.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), np.float32)
            for name, leaf in pretrained.items()
        }
        for _ in range(num_tasks)
    ]
    return pretrained, experts


def _fit(model=None, **options):
    return RETEX.fit(
        expert_set(*(model or _model())), **{"key": jax.random.key(0), **FAST, **options}
    )


def _assert_equal(one, other):
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


def _stored_offsets(state, task):
    """The offsets of a task, in float64, from what the state stores."""
    offsets = {}
    for name, form in state.offsets.items():
        embedding = np.asarray(state.task_embeddings[task], np.float64)
        factor = np.tensordot(embedding, np.asarray(form.generator, np.float64), axes=1)
        shared = np.asarray(form.shared, np.float64)
        offsets[name] = (factor @ shared).T if name in MATRIX else factor * shared
    return offsets


def _squared_error(state, experts):
    merged = references.flat(state.merged)
    return {
        name: sum(
            np.sum((expert[name].astype(np.float64) - merged[name] - offsets[name]) ** 2)
            for expert, offsets in zip(
                experts, [_stored_offsets(state, task) for task in range(len(experts))], strict=True
            )
        )
        for name in state.offsets
    }


def test_reaches_the_optimum():
    pretrained, experts = _model(whole=True)
    state = _fit(
        (pretrained, experts), steps=2000, warmup_steps=100, chunk_steps=500, checkpoint_every=500
    )
    recovered, residuals = references.retex(
        references.weight_average(pretrained, experts), experts, 2, MATRIX
    )
    assert state.offsets["dense/bias"].generator.shape == (3, 6)
    assert state.offsets["scale"].generator.shape == (3,)
    assert state.report.optimum == pytest.approx(sum(residuals.values()), rel=1e-5)
    assert state.report.residual <= 1.01 * sum(residuals.values())
    assert 1 - 1e-5 <= state.report.ratio <= 1.01
    errors = _squared_error(state, experts)
    for name, error in errors.items():
        assert state.report.residuals[name] == pytest.approx(error, rel=1e-4, abs=1e-9)
        assert error <= 1.01 * residuals[name] + 1e-6
    for task, expert in enumerate(experts):
        found = references.flat(RETEX.recover(state, task))
        np.testing.assert_allclose(found["dense/bias"], expert["dense/bias"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            found["dense/kernel"], recovered[task]["dense/kernel"], rtol=1e-2, atol=1e-2
        )
    merged = references.flat(state.merged)
    energy = sum(
        np.sum((expert[name] - merged[name]) ** 2) for expert in experts for name in merged
    )
    assert state.report.energy == pytest.approx(energy, rel=1e-5)


def test_one_task_a_step_gets_near_the_optimum():
    state = _fit(
        tasks_per_step="one", steps=3000, warmup_steps=100, chunk_steps=500, checkpoint_every=500
    )
    assert 1 - 1e-5 <= state.report.ratio <= 1.05


def test_one_task_a_step_samples_every_task():
    # With the generator still at zero (the first step's rate is 0), a step's loss is the energy of
    # the offsets of the task that was sampled, or of all.
    _, experts = _model()
    merged = references.weight_average(*_model())
    energies = [
        sum(np.sum((expert[name] - merged[name]) ** 2) for name in merged) for expert in experts
    ]
    sampled = set()
    for seed in range(8):
        losses = []
        _fit(
            key=jax.random.key(seed),
            tasks_per_step="one",
            **ONE_STEP,
            progress=lambda *call, losses=losses: losses.append(call[2]),
        )
        task = int(np.argmin(np.abs(np.array(energies) - losses[0])))
        assert losses[0] == pytest.approx(energies[task], rel=1e-5)
        sampled.add(task)
    assert sampled == {0, 1, 2}
    losses = []
    _fit(**ONE_STEP, progress=lambda *call: losses.append(call))
    assert losses[0][:2] == (1, 2)
    assert losses[0][2] == pytest.approx(sum(energies), rel=1e-5)


def _gradient(targets):
    """Of sum_t ||(e_t W + bias) S - D_t||^2 by embeddings, W, bias and S, by hand."""

    def gradient(params):
        factors = np.einsum("td,dar->tar", params["embeddings"], params["weight"]) + params["bias"]
        error = factors @ params["shared"] - targets
        of_factors = 2 * error @ params["shared"].T
        return {
            "embeddings": np.einsum("tar,dar->td", of_factors, params["weight"]),
            "weight": np.einsum("tar,td->dar", of_factors, params["embeddings"]),
            "bias": of_factors.sum(axis=0),
            "shared": 2 * np.einsum("tar,tab->rb", factors, error),
        }

    return gradient


def _parameters(saved):
    group = saved.params["groups"][0]
    return {
        "embeddings": saved.params["embeddings"],
        "weight": group["weight"][0],
        "bias": group["bias"][0],
        "shared": group["shared"][0],
    }


def test_every_step_is_the_papers():
    """Zero-initialised shared factor, Eq. 5's gradient, Adam, linear warm-up and cosine decay."""
    pretrained, experts = _model()
    steps, warmup, peak = 30, 10, 1e-2
    checkpoints = DictCheckpoints()
    _fit((pretrained, experts), steps=steps, warmup_steps=warmup, learning_rate=peak,
         chunk_steps=1, checkpoint_every=1, checkpoints=checkpoints)  # fmt: skip
    assert sorted(checkpoints.steps) == list(range(1, steps + 1))
    rates = [
        peak * step / warmup
        if step < warmup
        else peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for step in range(steps)
    ]
    # The first step's rate is 0, so that what it leaves behind is where the fit began.
    start = _parameters(checkpoints.steps[1])
    assert not start["shared"].any()
    assert start["shared"].shape == (2, 5)
    assert start["weight"].shape == (3, 6, 2)
    assert start["bias"].shape == (6, 2)
    assert start["embeddings"].shape == (3, 3)
    for name in ("weight", "bias"):  # PyTorch's linear layer of three inputs
        assert np.abs(start[name]).max() <= 3**-0.5
        assert np.abs(start[name]).max() >= 0.8 * 3**-0.5
    merged = references.weight_average(pretrained, experts)["dense/kernel"]
    targets = np.stack([(expert["dense/kernel"] - merged).T for expert in experts])
    for step in (2, 5, 11, 20, 30):
        want = references.adam(start, _gradient(targets), rates[:step])
        found = _parameters(checkpoints.steps[step])
        assert int(checkpoints.steps[step].step) == step
        for name in want:
            np.testing.assert_allclose(found[name], want[name], rtol=1e-4, atol=1e-5)
    assert np.abs(found["shared"]).max() > 0.01


def test_defaults_are_the_papers(monkeypatch):
    seen = {}

    class StopHereError(Exception):
        pass

    def stop(schedule, *args, **options):
        seen["rates"] = [float(schedule(step)) for step in (0, 300, 600, 2800, 5000)]
        seen["options"] = (args, options)
        raise StopHereError

    monkeypatch.setattr(adam.optax, "adam", stop)
    with pytest.raises(StopHereError):
        RETEX.fit(expert_set(*_model()), rank=2, solver="adam")
    np.testing.assert_allclose(seen["rates"], [0, 1e-4, 2e-4, 1e-4, 0], rtol=1e-5, atol=1e-11)
    assert seen["options"] == ((), {})


@pytest.mark.parametrize("warmup_steps", [0, 39])
def test_warmup_may_be_nothing_or_all_but_one_step(warmup_steps):
    losses = []
    _fit(warmup_steps=warmup_steps, progress=lambda *call: losses.append(call[2]))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("num_tasks", "d_emb"), [(1, None), (3, None), (3, 2)])
def test_baked_form(num_tasks, d_emb):
    # d_emb + 1 >= T: the task factors themselves are the smaller form.
    state = _fit(_model(num_tasks), d_emb=d_emb)
    np.testing.assert_array_equal(state.task_embeddings, np.eye(num_tasks))
    assert state.offsets["dense/kernel"].generator.shape == (num_tasks, 6, 2)


def test_generator_form():
    pretrained, experts = _model(6, whole=True)
    state = _fit((pretrained, experts), d_emb=2, steps=400, chunk_steps=100, checkpoint_every=100)
    assert state.num_tasks == 6
    assert state.task_embeddings.shape == (6, 3)
    np.testing.assert_array_equal(state.task_embeddings[:, 2], 1)
    assert state.offsets["dense/kernel"].generator.shape == (3, 6, 2)
    assert state.offsets["scale"].generator.shape == (3,)
    assert RETEX.extra_bytes(state) == 4 * (6 * 3 + 3 * 6 * 2 + 2 * 5 + 3 * 6 + 1 + 3 + 1)
    # The optimum is that of free task factors: a bound from below that two numbers a task miss.
    _, residuals = references.retex(
        references.weight_average(pretrained, experts), experts, 2, MATRIX
    )
    assert state.report.optimum == pytest.approx(sum(residuals.values()), rel=1e-5)
    assert 1.01 < state.report.ratio < state.report.energy / state.report.optimum
    for name, error in _squared_error(state, experts).items():
        assert state.report.residuals[name] == pytest.approx(error, rel=1e-4, abs=1e-9)
    merged = references.flat(state.merged)
    for task in range(6):
        found = references.flat(RETEX.recover(state, task))
        for name, offset in _stored_offsets(state, task).items():
            np.testing.assert_allclose(found[name], merged[name] + offset, rtol=1e-5, atol=1e-5)
    # Interpolated embeddings are interpolated offsets, the bias included.
    weights = np.array([0.5, 0, 0.25, 0, 0, 0.25], np.float32)
    mixture = references.flat(RETEX.mix(state, weights))
    for name in state.offsets:
        want = merged[name] + sum(
            weight * _stored_offsets(state, task)[name] for task, weight in enumerate(weights)
        )
        np.testing.assert_allclose(mixture[name], want, rtol=1e-5, atol=1e-5)
    one_hot = references.flat(RETEX.mix(state, np.eye(6, dtype=np.float32)[4]))
    for name, leaf in references.flat(RETEX.recover(state, 4)).items():
        np.testing.assert_allclose(one_hot[name], leaf, rtol=1e-6, atol=1e-6)


def test_generator_form_fits_experts_that_lie_on_a_line():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(5, 1)), rng.normal(size=(1, 6))
    pretrained = {"dense/kernel": np.zeros((5, 6), np.float32)}
    experts = [
        {"dense/kernel": (place * left @ right).astype(np.float32)} for place in (-2, -1, 0, 1, 2)
    ]
    state = _fit((pretrained, experts), d_emb=1, steps=1500, warmup_steps=50, chunk_steps=500,
                 checkpoint_every=500)  # fmt: skip
    assert state.task_embeddings.shape == (5, 2)
    assert state.report.residual <= 1e-4 * state.report.energy


def test_a_preempted_fit_is_kept_where_it_is_and_goes_on_to_the_same_bits():
    options = {"steps": 40, "chunk_steps": 5, "checkpoint_every": 20}
    checkpoints, answers = DictCheckpoints(), [False, False, True]
    with pytest.raises(Preempted, match="saved at step 15 of 40") as error:
        _fit(**options, checkpoints=checkpoints, preempted=lambda: answers.pop(0))
    assert (error.value.code, checkpoints.latest(), answers) == (75, 15, [])
    resumed = _fit(**options, checkpoints=checkpoints, preempted=lambda: False)
    assert checkpoints.restored == [15]
    _assert_equal(_fit(**options), resumed)


@pytest.mark.parametrize(("tasks_per_step", "killed_at"), [("all", 10), ("all", 30), ("one", 20)])
def test_resuming_is_bitwise_equal_to_never_stopping(tasks_per_step, killed_at):
    class KilledError(Exception):
        pass

    def kill(done, steps, loss):
        if done > killed_at:
            raise KilledError

    options = {"tasks_per_step": tasks_per_step, "steps": 40, "chunk_steps": 10}
    whole = _fit(**options)
    checkpoints = DictCheckpoints()
    with pytest.raises(KilledError):
        _fit(**options, checkpoints=checkpoints, progress=kill)
    assert checkpoints.latest() == killed_at
    seen = []
    resumed = _fit(**options, checkpoints=checkpoints, progress=lambda *call: seen.append(call[0]))
    assert checkpoints.restored == [killed_at]
    assert seen == list(range(killed_at + 10, 41, 10))
    assert checkpoints.latest() == 40
    _assert_equal(whole, resumed)
    # A finished fit is read back without a step.
    _assert_equal(whole, _fit(**options, checkpoints=checkpoints, progress=pytest.fail))


def test_a_checkpoint_of_another_fit_is_not_taken():
    checkpoints = DictCheckpoints()
    pretrained, experts = _model()
    _fit((pretrained, experts), checkpoints=checkpoints)
    moved = [{name: 2 * leaf for name, leaf in expert.items()} for expert in experts]
    for model, options, named in (
        ((pretrained, moved), {}, "energies"),
        ((pretrained, experts), {"steps": 30}, "steps"),
        ((pretrained, experts), {"key": jax.random.key(1)}, "key"),
        ((pretrained, experts), {"orientation": "left"}, "leaves"),
    ):
        message = rf"checkpoints: step 40 is of another fit, whose \['{named}'\] differ"
        with pytest.raises(ValueError, match=message):
            _fit(model, **options, checkpoints=checkpoints)
    assert not checkpoints.restored


def test_fitting_twice_is_bitwise_equal_and_the_key_matters():
    _assert_equal(_fit(), _fit())
    assert not np.array_equal(
        _fit().offsets["dense/kernel"].generator,
        _fit(key=jax.random.key(1)).offsets["dense/kernel"].generator,
    )


def test_chunks_do_not_change_the_answer():
    one, other = _fit(), _fit(chunk_steps=20, checkpoint_every=20)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_steps", [1, 8])
def test_a_loss_that_is_not_finite_raises_at_its_step(chunk_steps):
    checkpoints = DictCheckpoints()
    losses = []
    with pytest.raises(FloatingPointError) as error:
        _fit(
            learning_rate=1e30, chunk_steps=chunk_steps, checkpoint_every=chunk_steps,
            checkpoints=checkpoints, progress=lambda *call: losses.append(call),
        )  # fmt: skip
    # Step 1 has rate 0, step 2 blows up the parameters, step 3 is the first to see that.
    assert "at step 3;" in str(error.value)
    assert "learning_rate = 1e+30" in str(error.value)
    assert all(math.isfinite(loss) for _, _, loss in losses)
    assert all(step < 3 for step in checkpoints.steps)


def test_the_last_update_may_not_be_lost_to_nan():
    # The loss of a step is that from before its update: only the result shows what the last one did.
    with pytest.raises(FloatingPointError):
        _fit(learning_rate=1e30, **ONE_STEP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_emb": 0}, "d_emb: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"learning_rate": math.inf}, "learning_rate: got inf"),
        ({"steps": 0, "warmup_steps": 0}, "steps: got 0"),
        ({"warmup_steps": 40}, "warmup_steps: got 40"),
        ({"warmup_steps": -1}, "warmup_steps: got -1"),
        ({"tasks_per_step": "some"}, "tasks_per_step: got 'some'"),
        ({"chunk_steps": 0}, "chunk_steps"),
        ({"checkpoint_every": 15}, "checkpoint_every: got 15"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(**options)


def test_all_bad_settings_are_listed_at_once():
    with pytest.raises(
        ValueError, match=r"d_emb.*learning_rate.*steps.*warmup_steps.*tasks_per_st"
    ):
        _fit(d_emb=0, learning_rate=-1, steps=0, warmup_steps=2, tasks_per_step="none")


def test_products_are_at_the_highest_precision():
    """Also where the report measures the residual, outside the training loop."""
    targets = {0: jnp.ones((1, 3, 6, 5)), 1: jnp.ones((2, 3, 4))}
    params = generator.init_params(
        jax.random.key(0), [["a"], ["b", "c"]], targets, {0: 2, 1: None}, 3
    )
    for index in targets:
        text = str(
            jax.make_jaxpr(generator.predict, static_argnums=1)(params, index, jnp.ones((3, 3)))
        )
        products = text.count("dot_general[")
        assert products == 2 - index
        assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_a_leaf_is_drawn_alike_whatever_stands_beside_it():
    key, target = jax.random.key(0), jnp.ones((2, 3, 6, 5))
    both = generator.init_params(key, [["a", "b"]], {0: target}, {0: 2}, 3)["groups"][0]
    alone = generator.init_params(
        key, [["c"], ["b"]], {0: target[:1], 1: target[1:]}, {0: 2, 1: 2}, 3
    )
    np.testing.assert_array_equal(both["weight"][1], alone["groups"][1]["weight"][0])
    assert not np.allclose(both["weight"][0], both["weight"][1])
    assert not np.allclose(both["weight"][0], alone["groups"][0]["weight"][0])


def test_loss_under_jit():
    rng = np.random.default_rng(0)
    targets = {
        0: rng.normal(size=(2, 3, 6, 5)).astype(np.float32),
        1: rng.normal(size=(1, 3, 4)).astype(np.float32),
    }
    params = {
        "embeddings": rng.normal(size=(3, 2)),
        "groups": {
            0: {
                "weight": rng.normal(size=(2, 2, 6, 3)),
                "bias": rng.normal(size=(2, 6, 3)),
                "shared": rng.normal(size=(2, 3, 5)),
            },
            1: {
                "weight": rng.normal(size=(1, 2, 4)),
                "bias": rng.normal(size=(1, 4)),
                "shared": rng.normal(size=1),
            },
        },
    }
    want = 0.0
    for task in (2, 0):
        for index, target in targets.items():
            for leaf in range(len(target)):
                group = {name: value[leaf] for name, value in params["groups"][index].items()}
                factor = (
                    np.tensordot(params["embeddings"][task], group["weight"], 1) + group["bias"]
                )
                offset = factor @ group["shared"] if index == 0 else factor * group["shared"]
                want += np.sum((offset - target[leaf, task]) ** 2)
    params = jax.tree.map(np.float32, params)
    assert float(jax.jit(generator.loss_fn)(params, targets, np.array([2, 0]))) == pytest.approx(
        want, rel=1e-5
    )


@pytest.mark.parametrize("is_split", [False, True])
def test_the_gradient_is_that_of_the_squared_errors(is_split):
    rng = np.random.default_rng(0)
    targets = {0: jnp.asarray(rng.normal(size=(2, 3, 5, 7)), jnp.float32)}
    params = generator.init_params(jax.random.key(0), [["a", "b"]], targets, {0: 4}, 2)
    shared = params["groups"][0]["shared"]
    params["groups"][0]["shared"] = jax.random.normal(jax.random.key(1), shared.shape)

    def plain(params, tasks):
        embeddings = params["embeddings"][tasks]
        return jnp.sum((generator.predict(params, 0, embeddings) - targets[0][:, tasks]) ** 2)

    with jax.default_matmul_precision("highest"):
        for tasks in (jnp.arange(3), jnp.array([2])):
            want = jax.value_and_grad(plain)(params, tasks)
            found = jax.value_and_grad(generator.loss_fn)(params, targets, tasks, is_split)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
