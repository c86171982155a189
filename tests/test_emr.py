import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_masks
from references_masks import MODELS, assert_close, assert_like

import retex_jax as rtx
from retex_jax import experts as experts_module
from retex_jax.personalized import emr, masks


def _fit(pretrained, experts, **options):
    trees = [references.nested(expert) for expert in experts]
    return emr.fit(rtx.ExpertSet.from_trees(references.nested(pretrained), trees), **options)


def _recover(state, task):
    return references.flat(emr.recover(state, task))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_against_the_definition(model, variant):
    pretrained, experts = MODELS[model]
    state = _fit(pretrained, experts, variant=variant)
    unified, keeps, rescalers, want = references_masks.emr(pretrained, experts, variant)
    assert_close(state.unified, unified)
    np.testing.assert_allclose(state.rescalers, rescalers, rtol=1e-5)
    for task, expert in enumerate(want):
        assert_close(_recover(state, task), expert)
        for name, keep in keeps[task].items():
            found = masks.unpack(state.masks[name][task], keep.shape)
            np.testing.assert_array_equal(found, keep)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_parts_do_not_change_the_result(variant, monkeypatch):
    pretrained, experts = references.few_leaves(8)
    want = _fit(pretrained, experts, variant=variant)
    monkeypatch.setattr(experts_module, "PART_SIZES", (16,))
    monkeypatch.setattr(emr, "_ROW", 16)
    found = _fit(pretrained, experts, variant=variant)
    np.testing.assert_allclose(found.rescalers, want.rescalers, rtol=1e-6)
    for name, leaf in want.unified.items():
        np.testing.assert_array_equal(found.unified[name], leaf)
        np.testing.assert_array_equal(found.masks[name], want.masks[name])


