import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_masks
from expert_sets import expert_set
from references_masks import MODELS, assert_close, assert_like

from retex_jax.mergers import consensus, task_arithmetic


def _merge(pretrained, experts, **options):
    return references.flat(consensus.fit(expert_set(pretrained, experts), **options))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("mask_lambda", [0.25, 0.5])
def test_against_the_definition(model, k, mask_lambda):
    # A lambda that is a power of two, as the grid models tie exactly.
    pretrained, experts = MODELS[model]
    k = min(k, len(experts))
    lambdas = [mask_lambda] * len(experts)
    want = references_masks.consensus(pretrained, experts, lambdas, k, 0.7)
    assert_close(_merge(pretrained, experts, mask_lambda=mask_lambda, k=k, scaling=0.7), want)


def test_one_lambda_a_task():
    pretrained, experts = references.few_leaves(8)
    lambdas = np.linspace(0.2, 1.6, 8)
    want = references_masks.consensus(pretrained, experts, list(lambdas), 3, 0.3)
    found = _merge(pretrained, experts, mask_lambda=lambdas, k=3)
    assert_close(found, want)
    mean = _merge(pretrained, experts, mask_lambda=lambdas.mean(), k=3)
    assert not np.allclose(found["dense/kernel"], mean["dense/kernel"], atol=1e-3)


def test_defaults():
    pretrained, experts = references.few_leaves(8)
    want = references_masks.consensus(pretrained, experts, [0.4] * 8, 2, 0.3)
    assert_close(_merge(pretrained, experts), want)


def test_by_hand():
    pretrained = {"a": np.float32([0, 0, 0, 0, 10])}
    # tau_MT is 3, 2, -1, 0, 9; |tau_t| against half of |tau_MT - tau_t|:
    # 2 > .5, 1 > 1: 2 masks | 3 > .5, 1 > 1.5 fails: 1 | 1 > .5... 0: 1 | 2 > 1, 2 > 1: 2 | 4 > 2.5, 5 > 2.
    experts = [
        {"a": np.float32([2, 3, -1, 2, 14])},
        {"a": np.float32([1.5, -1, 0, -2, 15])},
    ]
    found = _merge(pretrained, experts, mask_lambda=0.5, k=2, scaling=0.5)
    np.testing.assert_array_equal(found["a"], [1.75, 0, 0, 0, 14.5])
    found = _merge(pretrained, experts, mask_lambda=0.5, k=1, scaling=0.5)
    np.testing.assert_array_equal(found["a"], [1.75, 1, -0.5, 0, 14.5])


def test_equality_is_not_kept():
    vectors = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    masks = consensus.tall_masks(vectors, vectors.sum(axis=0), jnp.asarray([0.5, 0.5]))
    np.testing.assert_array_equal(masks, [[False, False], [True, False]])


@pytest.mark.parametrize("num_tasks", [1, 8])
def test_k_0_is_task_arithmetic(num_tasks):
    pretrained, experts = references.few_leaves(num_tasks)
    want = references.flat(task_arithmetic.fit(expert_set(pretrained, experts), scaling=0.7))
    assert_close(_merge(pretrained, experts, k=0, scaling=0.7), want, 1e-6, 1e-6)


def test_one_task_gives_the_expert():
    pretrained, experts = references.few_leaves(1)
    assert_close(_merge(pretrained, experts, k=1, scaling=1.0), experts[0], 1e-6, 1e-6)


def test_scaling_0_gives_the_pretrained_model():
    pretrained, experts = references.few_leaves(8)
    assert_close(_merge(pretrained, experts, scaling=0.0), pretrained, rtol=0, atol=0)


def test_order_of_tasks_does_not_matter():
    order = (2, 0, 3, 1, 7, 5, 6, 4)
    lambdas = np.linspace(0.2, 0.9, 8)
    for model in (references.few_leaves, references.grid_model):
        pretrained, experts = model(8)
        first = _merge(pretrained, experts, mask_lambda=lambdas)
        permuted = [experts[task] for task in order]
        second = _merge(pretrained, permuted, mask_lambda=lambdas[list(order)])
        assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_shapes_dtypes_and_buffers():
    pretrained, experts = references.flax_model(2)
    assert_like(_merge(pretrained, references_masks.other_buffers(experts)), pretrained)


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(8, dtype=dtype)
    found = _merge(pretrained, experts, mask_lambda=0.5)
    assert_like(found, pretrained)
    want = references_masks.consensus(pretrained, experts, [0.5] * 8, 2, 0.3)
    assert_close(found, want, rtol=step, atol=1e-6)


def test_jit_equals_eager():
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 3)), jnp.float32)
    lambdas = jnp.linspace(0.2, 0.9, 8)
    compiled = consensus.consensus_leaf(vectors, lambdas, 2)
    with jax.disable_jit():
        eager = consensus.consensus_leaf(vectors, lambdas, 2)
    np.testing.assert_allclose(compiled, eager, rtol=1e-6, atol=1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    pretrained, experts = references_masks.model_for_8_devices()
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    found = consensus.fit(expert_set(sharded[0], sharded[1:]))
    assert_close(references.flat(found), _merge(pretrained, experts))
    kernel = found["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(sharded[0]["a/kernel"].sharding, kernel.ndim)


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf, [0.2], [0.2, -1.0], [[0.2, 0.3]]])
def test_lambdas_must_be_one_number_or_one_a_task(bad):
    with pytest.raises(ValueError, match=r"mask_lambda: got .* or 2 of them"):
        _merge(*references.few_leaves(2), mask_lambda=bad)


@pytest.mark.parametrize("k", [-1, 3, 1.5, True, "2"])
def test_k_must_count_tasks(k):
    with pytest.raises(ValueError, match=r"k: got .* 0 to T = 2"):
        _merge(*references.few_leaves(2), k=k)


def test_scaling_must_be_finite():
    with pytest.raises(ValueError, match="scaling: got nan"):
        _merge(*references.few_leaves(2), scaling=np.nan)
