import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import safetensors.numpy
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set

import retex_jax as rtx
from retex_jax import buffers
from retex_jax.offsets import exact
from retex_jax.offsets import state as state_module

RETEX = rtx.METHODS["retex"]


def _fit(pretrained, experts, layout="flax", **options):
    return RETEX.fit(expert_set(pretrained, experts, layout=layout), **options)


def _with_slashes(model):
    return {name.replace(".", "/"): leaf for name, leaf in model.items()}


def _squared_errors(state, experts, matrices):
    """||D_t - G_t S||^2 summed over tasks, by leaf, in float64, from what the state stores."""
    merged = references.flat(state.merged)
    errors = {}
    for name, form in state.offsets.items():
        shared = np.asarray(form.shared, np.float64)
        errors[name] = 0.0
        for task, expert in enumerate(experts):
            offset = expert[name].astype(np.float64) - merged[name].astype(np.float64)
            factor = np.tensordot(
                np.asarray(state.task_embeddings[task], np.float64),
                np.asarray(form.generator, np.float64),
                axes=1,
            )
            if name in matrices:
                error = references.as_matrix(offset, matrices[name]) - factor @ shared
            else:
                error = offset - factor * shared
            errors[name] += float(np.sum(error**2))
    return errors


def _power_law(shape, seed=0):
    """[T, a, b] whose vertical stack has a spectrum with gaps: 1, 0.8, 0.64, ..."""
    rng = np.random.default_rng(seed)
    num_tasks, rows, columns = shape
    left, _, right = np.linalg.svd(
        rng.normal(size=(num_tasks * rows, columns)), full_matrices=False
    )
    values = 0.8 ** np.arange(len(right))
    return ((left * values) @ right).reshape(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("model", "rank_rule"), [(0, "paper"), (0, "clip"), (1, "paper"), (2, "paper")]
)
def test_recovers_the_best_approximation(model, rank_rule):
    pretrained, experts = MODELS[model]
    num_tasks = len(experts)
    state = _fit(
        pretrained, experts, rank=4, rank_rule=rank_rule, base="task_arithmetic",
        base_options={"scaling": 0.1},
    )  # fmt: skip
    base = references.flat(state.merged)
    assert_close(base, references.task_arithmetic(pretrained, experts, 0.1))
    recovered, residuals = references.retex(base, experts, 4, references.FLAX_MATRICES, rank_rule)
    for task in range(num_tasks):
        assert_close(references.flat(RETEX.recover(state, task)), recovered[task])
    errors = _squared_errors(state, experts, references.FLAX_MATRICES)
    for name, residual in residuals.items():
        assert state.report.optima[name] == pytest.approx(residual, rel=1e-5, abs=1e-10)
        assert state.report.residuals[name] == pytest.approx(errors[name], rel=1e-5, abs=1e-10)
        energy = sum(
            np.sum((expert[name].astype(np.float64) - base[name]) ** 2) for expert in experts
        )
        assert state.report.energies[name] == pytest.approx(energy, rel=1e-5)
    assert state.report.ratio == pytest.approx(1, abs=1e-6)
    assert state.report.residual == pytest.approx(sum(residuals.values()), rel=1e-5)
    assert state.report.optimum == pytest.approx(sum(residuals.values()), rel=1e-5)


def test_torch_layout_gives_the_same_model():
    flax = references.flax_model(2)
    torch = [references.as_torch(model) for model in (flax[0], *flax[1])]
    state = _fit(_with_slashes(torch[0]), list(map(_with_slashes, torch[1:])), "torch", rank=4)
    twin = _fit(*flax, rank=4)
    for task in range(2):
        want = references.as_torch(references.flat(RETEX.recover(twin, task)))
        assert_close(references.flat(RETEX.recover(state, task)), _with_slashes(want))
    for torch_name, flax_name in [
        ("conv/weight", "conv/kernel"),
        ("conv1d/weight", "conv1d/kernel"),
        ("dense/weight", "dense/kernel"),
        ("token/weight", "token/embedding"),
    ]:
        assert state.offsets[torch_name].generator.shape == twin.offsets[flax_name].generator.shape
        assert state.report.residuals[torch_name] == pytest.approx(
            twin.report.residuals[flax_name], rel=1e-5
        )


