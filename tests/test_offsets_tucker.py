import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import references_offsets as wanted
from expert_sets import assert_close, expert_set

import retex_jax as rtx
from retex_jax.offsets import memory, tucker
from retex_jax.offsets.serialization import from_tensors, to_tensors

RETEX = rtx.METHODS["retex"]


def _fit(pretrained, experts, layout="flax", **options):
    options = {"rank": 4, "d_emb": 2, **options}
    return RETEX.fit(expert_set(pretrained, experts, layout=layout), **options)


def _stacks(state, experts, rank=4):
    """D_t by leaf as the solver sees them, and the ranks of the matrices."""
    base = references.flat(state.merged)
    stacks, ranks = {}, {}
    for name, form in state.offsets.items():
        stacks[name] = wanted.offsets_of(base, experts, name, references.FLAX_MATRICES)
        if name in references.FLAX_MATRICES:
            ranks[name] = references.leaf_rank(stacks[name].shape[1:], rank)
            if form.orientation == "left":
                stacks[name] = stacks[name].swapaxes(1, 2)
    return stacks, ranks


@pytest.mark.parametrize(
    ("model", "d_emb", "bias", "orientation"),
    [
        (references.few_leaves(8), 3, True, "right"),
        (references.few_leaves(8), 3, False, "left"),
        (references.few_leaves(8), 6, True, "auto"),
        (references.flax_model(3), 1, True, "right"),
        (references.few_leaves(2), 1, False, "right"),
    ],
)
def test_every_leaf(model, d_emb, bias, orientation):
    pretrained, experts = model
    num_tasks = len(experts)
    state = _fit(pretrained, experts, d_emb=d_emb, bias=bias, orientation=orientation,
                 base="task_arithmetic", base_options={"scaling": 0.1})  # fmt: skip
    wanted.check_state(state, RETEX.recover, experts, references.FLAX_MATRICES)
    wanted.check_mixture(state, RETEX.mix, RETEX.recover, num_tasks)
    entries = d_emb + bias
    assert state.task_embeddings.shape == (num_tasks, entries)
    if bias:
        np.testing.assert_array_equal(state.task_embeddings[:, -1], 1)
    for form in state.offsets.values():
        assert form.generator.shape[0] == entries
    stacks, ranks = _stacks(state, experts)
    (history,) = state.report.histories.values()
    wanted.never_rises(history, state.report.energy)
    want = wanted.tucker(stacks, ranks, d_emb, bias, len(history) // 2)
    np.testing.assert_allclose(history, want, rtol=1e-5)
    assert state.report.residual == pytest.approx(want[-1], rel=1e-5)
    for name, stack in stacks.items():
        gram = np.einsum("txy,sxy->ts", *[stack.reshape(num_tasks, 1, -1)] * 2)
        basis = wanted.embeddings_basis(gram, d_emb, bias)
        bound = np.trace(gram) - np.trace(basis.T @ gram @ basis)
        if name in ranks:
            bound = max(bound, wanted.tail(stack.reshape(-1, stack.shape[-1]), ranks[name]))
        assert state.report.optima[name] == pytest.approx(bound, rel=1e-4, abs=1e-9)
        assert state.report.residuals[name] >= bound * (1 - 1e-5) - 1e-9
    assert state.report.ratio >= 1 - 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_monotone_and_a_fixed_point(seed):
    pretrained, experts = references.few_leaves(8, seed=seed)
    state = _fit(pretrained, experts, tolerance=1e-13, sweeps=2000)
    history = state.report.histories[""]
    wanted.never_rises(history, state.report.energy)
    assert history[-1] < history[0] - 1e-6
    # Neither the best embeddings for these shared factors nor the other way round do better.
    stacks, ranks = _stacks(state, experts)
    embeddings = np.asarray(state.task_embeddings, np.float64)
    basis = np.linalg.qr(embeddings)[0]
    error = by_rows = by_basis = 0.0
    projected = []
    for name, stack in stacks.items():
        found = np.tensordot(basis @ basis.T, stack, 1)
        if name in ranks:
            shared = np.asarray(state.offsets[name].shared, np.float64)
            np.testing.assert_allclose(shared @ shared.T, np.eye(ranks[name]), atol=1e-6)
            mixed = np.tensordot(basis.T, stack, 1).reshape(-1, stack.shape[-1])
            by_rows += np.sum((stack - found) ** 2) + wanted.tail(mixed, ranks[name])
            projected.append((stack @ shared.T).reshape(8, -1))
            found = found @ shared.T @ shared
        else:
            by_rows += np.sum((stack - found) ** 2)
            projected.append(stack.reshape(8, -1))
        error += np.sum((stack - found) ** 2)
    flat = np.hstack(projected)
    best = wanted.embeddings_basis(flat @ flat.T, 2, True)
    by_basis = state.report.energy - np.sum((best.T @ flat) ** 2)
    assert error == pytest.approx(state.report.residual, rel=1e-6)
    assert by_rows == pytest.approx(error, rel=1e-6)
    assert by_basis == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(
    ("num_tasks", "d_emb", "bias"),
    [(1, 1, True), (1, 3, False), (2, 1, True), (8, 7, True), (8, 8, False), (8, 20, True)],
)
def test_large_embeddings_are_the_closed_form(num_tasks, d_emb, bias):
    pretrained, experts = references.few_leaves(num_tasks)
    calls = []
    state = _fit(pretrained, experts, d_emb=d_emb, bias=bias, progress=lambda *x: calls.append(x))
    assert calls and calls[-1][0] == calls[-1][1]
    want = RETEX.fit(expert_set(pretrained, experts), rank=4)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, two)
    assert tucker.is_free(num_tasks, d_emb, bias)


