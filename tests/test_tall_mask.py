import jax
import ml_dtypes
import numpy as np
import pytest
import references
import references_masks
from references_masks import MODELS, assert_close, assert_like

import retex_jax as rtx
from retex_jax.personalized import tall_mask


def _fit(pretrained, experts, **options):
    trees = [references.nested(expert) for expert in experts]
    return tall_mask.fit(rtx.ExpertSet.from_trees(references.nested(pretrained), trees), **options)


def _recover(state, task):
    return references.flat(tall_mask.recover(state, task))


def _reference(pretrained, experts, lambdas, coefficient=1.0):
    multi, keeps = references_masks.tall_mask(pretrained, experts, lambdas, coefficient)
    return [
        references_masks.plus(pretrained, {name: keep[name] * multi[name] for name in multi})
        for keep in keeps
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("mask_lambda", "coefficient"), [(0.25, 1.0), (0.5, 1.0), (0.5, 0.25)])
def test_against_the_definition(model, mask_lambda, coefficient):
    # A lambda that is a power of two, as the grid models tie exactly.
    pretrained, experts = MODELS[model]
    state = _fit(pretrained, experts, mask_lambda=mask_lambda, coefficient=coefficient)
    want = _reference(pretrained, experts, [mask_lambda] * len(experts), coefficient)
    for task, expert in enumerate(want):
        assert_close(_recover(state, task), expert)


def test_by_hand():
    pretrained = {"a": np.float32([0, 0, 0, 0, 10])}
    experts = [
        {"a": np.float32([2, 3, -1, 2, 14])},
        {"a": np.float32([1.5, -1, 0, -2, 15])},
    ]
    # tau_MT is 3.5, 2, -1, 0, 9. The masks of task 1 are those of |tau| > .5 |tau_MT - tau|.
    state = _fit(pretrained, experts, mask_lambda=0.5)
    np.testing.assert_array_equal(_recover(state, 0)["a"], [3.5, 2, -1, 0, 19])
    np.testing.assert_array_equal(_recover(state, 1)["a"], [3.5, 0, 0, 0, 19])
    np.testing.assert_array_equal(state.masks["a"], [[0b11111000], [0b10011000]])


def test_each_task_has_its_lambda():
    pretrained, experts = references.few_leaves(8)
    lambdas = [0.2, 0.3, 0.4, 0.5, 0.6, 1.0, 2.0, 5.0]
    state = _fit(pretrained, experts, mask_lambda=lambdas)
    for task, expert in enumerate(_reference(pretrained, experts, lambdas)):
        assert_close(_recover(state, task), expert)
        alone = _fit(pretrained, experts, mask_lambda=lambdas[task])
        assert_close(_recover(alone, task), _recover(state, task), rtol=0, atol=0)


def test_defaults():
    pretrained, experts = references.few_leaves(2)
    want = _reference(pretrained, experts, [0.4, 0.4])
    assert_close(_recover(_fit(pretrained, experts), 1), want[1])


def test_task_vectors_are_compared_not_experts():
    # Masks that compared |theta_0 - tau_t| would keep everything where theta_0 is large.
    pretrained, experts = references.few_leaves(8)
    far = {k: v + 100 if references.is_float(v) else v for k, v in pretrained.items()}
    moved = [
        {k: v + 100 if references.is_float(v) else v for k, v in expert.items()}
        for expert in experts
    ]
    near, away = _fit(pretrained, experts, mask_lambda=0.6), _fit(far, moved, mask_lambda=0.6)
    count = sum(leaf.size for leaf in pretrained.values() if references.is_float(leaf))

    def density(state):
        masks = state.masks.values()
        return sum(np.unpackbits(np.asarray(mask)).sum() for mask in masks) / (8 * count)

    assert 0.2 < density(near) < 0.6
    assert abs(density(near) - density(away)) < 0.01