@pytest.mark.parametrize(
    ("rank", "rank_rule", "narrow", "dense", "embedding", "odd"),
    [
        (4, "paper", 1, 4, 4, 4),
        (5, "paper", 1, 5, 5, 2),
        (6, "paper", 1, 6, 3, 2),
        (6, "clip", 1, 6, 6, 5),
        (10, "paper", 1, 5, 3, 2),
        (10, "clip", 1, 10, 6, 5),
        (1, "paper", 1, 1, 1, 1),
    ],
)
def test_rank_rules(rank, rank_rule, narrow, dense, embedding, odd):
    made = expert_set(*references.flax_model(2))
    plans = state_module.plan_leaves(made.leaves, "flax", rank, rank_rule)
    assert set(plans) == set(references.FLAX_MATRICES)
    for name, shape, want in [
        ("narrow/kernel", (1, 7), narrow),
        ("dense/kernel", (10, 12), dense),
        ("token/embedding", (20, 6), embedding),
        ("conv1d/kernel", (5, 12), odd),
    ]:
        assert plans[name].shape == shape
        assert plans[name].rank == want


def test_shapes_of_the_factors():
    state = _fit(*references.flax_model(2), rank=4)
    for name, a, b, r in [
        ("narrow/kernel", 1, 7, 1),
        ("dense/kernel", 10, 12, 4),
        ("token/embedding", 20, 6, 4),
        ("attention/query/kernel", 12, 9, 4),
        ("attention/out/kernel", 9, 12, 4),
        ("conv/kernel", 6, 16, 4),
        ("conv1d/kernel", 5, 12, 4),
    ]:
        assert state.offsets[name].generator.shape == (2, a, r)
        assert state.offsets[name].shared.shape == (r, b)
    assert state.offsets["dense/bias"].generator.shape == (2, 10)
    assert state.offsets["scale"].generator.shape == (2,)
    assert state.offsets["scale"].shared.shape == state.offsets["dense/bias"].shared.shape == ()
    assert set(state.offsets) == set(state.report.residuals)


@pytest.mark.parametrize("model", MODELS[1:], ids=MODEL_IDS[1:])
def test_leaves_below_two_axes_are_exact(model):
    pretrained, experts = model
    state = _fit(pretrained, experts, rank=4, base="ties")
    for task, expert in enumerate(experts):
        recovered = references.flat(RETEX.recover(state, task))
        for name in ("scale", "dense/bias"):
            np.testing.assert_allclose(recovered[name], expert[name], rtol=1e-6, atol=1e-6)
            assert recovered[name].shape == expert[name].shape
            assert state.report.residuals[name] == state.report.optima[name] == 0


def test_one_task_gives_the_expert():
    pretrained, experts = references.few_leaves(1)
    state = _fit(pretrained, experts, rank=4)
    assert_close(references.flat(RETEX.recover(state, 0)), experts[0], 1e-6, 1e-6)
    assert state.report.ratio == 1


def test_full_rank_recovers_every_expert_and_integer_buffers():
    pretrained, experts = references.flax_model(2)
    state = _fit(pretrained, experts, rank=10, rank_rule="clip")
    exact_leaves = 0
    for task, expert in enumerate(experts):
        recovered = references.flat(RETEX.recover(state, task))
        for name, leaf in expert.items():
            if not references.is_float(leaf):
                np.testing.assert_array_equal(recovered[name], leaf)
                assert recovered[name].dtype == leaf.dtype
                continue
            if name in references.FLAX_MATRICES:
                a, b = references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
                if a < b:  # the stack's rank may exceed min(a, b) then
                    continue
            exact_leaves += 1
            np.testing.assert_allclose(recovered[name], leaf, rtol=1e-5, atol=1e-5)
    assert exact_leaves == 2 * 4


def test_wide_integer_buffers_are_kept():
    pretrained = {"a": np.ones((2, 3), np.float32), "big": np.array([2**40, -1], np.int64)}
    state = _fit(pretrained, [pretrained], rank=1)
    recovered = RETEX.recover(state, 0)
    np.testing.assert_array_equal(recovered["big"], pretrained["big"])
    assert recovered["big"].dtype == np.int64