def test_offsets_whose_mean_is_zero_need_no_bias():
    """As weight averaging leaves them: K = T - 1 columns without a bias are the closed form as well."""
    pretrained, experts = references.few_leaves(3)
    last = {
        name: 3 * leaf - experts[0][name] - experts[1][name] if references.is_float(leaf) else leaf
        for name, leaf in pretrained.items()
    }
    experts = [*experts[:2], last]
    state = _fit(pretrained, experts, bias=False)
    want = RETEX.fit(expert_set(pretrained, experts), rank=4)
    assert state.task_embeddings.shape == (3, 2)
    assert state.report.residual == pytest.approx(want.report.residual, rel=1e-4)
    for task in range(3):
        found, wanted_model = (references.flat(RETEX.recover(one, task)) for one in (state, want))
        assert_close(found, wanted_model, 1e-4, 1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_experts_on_a_line_need_one_number_a_task(bias):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 2)), rng.normal(size=(2, 6))
    start = rng.normal(size=(7, 6)) if bias else np.zeros((7, 6))
    pretrained = {"dense/kernel": np.zeros((7, 6), np.float32), "bias": np.zeros(3, np.float32)}
    experts = [
        {
            "dense/kernel": (place * left @ right + (start @ np.linalg.pinv(right) @ right)).astype(
                "f4"
            ),
            "bias": (place * np.ones(3) + bias).astype("f4"),
        }
        for place in (-2.0, -1.0, 0.0, 1.0, 3.0)
    ]
    options = {"base": references.nested(pretrained), "rank": 4, "orientation": "left"}
    state = _fit(pretrained, experts, d_emb=1, bias=bias, tolerance=1e-13, **options)
    assert state.task_embeddings.shape == (5, 1 + bias)
    assert state.report.residual <= 1e-10 * state.report.energy
    for task, expert in enumerate(experts):
        assert_close(RETEX.recover(state, task), expert)


def test_bytes_grow_with_the_embeddings_not_the_tasks():
    sizes = {}
    for num_tasks in (4, 8):
        for d_emb in (1, 2):
            pretrained, experts = references.few_leaves(num_tasks)
            state = _fit(pretrained, experts, d_emb=d_emb, sweeps=1)
            entries, generated, shared = d_emb + 1, 0, 0
            for name, leaf in pretrained.items():
                if name in references.FLAX_MATRICES:
                    a, b = references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
                    generated, shared = generated + a * 4, shared + 4 * b
                elif references.is_float(leaf):
                    generated, shared = generated + leaf.size, shared + 1
            sizes[num_tasks, d_emb] = RETEX.extra_bytes(state)
            assert RETEX.extra_bytes(state) == 4 * (
                num_tasks * entries + entries * generated + shared
            )
            # The constant's column of ones is stored besides.
            found = memory.form_bytes(state.offsets, num_tasks, d_emb)
            assert found.generator == RETEX.extra_bytes(state) - 4 * num_tasks
            assert found.baked == 4 * (num_tasks * generated + shared)
    assert sizes[8, 1] - sizes[4, 1] == 4 * 4 * 2


