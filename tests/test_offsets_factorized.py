import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_offsets as wanted
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set

import retex_jax as rtx
from retex_jax.offsets import factorized
from retex_jax.offsets.forms import Factorized, Product
from retex_jax.offsets.serialization import from_tensors, to_tensors

RETEX = rtx.METHODS["retex"]
EASY = {"form": "factorized", "rank": 4, "task_rank": 2}


def _fit(pretrained, experts, layout="flax", **options):
    return RETEX.fit(expert_set(pretrained, experts, layout=layout), **{**EASY, **options})


def _stack(num_tasks=4, rows=9, columns=7, seed=0):
    return np.random.default_rng(seed).normal(size=(num_tasks, rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("model", "orientation"),
    [
        ("2 tasks, all leaves", "right"),
        ("2 tasks, all leaves", "left"),
        ("1 task", "auto"),
        ("8 tasks", "right"),
        ("8 tasks", "auto"),
    ],
)
def test_every_leaf(model, orientation):
    pretrained, experts = MODELS[MODEL_IDS.index(model)]
    state = _fit(pretrained, experts, orientation=orientation, base="ties")
    wanted.check_state(state, RETEX.recover, experts, references.FLAX_MATRICES)
    wanted.check_mixture(state, RETEX.mix, RETEX.recover, len(experts))
    base = references.flat(state.merged)
    for name, form in state.offsets.items():
        if name not in references.FLAX_MATRICES:
            assert state.report.optima[name] == state.report.residuals[name] == 0
            continue
        stack = wanted.offsets_of(base, experts, name, references.FLAX_MATRICES)
        rank = references.leaf_rank(stack.shape[1:], 4)
        if rank <= 2:
            assert isinstance(form, Product)
            assert name not in state.report.histories
            continue
        assert isinstance(form, Factorized)
        if form.orientation == "left":
            stack = stack.swapaxes(1, 2)
        num_tasks, rows, columns = stack.shape
        assert form.left.shape == (num_tasks, rows, 2)
        assert form.right.shape == (num_tasks, 2, rank)
        assert form.shared.shape == (rank, columns)
        history = state.report.histories[name]
        wanted.never_rises(history, state.report.energies[name])
        want = wanted.factorized(stack, rank, 2, (len(history) - 1) // 2)
        # The data is the float32 difference, the reference's of float64.
        np.testing.assert_allclose(history, want, rtol=1e-5, atol=1e-9)
        assert state.report.residuals[name] == pytest.approx(want[-1], rel=1e-5, abs=1e-9)
        bound = max(
            wanted.tail(stack.reshape(-1, columns), rank),
            sum(wanted.tail(matrix, 2) for matrix in stack),
        )
        assert state.report.optima[name] == pytest.approx(bound, rel=1e-5, abs=1e-9)
        assert state.report.residuals[name] >= bound * (1 - 1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rank", "task_rank"), [(6, 1), (6, 4), (3, 2), (7, 6)])
def test_monotone_and_converged(rank, task_rank, seed):
    stack = _stack(seed=seed)
    solution = factorized.solve(jnp.asarray(stack), rank, task_rank, tolerance=1e-12, sweeps=2000)
    history = solution.history
    wanted.never_rises(history, np.sum(stack.astype(np.float64) ** 2))
    assert history[-3] - history[-1] <= 1e-12 * history[-3], "it stopped early"
    # A fixed point: neither step makes it better.
    one_more = factorized.solve(jnp.asarray(stack), rank, task_rank, tolerance=0, sweeps=1)
    assert len(one_more.history) == 3
    product = np.asarray(solution.left, np.float64) @ np.asarray(solution.right, np.float64)
    shared = np.asarray(solution.shared_factor, np.float64)
    best = np.linalg.lstsq(product.reshape(-1, rank), stack.reshape(-1, 7), rcond=None)[0]
    error = np.sum((stack - product @ best) ** 2)
    assert error == pytest.approx(solution.residual, rel=1e-6)
    assert solution.residual == pytest.approx(np.sum((stack - product @ shared) ** 2), rel=1e-9)
    for matrix, factor in zip(stack.astype(np.float64), product, strict=True):
        # Rows of S are orthonormal, so that a task's own best factor is a truncated SVD.
        np.testing.assert_allclose(
            factor, wanted.truncated(matrix @ shared.T, task_rank), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("num_tasks", "task_rank"), [(1, 3), (2, 3), (3, 2)])
def test_the_bound_is_reached_where_s_holds_all_tasks(num_tasks, task_rank):
    stack = _stack(num_tasks)
    solution = factorized.solve(jnp.asarray(stack), 6, task_rank)
    least = sum(wanted.tail(matrix.astype(np.float64), task_rank) for matrix in stack)
    assert 1 - 1e-6 <= solution.residual / least <= 1.0001


def test_full_task_rank_is_the_closed_form():
    stack = _stack()
    solution = factorized.solve(jnp.asarray(stack), 4, 4)
    _, least = references.low_rank(stack, 4)
    assert 1 - 1e-6 <= solution.residual / least <= 1.0001
    np.testing.assert_allclose(solution.history, least, rtol=1e-9)


@pytest.mark.parametrize("kind", ["zero", "deficient", "one task is zero"])
def test_degenerate_offsets(kind):
    stack = np.zeros((3, 6, 5), np.float32)
    if kind == "deficient":
        rng = np.random.default_rng(0)
        stack = (rng.normal(size=(3, 6, 1)) @ rng.normal(size=(1, 5))).astype(np.float32)
    elif kind == "one task is zero":
        stack[1:] = _stack(2, 6, 5)
    solution = factorized.solve(jnp.asarray(stack), 4, 2)
    assert np.isfinite(solution.history).all()
    wanted.never_rises(solution.history, np.sum(stack.astype(np.float64) ** 2))
    product = np.asarray(solution.left) @ np.asarray(solution.right) @ solution.shared_factor
    if kind == "one task is zero":
        assert not np.any(product[0])
    else:
        np.testing.assert_allclose(product, stack, rtol=1e-5, atol=1e-6)


def test_the_range_finder_takes_over():
    stack = np.stack([_stack(1, 12, 40, seed)[0] for seed in range(4)])
    rows = np.linalg.svd(stack.reshape(-1, 40), full_matrices=False)[2]
    stack = (stack @ rows.T * 0.6 ** np.arange(40)) @ rows  # a spectrum with gaps
    large = factorized.solve(jnp.asarray(stack), 6, 2, max_gram=8)
    small = factorized.solve(jnp.asarray(stack), 6, 2)
    assert large.residual == pytest.approx(small.residual, rel=1e-4)


def test_bytes_are_those_of_the_factors():
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts)
    floats = 8 * 8  # the identity
    for name, leaf in pretrained.items():
        if name in references.FLAX_MATRICES:
            a, b = references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
            floats += 8 * (a * 2 + 2 * 4) + 4 * b
        elif references.is_float(leaf):
            floats += 8 * leaf.size + 1
    assert RETEX.extra_bytes(state) == 4 * floats


def test_torch_layout():
    pretrained, experts = references.flax_model(2)
    models = [references.as_torch(model) for model in (pretrained, *experts)]
    models = [{key.replace(".", "/"): leaf for key, leaf in m.items()} for m in models]
    state = _fit(models[0], models[1:], "torch")
    twin = _fit(pretrained, experts)
    views = {key.replace(".", "/"): view for key, view in references.TORCH_MATRICES.items()}
    wanted.check_state(state, RETEX.recover, models[1:], views)
    for ours, theirs in [("conv/weight", "conv/kernel"), ("dense/weight", "dense/kernel")]:
        assert state.report.residuals[ours] == pytest.approx(
            twin.report.residuals[theirs], rel=1e-5
        )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    state = _fit(pretrained, experts)
    recovered = references.flat(RETEX.recover(state, 1))
    for name, leaf in pretrained.items():
        assert recovered[name].dtype == leaf.dtype
    assert state.offsets["dense/kernel"].left.dtype == jnp.float32


def test_traced_tasks():
    state = _fit(*references.few_leaves(2))
    compiled = jax.jit(RETEX.recover)(state, jnp.int32(1))
    assert_close(compiled, references.flat(RETEX.recover(state, 1)), 1e-6, 1e-6)


def test_tensors_and_back():
    state = _fit(*references.few_leaves(2), orientation="auto")
    tensors, facts = to_tensors(state.offsets)
    again = from_tensors({key: np.asarray(leaf) for key, leaf in tensors.items()}, facts)
    assert jax.tree.structure(again) == jax.tree.structure(state.offsets)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(state.offsets), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    pretrained = {"a/kernel": rng.normal(size=(16, 24)), "b/bias": rng.normal(size=8)}
    pretrained = {name: leaf.astype(np.float32) for name, leaf in pretrained.items()}
    experts = [
        {k: (v + 0.1 * rng.normal(size=v.shape)).astype(np.float32) for k, v in pretrained.items()}
        for _ in range(3)
    ]
    found = _fit(place_on_8_devices(pretrained), list(map(place_on_8_devices, experts)))
    want = _fit(pretrained, experts)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-6)
    for task in range(3):
        assert_close(RETEX.recover(found, task), references.flat(RETEX.recover(want, task)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_rank": None}, "task_rank: got None, expected an integer from 1 to 3"),
        ({"task_rank": 4}, "task_rank: got 4"),
        ({"task_rank": 0}, "task_rank: got 0"),
        ({"task_rank": True}, "task_rank: got True"),
        ({"form": "product"}, "task_rank: got 2 with form = 'product'"),
        ({"form": "tensor"}, r"form: got 'tensor', expected one of \('product'"),
        ({"sweeps": 0}, "sweeps: got 0"),
        ({"tolerance": -1.0}, "tolerance: got -1"),
        ({"sweep": 3}, "sweep: no such option.*did you mean 'sweeps'"),
        ({"bits": 4}, "bits: no such option"),
        ({"d_emb": 2}, "d_emb: got 2, which solver 'exact' takes with form 'product'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(2), **options)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match=r"(?s)budget.*task_weights.*task_rank.*d_emb"):
        _fit(*references.few_leaves(2), rank=None, budget=0.1, task_weights="energy", task_rank=0,
             d_emb=0)  # fmt: skip