@pytest.mark.parametrize(
    "path", ["right Gram", "left Gram", "range finder, right", "range finder, left"]
)
def test_all_solver_paths_equal_the_svd(path):
    # Six tasks of (20, 60) stack to (120, 60), of (5, 60) to (30, 60).
    shape = (6, 20, 60) if "right" in path else (6, 5, 60)
    max_gram = 8 if "range" in path else exact.MAX_GRAM
    offsets = np.stack([_power_law(shape, seed) for seed in range(2)])
    rank = 5
    solution = exact.solve_group(jnp.asarray(offsets), rank, max_gram=max_gram)
    assert solution.task_factors.shape == (2, *shape[:2], rank)
    assert solution.shared_factor.shape == (2, rank, 60)
    assert solution.task_factors.dtype == solution.shared_factor.dtype == jnp.float32
    for leaf in range(2):
        best, least = references.low_rank(offsets[leaf], rank)
        factors = np.asarray(solution.task_factors[leaf], np.float64)
        shared = np.asarray(solution.shared_factor[leaf], np.float64)
        np.testing.assert_allclose(shared @ shared.T, np.eye(rank), atol=1e-6)
        np.testing.assert_allclose(factors @ shared, best, rtol=1e-4, atol=1e-5)
        residual = np.sum((offsets[leaf] - factors @ shared) ** 2)
        assert float(solution.residual[leaf]) == pytest.approx(residual, rel=1e-6)
        assert 1 - 1e-6 <= residual / least <= 1.0001
        energy = np.sum(offsets[leaf].astype(np.float64) ** 2)
        assert float(solution.energy[leaf]) == pytest.approx(energy, rel=1e-6)
        values = np.linalg.svd(offsets[leaf].reshape(-1, 60).astype(np.float64), compute_uv=False)
        spectrum = np.asarray(solution.spectrum[leaf])
        if "range" in path:
            assert np.isnan(solution.optimum[leaf])
            assert spectrum.shape == (rank,)
        else:
            assert float(solution.optimum[leaf]) == pytest.approx(least, rel=1e-6)
            assert spectrum.shape == (min(np.prod(shape[:2]), 60),)
        np.testing.assert_allclose(spectrum, values[: len(spectrum)] ** 2, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 2, 9), (3, 7, 1)])
@pytest.mark.parametrize("max_gram", [3, exact.MAX_GRAM])
@pytest.mark.parametrize("kind", ["zero", "deficient", "full rank"])
def test_degenerate_offsets(shape, max_gram, kind):
    rng = np.random.default_rng(0)
    offsets = np.zeros(shape, np.float32)
    if kind == "deficient":
        offsets = (rng.normal(size=(*shape[:2], 1)) @ rng.normal(size=(1, shape[2]))).astype("f4")
    elif kind == "full rank":
        offsets = rng.normal(size=shape).astype(np.float32)
    rank = min(shape[1:])
    solution = exact.solve_group(offsets[None], rank, max_gram=max_gram)
    shared = np.asarray(solution.shared_factor[0], np.float64)
    np.testing.assert_allclose(shared @ shared.T, np.eye(rank), atol=1e-6)
    best, least = references.low_rank(offsets, rank)
    product = np.asarray(solution.task_factors[0], np.float64) @ shared
    np.testing.assert_allclose(product, best, rtol=1e-5, atol=1e-5)
    assert float(solution.residual[0]) == pytest.approx(least, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5, 3e-6, 1e-6, 1e-7])
def test_the_certificate_holds_down_to_rounding(noise):
    # Rank 4 plus noise: the optimum goes down to 1e-14 of the energy, below float32's rounding.
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(3, 20, 4)) @ np.linalg.qr(rng.normal(size=(16, 4)))[0].T
    experts = [
        {"k": np.ascontiguousarray(offset.T)}
        for offset in (signal + noise * rng.normal(size=signal.shape)).astype(np.float32)
    ]
    pretrained = {"k": np.zeros((16, 20), np.float32)}
    state = _fit(pretrained, experts, rank=4, base=pretrained)
    assert 1 - 1e-4 <= state.report.ratio <= 1.0001
    errors = _squared_errors(state, experts, {"k": ((1, 0), 1)})
    assert state.report.residual == pytest.approx(errors["k"], rel=1e-4)


