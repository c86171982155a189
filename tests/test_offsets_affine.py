import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_offsets as wanted
from expert_sets import MODELS, assert_close, expert_set

import retex_jax as rtx
from retex_jax import tree
from retex_jax.offsets import affine
from retex_jax.offsets.forms import Affine, Elementwise
from retex_jax.offsets.serialization import from_tensors, to_tensors

RETEX = rtx.METHODS["retex"]


def _fit(pretrained, experts, layout="flax", **options):
    options = {"form": "affine", "rank": 3, "base": "ties", "sweeps": 30, **options}
    return RETEX.fit(expert_set(pretrained, experts, layout=layout), **options)


def _data(num_tasks=3, rows=6, columns=5, seed=0):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(rows, columns)).astype(np.float32)
    noise = rng.normal(size=(num_tasks, rows, columns))
    scales = rng.normal(size=(num_tasks, 1, 1))
    return (scales * direction + 0.5 * noise).astype(np.float32), direction


@pytest.mark.parametrize(
    ("model", "orientation"), [(0, "right"), (1, "right"), (2, "right"), (2, "left"), (2, "auto")]
)
def test_every_leaf(model, orientation):
    pretrained, experts = MODELS[model]
    state = _fit(pretrained, experts, orientation=orientation)
    wanted.check_state(state, RETEX.recover, experts, references.FLAX_MATRICES)
    wanted.check_mixture(state, RETEX.mix, RETEX.recover, len(experts))
    base = references.flat(state.merged)
    product = RETEX.fit(
        expert_set(pretrained, experts), rank=3, base=state.merged, orientation=orientation
    )
    for name, form in state.offsets.items():
        if name not in references.FLAX_MATRICES:
            assert isinstance(form, Elementwise)
            assert state.report.residuals[name] == 0
            continue
        assert isinstance(form, Affine)
        view = references.FLAX_MATRICES[name]
        stack = wanted.offsets_of(base, experts, name, references.FLAX_MATRICES)
        line = references.as_matrix(base[name].astype(np.float64) - pretrained[name], view)
        np.testing.assert_allclose(form.direction, line, rtol=1e-6, atol=1e-6)
        if form.orientation == "left":
            stack, line = stack.swapaxes(1, 2), line.T
        rank = references.leaf_rank(stack.shape[1:], 3)
        history, gammas = state.report.histories[name], state.report.gammas[name]
        wanted.never_rises(history, state.report.energies[name])
        sweeps = min(4, (len(history) - 1) // 2)
        want, want_gammas = wanted.affine(stack, line, rank, sweeps)
        energy = state.report.energies[name]
        np.testing.assert_allclose(
            history[: 2 * sweeps + 1], want, rtol=1e-4, atol=1e-9 * energy + 1e-12
        )
        assert gammas.shape == ((len(history) + 1) // 2, len(experts))
        if stack.shape[1] > 1 and len(experts) > 1:
            np.testing.assert_allclose(gammas[: sweeps + 1], want_gammas, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gammas[-1], 1 + np.asarray(form.scales), rtol=1e-6, atol=1e-6)
        # ReTeX is gamma = 1, where it begins.
        np.testing.assert_array_equal(gammas[0], 1)
        assert history[0] == pytest.approx(product.report.optima[name], rel=1e-5, abs=1e-9 * energy)
        assert state.report.residuals[name] <= product.report.residuals[name] + 1e-11 * energy
        assert np.isnan(state.report.optima[name])
    assert np.isnan(state.report.ratio)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_monotone_and_a_fixed_point(rank, seed):
    stack, line = _data(seed=seed)
    solution = affine.solve(stack, line, rank, sweeps=3000, tolerance=1e-13)
    energy = np.sum(stack.astype(np.float64) ** 2)
    wanted.never_rises(solution.history, energy)
    assert solution.history[-1] < solution.history[0] - 1e-3 or rank == 5
    # No small change of any gamma makes it better.
    scales = np.asarray(solution.scales, np.float64)

    def error(scales):
        left = stack - scales[:, None, None] * line.astype(np.float64)
        return wanted.tail(left.reshape(-1, 5), rank)

    least = error(scales)
    assert solution.residual == pytest.approx(least, rel=1e-6, abs=1e-12 * energy)
    for task in range(3):
        for step in (-1e-2, 1e-2):
            assert error(scales + step * np.eye(3)[task]) >= least - 1e-9 * energy


def test_experts_that_are_affine_are_recovered():
    rng = np.random.default_rng(0)
    line = rng.normal(size=(8, 7)).astype(np.float32)
    shared = rng.normal(size=(2, 7))
    scales = np.array([0.5, -1.0, 2.0, 0.0])
    stack = scales[:, None, None] * line + 0.1 * rng.normal(size=(4, 8, 2)) @ shared
    solution = affine.solve(stack.astype(np.float32), line, 2, sweeps=2000, tolerance=1e-12)
    assert solution.residual <= 1e-6 * solution.energy
    np.testing.assert_allclose(solution.scales, scales, atol=1e-2)


@pytest.mark.parametrize("kind", ["no offsets", "no direction", "direction in the rows of S"])
def test_degenerate_data(kind):
    stack, line = _data()
    if kind == "no offsets":
        stack = np.zeros_like(stack)
    elif kind == "no direction":
        line = np.zeros_like(line)
    rank = 5 if "rows" in kind else 2
    solution = affine.solve(stack, line, rank)
    assert np.isfinite(solution.history).all()
    assert np.isfinite(solution.gammas).all()
    if kind != "no offsets":
        _, least = references.low_rank(stack, rank)
        assert solution.residual == pytest.approx(least, rel=1e-5, abs=1e-10)
        np.testing.assert_array_equal(solution.scales, 0)
    else:
        assert solution.residual == 0


def test_theta_0_is_counted():
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts)
    plain = RETEX.fit(expert_set(pretrained, experts), rank=3, base=state.merged)
    matrices = [leaf for name, leaf in pretrained.items() if name in references.FLAX_MATRICES]
    theta_0 = sum(leaf.nbytes for leaf in matrices)
    more = RETEX.extra_bytes(state) - RETEX.extra_bytes(plain)
    assert more == theta_0 + 4 * 8 * len(matrices)
    # All but what has fewer than two axes.
    assert theta_0 > 0.9 * tree.param_bytes(state.merged)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stores_theta_0_in_its_own_dtype(dtype):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    state = _fit(pretrained, experts)
    form = state.offsets["dense/kernel"]
    assert form.direction.dtype == dtype
    assert form.generator.dtype == form.scales.dtype == jnp.float32
    found = references.flat(RETEX.recover(state, 1))
    assert found["dense/kernel"].dtype == dtype
    # The factors make up for its rounding: the report is of what is stored.
    stored = wanted.stored_offset(state, "dense/kernel", np.eye(2)[1])
    base = references.flat(state.merged)["dense/kernel"].astype(np.float64)
    np.testing.assert_allclose(
        found["dense/kernel"].astype(np.float64), base + stored.T, rtol=1e-2, atol=1e-2
    )
    tensors, facts = to_tensors(state.offsets)
    again = from_tensors(tensors, facts)
    assert again["dense/kernel"].direction.dtype == dtype


def test_torch_layout():
    pretrained, experts = references.flax_model(2)
    models = [references.as_torch(model) for model in (pretrained, *experts)]
    models = [{key.replace(".", "/"): leaf for key, leaf in m.items()} for m in models]
    views = {key.replace(".", "/"): view for key, view in references.TORCH_MATRICES.items()}
    state = _fit(models[0], models[1:], "torch")
    wanted.check_state(state, RETEX.recover, models[1:], views)


def test_the_pretrained_model_is_needed():
    _, experts = references.few_leaves(2)
    made = rtx.ExpertSet.from_trees(None, list(map(references.nested, experts)))
    with pytest.raises(ValueError, match="pretrained: got None"):
        RETEX.fit(made, form="affine", rank=3)


def test_traced_tasks_and_tensors():
    state = _fit(*references.few_leaves(2), orientation="auto")
    compiled = jax.jit(RETEX.recover)(state, jnp.int32(1))
    assert_close(compiled, references.flat(RETEX.recover(state, 1)), 1e-6, 1e-6)
    tensors, facts = to_tensors(state.offsets)
    again = from_tensors({key: np.asarray(leaf) for key, leaf in tensors.items()}, facts)
    assert jax.tree.structure(again) == jax.tree.structure(state.offsets)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(state.offsets), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    pretrained = {"a/kernel": rng.normal(size=(16, 8)), "b/bias": rng.normal(size=8)}
    pretrained = {name: leaf.astype(np.float32) for name, leaf in pretrained.items()}
    experts = [
        {k: (v + 0.1 * rng.normal(size=v.shape)).astype(np.float32) for k, v in pretrained.items()}
        for _ in range(3)
    ]
    options = {"base": "weight_average", "sweeps": 5}
    found = _fit(place_on_8_devices(pretrained), list(map(place_on_8_devices, experts)), **options)
    want = _fit(pretrained, experts, **options)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-6)
    for task in range(3):
        assert_close(RETEX.recover(found, task), references.flat(RETEX.recover(want, task)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweeps": 0, "tolerance": 2.0}, "sweeps: got 0.*tolerance: got 2.0"),
        ({"task_rank": 2}, "task_rank: got 2 with form = 'affine'"),
        ({"task_weights": "energy"}, "task_weights: got 'energy' with form = 'affine'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(2), **options)