def test_torch_layout():
    pretrained, experts = references.flax_model(4)
    models = [references.as_torch(model) for model in (pretrained, *experts)]
    models = [{key.replace(".", "/"): leaf for key, leaf in m.items()} for m in models]
    views = {key.replace(".", "/"): view for key, view in references.TORCH_MATRICES.items()}
    state = _fit(models[0], models[1:], "torch")
    wanted.check_state(state, RETEX.recover, models[1:], views)
    # The same leaves in the other layout.
    names = ("conv/kernel", "conv1d/kernel", "dense/kernel", "token/embedding", "dense/bias",
             "scale", "buffers/steps")  # fmt: skip
    parts = [{name: model[name] for name in names} for model in (pretrained, *experts)]
    twin = _fit(parts[0], parts[1:])
    assert state.report.residual == pytest.approx(twin.report.residual, rel=1e-5)


def test_order_of_tasks_does_not_matter():
    pretrained, experts = references.few_leaves(8)
    order = [3, 1, 0, 2, 7, 4, 6, 5]
    options = {"tolerance": 1e-12, "sweeps": 500}
    one = _fit(pretrained, experts, **options)
    two = _fit(pretrained, [experts[task] for task in order], **options)
    assert one.report.residual == pytest.approx(two.report.residual, rel=1e-6)


def test_zero_offsets():
    pretrained, _ = references.few_leaves(4)
    state = _fit(pretrained, [pretrained] * 4)
    assert state.report.residual == state.report.energy == 0
    assert_close(RETEX.recover(state, 2), pretrained, 0, 0)


def test_progress_tensors_and_traced_tasks():
    calls = []
    state = _fit(*references.few_leaves(8), sweeps=3, tolerance=0.0,
                 progress=lambda *call: calls.append(call))  # fmt: skip
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert len(state.report.histories[""]) == 6
    compiled = jax.jit(RETEX.recover)(state, jnp.int32(1))
    assert_close(compiled, references.flat(RETEX.recover(state, 1)), 1e-6, 1e-6)
    tensors, facts = to_tensors(state.offsets)
    again = from_tensors({key: np.asarray(leaf) for key, leaf in tensors.items()}, facts)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(state.offsets), strict=True):
        np.testing.assert_array_equal(one, two)


def test_sharded_equals_one_device(place_on_8_devices):
    pretrained = {"a/kernel": np.zeros((16, 8), "f4"), "b/bias": np.zeros(8, "f4")}
    rng = np.random.default_rng(0)
    experts = [
        {k: (v + 0.1 * rng.normal(size=v.shape)).astype("f4") for k, v in pretrained.items()}
        for _ in range(5)
    ]
    found = _fit(place_on_8_devices(pretrained), list(map(place_on_8_devices, experts)), sweeps=4)
    want = _fit(pretrained, experts, sweeps=4)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-6)
    for task in range(5):
        assert_close(RETEX.recover(found, task), references.flat(RETEX.recover(want, task)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_emb": 0}, "d_emb: got 0, expected an integer"),
        ({"d_emb": 2.0}, "d_emb: got 2.0"),
        ({"d_emb": True}, "d_emb: got True"),
        ({"rank": None, "budget": 0.2}, "d_emb: got 2, which solver 'exact' takes .* without a bu"),
        ({"task_weights": "energy"}, "d_emb: got 2, which solver 'exact' takes"),
        ({"form": "affine"}, "d_emb: got 2, which solver 'exact' takes with form 'product'"),
        ({"form": "shape_shared"}, "d_emb: got 2, which solver 'exact' takes"),
        ({"bits": 8}, "bits: no such option"),
        ({"sweeps": 0}, "sweeps: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(4), **options)