def test_single_precision_never_certifies_what_it_does_not_know():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(3, 20, 4)) @ np.linalg.qr(rng.normal(size=(16, 4)))[0].T
    offsets = (signal + 1e-3 * rng.normal(size=signal.shape)).astype(np.float32)
    _, least = references.low_rank(offsets, 4)
    solution = exact.solve_group(offsets[None], 4, precision="float32")
    product = np.asarray(solution.task_factors[0], np.float64) @ np.asarray(
        solution.shared_factor[0], np.float64
    )
    residual = np.sum((offsets - product) ** 2)
    assert float(solution.residual[0]) == pytest.approx(residual, rel=1e-3)
    assert residual / least <= 1.0001
    # The tail of a float32 spectrum is rounding: right to 1e-4, or said to be unknown.
    optimum = float(solution.optimum[0])
    assert math.isnan(optimum) or optimum == pytest.approx(least, rel=1e-4)


def test_an_unknown_optimum_is_an_unknown_ratio():
    report = state_module.FitReport(
        residuals={"a": 1.0, "b": 0.5}, optima={"a": float("nan"), "b": 0.5},
        energies={"a": 3.0, "b": 1.0}, spectra={},
    )  # fmt: skip
    assert math.isnan(report.optimum)
    assert math.isnan(report.ratio)
    assert report.residual == 1.5
    assert report.energy == 4


def test_ratio_of_a_report():
    def report(residual, optimum, energy):
        return state_module.FitReport({"a": residual}, {"a": optimum}, {"a": energy}, {}).ratio

    assert report(3.0, 2.0, 10.0) == 1.5
    assert report(0.0, 0.0, 0.0) == 1
    assert report(1e-15, 0.0, 1.0) == 1
    assert report(1e-3, 0.0, 1.0) == math.inf


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype):
    pretrained, experts = references.flax_model(2, dtype=dtype)
    # Of full rank, so that the float32 sum rounds to the expert itself.
    state = _fit(pretrained, experts, rank=10, rank_rule="clip")
    for task, expert in enumerate(experts):
        recovered = references.flat(RETEX.recover(state, task))
        for name, leaf in expert.items():
            assert recovered[name].dtype == leaf.dtype
            assert references.flat(state.merged)[name].dtype == leaf.dtype
        for name in ("scale", "dense/bias", "token/embedding", "attention/query/kernel"):
            np.testing.assert_array_equal(recovered[name], expert[name])
    assert all(form.generator.dtype == jnp.float32 for form in state.offsets.values())
    # The offsets are from the merged model as stored, so its rounding is recovered too.
    errors = _squared_errors(state, experts, references.FLAX_MATRICES)
    for name, error in errors.items():
        assert state.report.residuals[name] == pytest.approx(error, rel=1e-4, abs=1e-8)


def test_order_of_tasks_does_not_matter():
    pretrained, experts = references.few_leaves(8)
    order = [3, 1, 0, 2, 7, 4, 6, 5]
    first = _fit(pretrained, experts, rank=4)
    second = _fit(pretrained, [experts[task] for task in order], rank=4)
    assert first.report.residual == pytest.approx(second.report.residual, rel=1e-6)
    for position, task in enumerate(order):
        assert_close(
            references.flat(RETEX.recover(second, position)),
            references.flat(RETEX.recover(first, task)),
        )


def test_small_groups_give_the_same_answer():
    pretrained, experts = references.flax_model(2)
    calls = []
    whole = _fit(pretrained, experts, rank=4, progress=lambda *done: calls.append(done))
    parts = _fit(pretrained, experts, rank=4, group_bytes=1)
    for task in range(2):
        assert_close(
            references.flat(RETEX.recover(parts, task)), references.flat(RETEX.recover(whole, task))
        )
    total = len(references.FLAX_MATRICES)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) == total - 1, "dense and second have one shape, so they are one group"


def test_bases():
    pretrained, experts = references.few_leaves(2)
    state = _fit(pretrained, experts, rank=4, base="ties", base_options={"density": 0.5})
    want = rtx.METHODS["ties"].fit(expert_set(pretrained, experts), density=0.5)
    assert_close(references.flat(state.merged), references.flat(want), 0, 0)
    given = _fit(pretrained, experts, rank=4, base=want)
    for name in state.offsets:
        np.testing.assert_array_equal(state.offsets[name].generator, given.offsets[name].generator)
    average = _fit(pretrained, experts, rank=4)
    assert_close(references.flat(average.merged), references.weight_average(pretrained, experts))