def test_by_hand():
    pretrained = {"a": np.float32([1, 1, 1, 1]), "b": np.float32([[0, 0]])}
    experts = [
        {"a": np.float32([3, 0, 1, 2]), "b": np.float32([[4, -1]])},
        {"a": np.float32([2, 3, 1, 0]), "b": np.float32([[0, 2]])},
    ]
    # Task vectors 2 -1 0 1 | 4 -1 and 1 2 0 -1 | 0 2; sums 3 1 0 0 | 4 1; the two zero sums elect -1.
    state = _fit(pretrained, experts)
    np.testing.assert_array_equal(state.unified["a"], [2, 2, 0, -1])
    np.testing.assert_array_equal(state.unified["b"], [[4, 2]])
    np.testing.assert_array_equal(state.masks["a"], [[0b10000000], [0b11010000]])
    np.testing.assert_array_equal(state.masks["b"], [[0b10000000], [0b01000000]])
    # Means: (4/4 + 5/2) / (2/4 + 4/2) and (4/4 + 2/2) / (5/4 + 2/2); sums: 9/6 and 6/7.
    np.testing.assert_allclose(state.rescalers, [7 / 5, 8 / 9], rtol=1e-6)
    np.testing.assert_allclose(_recover(state, 0)["a"], [1 + 14 / 5, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(_recover(state, 0)["b"], [[28 / 5, 0]], rtol=1e-6)
    np.testing.assert_allclose(_recover(state, 1)["a"], [25 / 9, 25 / 9, 1, 1 / 9], rtol=1e-6)
    paper = _fit(pretrained, experts, variant="paper")
    np.testing.assert_allclose(paper.rescalers, [9 / 6, 6 / 7], rtol=1e-6)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("num_tasks", [1, 8])
def test_equal_experts_are_recovered(variant, num_tasks):
    for model in (references.few_leaves, references.grid_model):
        pretrained, experts = model(1)
        state = _fit(pretrained, experts * num_tasks, variant=variant)
        np.testing.assert_allclose(state.rescalers, 1, rtol=1e-6)
        assert_close(_recover(state, num_tasks - 1), experts[0], 1e-6, 1e-6)


def test_a_task_that_learned_nothing_gets_the_pretrained_model():
    pretrained, experts = references.few_leaves(2)
    state = _fit(pretrained, [experts[0], pretrained, experts[1]])
    assert float(state.rescalers[1]) == 0
    assert_close(_recover(state, 1), pretrained, rtol=0, atol=0)


def test_rescaling_keeps_the_size_of_a_task_vector():
    pretrained, experts = references.few_leaves(8)
    vectors = references_masks.task_vectors(pretrained, experts)
    for variant, size in (("code", np.mean), ("paper", np.sum)):
        state = _fit(pretrained, experts, variant=variant)
        for task in range(8):
            found = references_masks.task_vectors(pretrained, [_recover(state, task)])
            got = sum(size(np.abs(leaf)) for leaf in found.values())
            want = sum(size(np.abs(leaf[task])) for leaf in vectors.values())
            assert got == pytest.approx(want, rel=1e-5)


def test_variants_agree_on_one_leaf_and_differ_on_many():
    pretrained, experts = references.few_leaves(8)
    many = [_fit(pretrained, experts, variant=v).rescalers for v in ("code", "paper")]
    assert np.max(np.abs(many[0] - many[1])) > 0.01
    one = {"a": pretrained["dense/kernel"]}
    leaf = [{"a": expert["dense/kernel"]} for expert in experts]
    few = [_fit(one, leaf, variant=v).rescalers for v in ("code", "paper")]
    np.testing.assert_allclose(few[0], few[1], rtol=1e-6)


def test_sums_over_large_leaves_are_accurate():
    rng = np.random.default_rng(0)
    experts = [{"a": rng.normal(size=(3000, 300)).astype(np.float32) + 1} for _ in range(2)]
    pretrained = {"a": np.zeros((3000, 300), np.float32)}
    vectors = np.stack([expert["a"].astype(np.float64) for expert in experts])
    sign = np.where(vectors.sum(axis=0) > 0, 1, -1)
    unified = np.maximum(vectors * sign, 0).max(axis=0)
    shared = np.where(vectors * sign > 0, unified, 0).sum(axis=(1, 2))
    want = np.abs(vectors).sum(axis=(1, 2)) / shared
    np.testing.assert_allclose(_fit(pretrained, experts).rescalers, want, rtol=1e-6)


def test_order_of_tasks_does_not_matter():
    order = (2, 0, 3, 1, 7, 5, 6, 4)
    for model in (references.few_leaves, references.grid_model):
        pretrained, experts = model(8)
        first = _fit(pretrained, experts)
        second = _fit(pretrained, [experts[task] for task in order])
        for place, task in enumerate(order):
            assert_close(_recover(second, place), _recover(first, task), 1e-6, 1e-6)


def test_mixing():
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts)
    weights = np.linspace(-0.2, 0.6, 8).astype(np.float32)
    total = {
        name: sum(
            weight * (_recover(state, task)[name].astype(np.float64) - leaf)
            for task, weight in enumerate(weights)
        )
        for name, leaf in pretrained.items()
        if references.is_float(leaf)
    }
    found = references.flat(emr.mix(state, weights))
    assert_close(found, references_masks.plus(pretrained, total))
    one_hot = references.flat(emr.mix(state, jnp.eye(8)[3]))
    assert_close(one_hot, _recover(state, 3), 1e-6, 1e-6)
    nothing = references.flat(emr.mix(state, jnp.zeros(8)))
    assert_close(nothing, pretrained, rtol=0, atol=0)
    compiled = references.flat(jax.jit(emr.mix)(state, weights))
    assert_close(compiled, found, 1e-6, 1e-6)


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 8])
def test_bytes(num_tasks):
    pretrained, experts = references.few_leaves(num_tasks)
    state = _fit(pretrained, experts)
    sizes = [leaf.size for leaf in pretrained.values() if references.is_float(leaf)]
    packed = sum(-(-size // 8) for size in sizes)
    want = 4 * sum(sizes) + num_tasks * packed + 4 * num_tasks
    assert emr.extra_bytes(state) == want
    measured = want / num_tasks / (4 * sum(sizes))
    assert emr.paper_amr(state) == pytest.approx(measured, rel=0.03)
    printed = {1: 1.03125, 2: 0.53125, 7: 0.1741, 8: 0.15625}[num_tasks]  # DTS, tables 1 and 8
    assert emr.paper_amr(state) == pytest.approx(printed, abs=1e-4)


def test_shapes_dtypes_and_buffers():
    pretrained, experts = references.flax_model(2)
    state = _fit(pretrained, references_masks.other_buffers(experts))
    assert_like(_recover(state, 1), pretrained)
    assert_like(references.flat(emr.mix(state, jnp.ones(2))), pretrained)


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(8, dtype=dtype)
    state = _fit(pretrained, experts)
    assert all(leaf.dtype == dtype for leaf in state.unified.values())
    _, _, rescalers, want = references_masks.emr(pretrained, experts, "code")
    np.testing.assert_allclose(state.rescalers, rescalers, rtol=1e-5)
    for task in range(8):
        found = _recover(state, task)
        assert_like(found, pretrained)
        # The unified vector, below 0.5, is rounded once, and the sum once.
        assert_close(found, want[task], rtol=step, atol=step / 2)


def test_float64_is_stored_as_float32():
    pretrained, experts = references.few_leaves(2, dtype=np.float64)
    found = _recover(_fit(pretrained, experts), 0)
    assert found["dense/kernel"].dtype == np.float32
    assert_close(found, references_masks.emr(pretrained, experts, "code")[3][0])


def test_traced_task_and_jit_equal_eager():
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts)
    compiled = jax.jit(emr.recover)
    for task in range(8):
        assert_close(references.flat(compiled(state, task)), _recover(state, task), 1e-6, 1e-6)
    with jax.disable_jit():
        eager = _fit(pretrained, experts)
        assert_close(_recover(eager, 5), references.flat(compiled(state, 5)), 1e-6, 1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    pretrained, experts = references_masks.model_for_8_devices()
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    state, plain = _fit(sharded[0], sharded[1:]), _fit(pretrained, experts)
    np.testing.assert_allclose(state.rescalers, plain.rescalers, rtol=1e-6)
    for task in range(2):
        assert_close(_recover(state, task), _recover(plain, task))
    mixed = [references.flat(emr.mix(s, jnp.asarray([0.3, 0.7]))) for s in (state, plain)]
    assert_close(*mixed)


def test_unknown_variant():
    with pytest.raises(ValueError, match="variant: got 'global'"):
        _fit(*references.few_leaves(1), variant="global")


@pytest.mark.parametrize("task", [-1, 2])
def test_task_must_exist(task):
    with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 1"):
        emr.recover(_fit(*references.few_leaves(2)), task)


def test_weights_must_be_one_a_task():
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\), expected \(2,\)"):
        emr.mix(_fit(*references.few_leaves(2)), jnp.ones(3))


@hypothesis.given(
    shape=st.lists(st.integers(1, 5), max_size=4),
    num_tasks=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_masks_pack_to_bits_and_back(shape, num_tasks, seed):
    bits = np.random.default_rng(seed).random((num_tasks, *shape)) < 0.5
    packed = masks.pack(jnp.asarray(bits))
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, np.packbits(bits.reshape(num_tasks, -1), axis=1))
    for task in range(num_tasks):
        found = masks.unpack(packed[task], tuple(shape))
        assert found.dtype == np.bool_
        np.testing.assert_array_equal(found, bits[task])
