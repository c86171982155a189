"""Tests of the BERT encoder without any weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree

TINY = models.BertConfig(
    vocab_size=30, width=12, num_layers=3, num_heads=2, mlp_dim=20, max_length=8
)


def random_params(seed=0):
    """Random leaves, so that no bias is 0 and no scale 1; cheaper than initialisation."""
    rng = np.random.default_rng(seed)
    expected = models.expected_params(models.Bert(TINY))
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


def make_batch():
    ids = np.random.default_rng(0).integers(1, 30, (3, 6)).astype(np.int32)
    mask = (np.arange(6) < np.array([[6], [2], [4]])).astype(np.int32)
    return {"input_ids": ids * mask, "attention_mask": mask}


@functools.partial(jax.jit, static_argnums=(2, 3))
def apply(params, batch, config=TINY, num_layers=None):
    return models.Bert(config).apply({"params": params}, batch, num_layers=num_layers)


def test_leaf_names():
    names = set(tree.flatten(models.expected_params(models.Bert(TINY))))
    block = {
        f"attention/{n}/{p}" for n in ("query", "key", "value", "out") for p in ("kernel", "bias")
    }
    block |= {f"norm{n}/{p}" for n in (1, 2) for p in ("scale", "bias")}
    block |= {f"mlp/fc{n}/{p}" for n in (1, 2) for p in ("kernel", "bias")}
    assert names == {
        *(f"{n}_embedding/embedding" for n in ("word", "position", "token_type")),
        "embedding_norm/scale",
        "embedding_norm/bias",
        *(f"blocks_{i}/{name}" for i in range(3) for name in block),
    }


def test_minilm_has_the_published_size():
    shapes = jax.tree.leaves(models.expected_params(models.Bert(models.MINILM_L6)))
    pooler = 384 * 384 + 384
    assert sum(math.prod(x.shape) for x in shapes) + pooler == 22_713_216


def test_padding_changes_nothing():
    params, batch = random_params(), make_batch()
    want = apply(params, batch)
    junk = dict(batch, input_ids=np.where(batch["attention_mask"] > 0, batch["input_ids"], 17))
    longer = {k: np.pad(v, ((0, 0), (0, 2))) for k, v in batch.items()}
    alone = {k: v[1:2, :2] for k, v in batch.items()}
    for other in (junk, longer):
        got = apply(params, other)
        np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply(params, alone).pooled[0], want.pooled[1], rtol=1e-5, atol=1e-5)


def test_a_row_without_tokens_is_zero_and_harmless():
    params, batch = random_params(), make_batch()
    want = apply(params, batch)
    batch["attention_mask"][1] = 0
    got = apply(params, batch)
    np.testing.assert_array_equal(got.pooled[1], np.zeros(12))
    np.testing.assert_allclose(got.pooled[0], want.pooled[0], rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_beside_a_row_without_tokens():
    params, batch = random_params(), make_batch()
    batch["attention_mask"][1] = 0
    grads = jax.grad(lambda p: jnp.sum(apply(p, batch, num_layers=1).layers ** 2))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.any(grads["blocks_0"]["attention"]["query"]["kernel"])


def test_pooled_is_the_last_layer_mean():
    features = apply(random_params(), make_batch())
    assert features.layers.shape == (3, 3, 12)
    np.testing.assert_array_equal(features.pooled, features.layers[-1])


def test_stopping_early_gives_the_first_layers():
    params, batch = random_params(), make_batch()
    whole, part = apply(params, batch), apply(params, batch, num_layers=2)
    assert part.pooled is None
    np.testing.assert_array_equal(part.layers, whole.layers[:2])


def test_token_types_default_to_zero_and_matter():
    params, batch = random_params(), make_batch()
    want = apply(params, batch).pooled
    zeros = apply(params, {**batch, "token_type_ids": np.zeros((3, 6), np.int32)}).pooled
    ones = apply(params, {**batch, "token_type_ids": np.ones((3, 6), np.int32)}).pooled
    np.testing.assert_allclose(zeros, want, rtol=1e-5, atol=1e-5)
    assert np.abs(ones - want).max() > 1e-2


def test_word_order_matters():
    params = random_params()
    batch = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int32)}
    other = {**batch, "input_ids": np.array([[3, 2, 1]])}
    assert np.abs(apply(params, batch).pooled - apply(params, other).pooled).max() > 1e-3


def test_jit_equals_eager():
    params, batch = random_params(), make_batch()
    eager = models.Bert(TINY).apply({"params": params}, batch).pooled
    np.testing.assert_allclose(apply(params, batch).pooled, eager, rtol=1e-5, atol=1e-5)


def test_low_precision_activations():
    params, batch = random_params(), make_batch()
    got = apply(params, batch, dataclasses.replace(TINY, dtype="bfloat16"))
    assert got.pooled.dtype == got.layers.dtype == jnp.float32
    np.testing.assert_allclose(got.pooled, apply(params, batch).pooled, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros((3, 9), np.int32)}, r"shape \(3, 9\), expected .* L <= 8"),
        ({"input_ids": np.zeros((3, 6), np.float32)}, "dtype float32, expected an integer"),
        ({"attention_mask": np.ones((3, 5), np.int32)}, r"attention_mask: shape \(3, 5\)"),
        ({"token_type_ids": np.ones((3, 5), np.int32)}, r"token_type_ids: shape \(3, 5\)"),
    ],
)
def test_bad_batches(change, message):
    with pytest.raises(ValueError, match=message):
        apply(random_params(), {**make_batch(), **change})


def test_config_lists_all_problems():
    with pytest.raises(ValueError, match=r"width=10: .*; activation='tanh'"):
        models.BertConfig(width=10, num_heads=3, activation="tanh")


def test_pool_cls_is_the_first_token_of_the_last_layer():
    params, batch = random_params(), make_batch()
    cls, mean = dataclasses.replace(TINY, pool="cls"), TINY
    got, want = apply(params, batch, cls), apply(params, batch, mean)
    np.testing.assert_array_equal(got.layers, want.layers)
    # Of a single token the mean is the first one; of several it is not.
    one = {name: x[:, :1] for name, x in batch.items()}
    np.testing.assert_allclose(
        apply(params, one, cls).pooled, apply(params, one, mean).pooled, rtol=1e-5, atol=1e-6
    )
    assert np.abs(got.pooled - want.pooled).max() > 1e-2
    part = apply(params, batch, cls, 2)
    assert part.pooled is None


def test_roberta_counts_positions_from_the_row_after_padding():
    config = dataclasses.replace(TINY, padding_idx=1)
    assert config.position_rows == 10
    params, batch = random_params(), make_batch()
    rows = params["position_embedding"]["embedding"]
    shifted = jnp.concatenate([jnp.full((2, 12), 7.0), rows])
    moved = {**params, "position_embedding": {"embedding": shifted}}
    got, want = apply(moved, batch, config), apply(params, batch)
    np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)


def test_roberta_counts_real_tokens_only():
    config = dataclasses.replace(TINY, padding_idx=0)
    params = random_params()
    rows = params["position_embedding"]["embedding"]
    params["position_embedding"]["embedding"] = jnp.concatenate([rows, rows[:1] + 1])
    left = {
        "input_ids": np.array([[0, 0, 5, 6, 7]]),
        "attention_mask": np.array([[0, 0, 1, 1, 1]]),
    }
    right = {name: np.roll(x, -2, axis=1) for name, x in left.items()}
    np.testing.assert_allclose(
        apply(params, left, config).pooled, apply(params, right, config).pooled, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "want"),
    [(models.BERT_BASE, 109_482_240), (models.ROBERTA_BASE, 124_645_632)],
)
def test_base_models_have_the_published_sizes(config, want):
    shapes = jax.tree.leaves(models.expected_params(models.Bert(config)))
    pooler = 768 * 768 + 768
    assert sum(math.prod(x.shape) for x in shapes) + pooler == want


def test_config_of_positions_and_pooling():
    assert models.ROBERTA_BASE.position_rows == 514
    with pytest.raises(ValueError, match=r"padding_idx=-1: .*; pool='max'"):
        models.BertConfig(padding_idx=-1, pool="max")