def test_bad_bases():
    pretrained, experts = references.few_leaves(2)
    with pytest.raises(ValueError, match=r"base: got 'tise'.*did you mean 'ties'"):
        _fit(pretrained, experts, rank=4, base="tise")
    for name in ("missing", "extra", "misshaped"):
        base = dict(pretrained)
        if name == "missing":
            del base["dense/bias"]
        elif name == "extra":
            base["other"] = np.zeros(3)
        else:
            base["dense/bias"] = np.zeros(11)
        leaf = "other" if name == "extra" else "dense/bias"
        with pytest.raises(ValueError, match=rf"base: leaves \['{leaf}'\]"):
            _fit(pretrained, experts, rank=4, base=references.nested(base))
    base = {**pretrained, "dense/bias": np.full(10, np.nan, np.float32)}
    with pytest.raises(ValueError, match=r"base.*dense/bias.*(NaN|finite)"):
        _fit(pretrained, experts, rank=4, base=references.nested(base))


@pytest.mark.parametrize("rank", [0, -1, 11, True, False, 2.0, "2", None, np.float32(2)])
@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_bad_ranks(rank, solver):
    with pytest.raises(ValueError, match=r"rank: got .* expected an integer from 1 to 10"):
        _fit(*references.few_leaves(2), rank=rank, solver=solver)


def test_numpy_ranks():
    state = _fit(*references.few_leaves(2), rank=np.int64(4))
    assert state.offsets["dense/kernel"].generator.shape == (2, 10, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "svd"}, "solver: got 'svd'"),
        ({"rank_rule": "half"}, "rank_rule: got 'half'"),
        ({"precision": "bfloat16"}, "precision: got 'bfloat16'"),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"solver": "adam", "learning_rat": 1.0}, "learning_rat.*did you mean 'learning_rate'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(2), **{"rank": 4, **options})


def test_all_bad_options_are_named_at_once():
    wrong = {"budget": 0.1, "task_weights": [1.0], "base": "tise", "bits": 5, "steps": 3}
    message = "(?s)" + ".*".join(
        f"{name}: " for name in ("rank", "task_weights", "base", "steps", "bits")
    )
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(2), rank=4, **wrong)


@pytest.mark.parametrize("task", [-1, 2, np.int64(2), np.array(2)])
def test_bad_tasks(task):
    state = _fit(*references.few_leaves(2), rank=4)
    with pytest.raises(ValueError, match="task: got"):
        RETEX.recover(state, task)


@pytest.mark.parametrize("weights", [np.ones(3, np.float32), np.float32(1), np.ones((2, 2))])
def test_bad_weights(weights):
    state = _fit(*references.few_leaves(2), rank=4)
    with pytest.raises(ValueError, match="weights: got"):
        RETEX.mix(state, weights)


def test_recover_under_jit_and_vmap():
    state = _fit(*references.few_leaves(2), rank=4)
    all_tasks = jax.vmap(lambda task: RETEX.recover(state, task))(jnp.arange(2))
    compiled = jax.jit(RETEX.recover)
    for task in range(2):
        want = references.flat(RETEX.recover(state, task))
        assert_close(references.flat(compiled(state, jnp.int32(task))), want, 1e-6, 1e-6)
        one = jax.tree.map(lambda leaf, task=task: leaf[task], all_tasks)
        assert_close(references.flat(one), want, 1e-6, 1e-6)
        with jax.disable_jit():
            assert_close(references.flat(RETEX.recover(state, task)), want, 1e-6, 1e-6)


def test_mixtures_interpolate_the_offsets():
    state = _fit(*references.few_leaves(8), rank=4)
    merged = references.flat(state.merged)
    experts = [references.flat(RETEX.recover(state, task)) for task in range(8)]
    for task in range(8):
        one_hot = references.flat(RETEX.mix(state, np.eye(8, dtype=np.float32)[task]))
        for name in experts[task]:
            np.testing.assert_array_equal(one_hot[name], experts[task][name])
    weights = np.array([0.5, 0.25, -0.5, 1, 0, 0, 2, 0.125])
    mixture = references.flat(RETEX.mix(state, weights))
    for name, base in merged.items():
        if not references.is_float(base):
            np.testing.assert_array_equal(mixture[name], base)
            continue
        offsets = sum(
            weight * (expert[name].astype(np.float64) - base)
            for weight, expert in zip(weights, experts, strict=True)
        )
        np.testing.assert_allclose(mixture[name], base + offsets, rtol=1e-5, atol=1e-5)