@pytest.mark.parametrize("mask_lambda", [0.0, 0.4, 100.0])
def test_one_task_gives_the_expert(mask_lambda):
    for model in (references.few_leaves, references.grid_model):
        pretrained, experts = model(1)
        state = _fit(pretrained, experts, mask_lambda=mask_lambda)
        assert_close(_recover(state, 0), experts[0], 1e-6, 1e-6)


def test_coefficient_0_gives_the_pretrained_model():
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts, coefficient=0.0)
    assert_close(_recover(state, 3), pretrained, rtol=0, atol=0)


def test_order_of_tasks_does_not_matter():
    order = (2, 0, 3, 1, 7, 5, 6, 4)
    pretrained, experts = references.grid_model(8)
    first = _fit(pretrained, experts, mask_lambda=0.5)
    second = _fit(pretrained, [experts[task] for task in order], mask_lambda=0.5)
    for place, task in enumerate(order):
        assert_close(_recover(second, place), _recover(first, task), 1e-6, 1e-6)


def test_bytes():
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts)
    sizes = [leaf.size for leaf in pretrained.values() if references.is_float(leaf)]
    want = 4 * sum(sizes) + 8 * sum(-(-size // 8) for size in sizes)
    assert tall_mask.extra_bytes(state) == want
    assert tall_mask.paper_amr(state) == 0.15625
    assert tall_mask.paper_amr(state) == pytest.approx(want / 8 / (4 * sum(sizes)), rel=0.03)


def test_shapes_dtypes_and_buffers():
    pretrained, experts = references.flax_model(2)
    assert_like(_recover(_fit(pretrained, references_masks.other_buffers(experts)), 1), pretrained)


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(8, dtype=dtype)
    state = _fit(pretrained, experts, mask_lambda=0.5)
    assert all(leaf.dtype == dtype for leaf in state.multi_task_vector.values())
    want = _reference(pretrained, experts, [0.5] * 8)
    for task in range(8):
        found = _recover(state, task)
        assert_like(found, pretrained)
        # The multi-task vector, below 1.5, is rounded once, and the sum once.
        assert_close(found, want[task], rtol=step, atol=step)


def test_float64_is_stored_as_float32():
    pretrained, experts = references.few_leaves(2, dtype=np.float64)
    found = _recover(_fit(pretrained, experts), 0)
    assert found["dense/kernel"].dtype == np.float32
    assert_close(found, _reference(pretrained, experts, [0.4, 0.4])[0])


def test_wide_integer_buffers_are_kept():
    big = np.array([2**40, -(2**40) - 1], np.int64)
    pretrained = {"a": np.ones((2, 3), np.float32), "big": big}
    found = _recover(_fit(pretrained, [pretrained]), 0)
    np.testing.assert_array_equal(found["big"], big)
    assert found["big"].dtype == np.int64


def test_traced_task_and_jit_equal_eager():
    state = _fit(*references.few_leaves(8))
    compiled = jax.jit(tall_mask.recover)
    for task in range(8):
        found = references.flat(compiled(state, task))
        assert_close(found, _recover(state, task), 1e-6, 1e-6)
    with jax.disable_jit():
        eager = _recover(state, 5)
    assert_close(eager, _recover(state, 5), 1e-6, 1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    pretrained, experts = references_masks.model_for_8_devices()
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    state = _fit(sharded[0], sharded[1:])
    plain = _fit(pretrained, experts)
    for task in range(2):
        assert_close(_recover(state, task), _recover(plain, task))


@pytest.mark.parametrize("bad", [-0.1, np.nan, [0.2], [0.2, np.inf]])
def test_lambdas_must_be_one_number_or_one_a_task(bad):
    with pytest.raises(ValueError, match=r"mask_lambda: got .* or 2 of them"):
        _fit(*references.few_leaves(2), mask_lambda=bad)


def test_coefficient_must_be_finite():
    with pytest.raises(ValueError, match="coefficient: got inf"):
        _fit(*references.few_leaves(2), coefficient=np.inf)


@pytest.mark.parametrize("task", [-1, 2])
def test_task_must_exist(task):
    with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 1"):
        tall_mask.recover(_fit(*references.few_leaves(2)), task)