def test_state_is_a_pytree_and_counts_its_bytes():
    pretrained, experts = references.flax_model(2)
    state = _fit(pretrained, experts, rank=4)
    leaves, structure = jax.tree.flatten(state)
    rebuilt = jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])
    assert rebuilt.layout == "flax"
    assert rebuilt.num_tasks == 2
    assert_close(
        references.flat(RETEX.recover(rebuilt, 1)), references.flat(RETEX.recover(state, 1)), 0, 0
    )
    floats = 2 * 2
    for name, leaf in pretrained.items():
        if name in references.FLAX_MATRICES:
            a, b = references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
            rank = references.leaf_rank((a, b), 4)
            floats += 2 * a * rank + rank * b
        elif references.is_float(leaf):
            floats += 2 * leaf.size + 1
    assert RETEX.extra_bytes(state) == 4 * floats


def test_fitting_twice_is_bitwise_equal():
    pretrained, experts = references.few_leaves(8)
    first, second = (_fit(pretrained, experts, rank=4) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


def test_everything_multiplies_at_the_highest_precision():
    """On a GPU, and on a TPU, float32 products are otherwise made of 10-bit or 8-bit mantissas."""
    state = _fit(*references.few_leaves(2), rank=4)
    offsets = jnp.ones((1, 2, 6, 5))
    calls = {
        "right": jax.make_jaxpr(lambda x: exact.solve_group(x, 2, precision="float32"))(offsets),
        "left": jax.make_jaxpr(lambda x: exact.solve_group(x, 2, precision="float32"))(
            jnp.ones((1, 2, 2, 9))
        ),
        "range": jax.make_jaxpr(lambda x: exact.solve_group(x, 2, precision="float32", max_gram=2))(
            offsets
        ),
        "mix": jax.make_jaxpr(RETEX.mix)(state, jnp.ones(2)),
    }
    for name, jaxpr in calls.items():
        text = str(jaxpr)
        products = text.count("dot_general[")
        assert products >= 2, name
        assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products, name


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b/bias": (8,), "c/kernel": (3, 3, 4, 16), "d": ()}
    pretrained = {key: np.array(rng.normal(size=s), np.float32) for key, s in shapes.items()}
    experts = [
        {
            k: np.asarray(v + 0.1 * rng.normal(size=v.shape), np.float32)
            for k, v in pretrained.items()
        }
        for _ in range(2)
    ]
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    assert not sharded[1]["a/kernel"].sharding.is_fully_replicated
    assert not sharded[1]["c/kernel"].sharding.is_fully_replicated
    found = _fit(sharded[0], sharded[1:], rank=4)
    want = _fit(pretrained, experts, rank=4)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-6)
    assert found.report.ratio == pytest.approx(1, abs=1e-6)
    for task in range(2):
        assert_close(
            references.flat(RETEX.recover(found, task)), references.flat(RETEX.recover(want, task))
        )


def test_the_next_leaves_are_read_ahead(tmp_path, monkeypatch):
    shapes = {name: (4 + index, 6) for index, name in enumerate("abc")}
    paths = []
    for task in range(3):
        rng = np.random.default_rng(task)
        leaves = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
        paths.append(tmp_path / f"{task}.safetensors")
        safetensors.numpy.save_file(leaves, paths[-1])
    events = []
    for name in ("read_ahead", "stacked"):
        call = getattr(rtx.ExpertSet, name)

        def spy(self, names, *part, call=call, name=name):
            events.append((name, *names))
            return call(self, names, *part)

        monkeypatch.setattr(rtx.ExpertSet, name, spy)
    experts = rtx.ExpertSet.from_safetensors(paths[0], paths[1:])
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    state = RETEX.fit(experts, base=base, rank=2)
    for name, following in ("ab", "bc"):
        assert events.index(("read_ahead", following)) < events.index(("stacked", name))
    monkeypatch.setattr(buffers, "_advise", None)
    assert RETEX.fit(experts, base=base, rank=2).report.residuals == state.report.residuals
    events.clear()
    RETEX.fit(experts, base=base, rank=2, stack_bytes=1)  # a few tasks at a time
    assert not [event for event in events if event[0] == "read_ahead" and len(event) > 1]
