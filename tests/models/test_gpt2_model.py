"""Tests of GPT-2 without any weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree
from retex_jax.models import stacking

TINY = models.Gpt2Config(
    vocab_size=30, width=12, num_layers=3, num_heads=2, mlp_dim=20, max_length=8
)
SCANNED = dataclasses.replace(TINY, scan=True)


def random_params(seed=0):
    """Random leaves, so that no bias is 0 and no scale 1; cheaper than initialisation."""
    rng = np.random.default_rng(seed)
    expected = models.expected_params(models.Gpt2(TINY))
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


def make_batch():
    ids = np.random.default_rng(0).integers(1, 30, (3, 6)).astype(np.int32)
    mask = (np.arange(6) < np.array([[6], [2], [4]])).astype(np.int32)
    return {"input_ids": ids * mask, "attention_mask": mask}


@functools.partial(jax.jit, static_argnums=(2, 3))
def apply(params, batch, config=TINY, num_layers=None):
    return models.Gpt2(config).apply({"params": params}, batch, num_layers=num_layers)


@functools.partial(jax.jit, static_argnums=2)
def lm_logits(params, batch, config=TINY):
    return models.Gpt2(config).apply({"params": params}, batch, method="lm_logits")


def test_leaf_names_and_shapes():
    config = dataclasses.replace(TINY, num_layers=1)
    expected = tree.flatten(models.expected_params(models.Gpt2(config)))
    block = {
        "attention/qkv/kernel": (12, 36),
        "attention/qkv/bias": (36,),
        "attention/out/kernel": (12, 12),
        "attention/out/bias": (12,),
        **{f"norm{n}/{leaf}": (12,) for n in (1, 2) for leaf in ("scale", "bias")},
        "mlp/fc1/kernel": (12, 20),
        "mlp/fc1/bias": (20,),
        "mlp/fc2/kernel": (20, 12),
        "mlp/fc2/bias": (12,),
    }
    assert {name: x.shape for name, x in expected.items()} == {
        "token_embedding/embedding": (30, 12),
        "position_embedding/embedding": (8, 12),
        "final_norm/scale": (12,),
        "final_norm/bias": (12,),
        **{f"blocks_0/{name}": shape for name, shape in block.items()},
    }


@pytest.mark.parametrize(
    ("config", "want"), [(models.GPT2, 124_439_808), (models.GPT2_MEDIUM, 354_823_168)]
)
def test_presets_have_the_published_sizes(config, want):
    shapes = jax.tree.leaves(models.expected_params(models.Gpt2(config)))
    assert sum(math.prod(x.shape) for x in shapes) == want


def test_padding_changes_nothing():
    params, batch = random_params(), make_batch()
    real = batch["attention_mask"] > 0
    want, want_logits = apply(params, batch), lm_logits(params, batch)
    junk = dict(batch, input_ids=np.where(real, batch["input_ids"], 17))
    longer = {k: np.pad(v, ((0, 0), (0, 2))) for k, v in batch.items()}
    for other in (junk, longer):
        got = apply(params, other)
        np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)
        logits = lm_logits(params, other)[:, :6]
        np.testing.assert_allclose(logits[real], want_logits[real], rtol=1e-5, atol=1e-5)


def test_padding_on_the_left_takes_no_position():
    params, batch = random_params(), make_batch()
    want = apply(params, batch)
    shifted = {k: np.pad(v, ((0, 0), (2, 0))) for k, v in batch.items()}
    got = apply(params, shifted)
    np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one():
    params, batch = random_params(), make_batch()
    later = batch["input_ids"].copy()
    later[0, 3] = (later[0, 3] + 1) % 30
    want, got = lm_logits(params, batch), lm_logits(params, {**batch, "input_ids": later})
    np.testing.assert_array_equal(got[0, :3], want[0, :3])
    assert np.abs(got[0, 3:] - want[0, 3:]).max(axis=-1).min() > 1e-3


def test_pooled_is_the_last_real_token_which_predicts_the_next():
    params, batch = random_params(), make_batch()
    pooled, logits = apply(params, batch).pooled, lm_logits(params, batch)
    assert logits.shape == (3, 6, 30)
    last = np.array([5, 1, 3])
    want = pooled @ params["token_embedding"]["embedding"].T
    np.testing.assert_allclose(logits[np.arange(3), last], want, rtol=1e-5, atol=1e-5)


def test_layers_are_means_over_real_tokens():
    params, batch = random_params(), make_batch()
    got = apply(params, batch).layers[0, 1]
    # Causal: the first token's state is that of the token alone; the mean gives the second's.
    first = apply(params, {k: v[1:2, :1] for k, v in batch.items()}).layers[0, 0]
    second = 2 * got - first
    model = models.Gpt2(dataclasses.replace(TINY, num_layers=1))
    kept = {k: v for k, v in params.items() if k not in ("blocks_1", "blocks_2")}
    logits = model.apply({"params": kept}, batch, method="lm_logits")[1, 1]
    mean, var = second.mean(), second.var()
    normed = (second - mean) / np.sqrt(var + 1e-5)
    normed = normed * params["final_norm"]["scale"] + params["final_norm"]["bias"]
    want = normed @ params["token_embedding"]["embedding"].T
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_a_row_without_tokens_is_zero_and_harmless():
    params, batch = random_params(), make_batch()
    want = apply(params, batch)
    batch["attention_mask"][1] = 0
    got = apply(params, batch)
    np.testing.assert_array_equal(got.pooled[1], np.zeros(12))
    np.testing.assert_array_equal(got.layers[:, 1], np.zeros((3, 12)))
    np.testing.assert_allclose(got.pooled[0], want.pooled[0], rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(apply(p, batch).pooled ** 2))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.any(grads["blocks_0"]["attention"]["qkv"]["kernel"])


def test_stopping_early_gives_the_first_layers_and_reads_no_more():
    params, batch = random_params(), make_batch()
    whole = apply(params, batch)
    del params["blocks_2"], params["final_norm"]
    part = apply(params, batch, num_layers=2)
    assert part.pooled is None
    np.testing.assert_array_equal(part.layers, whole.layers[:2])


def test_scanned_equals_unrolled():
    params, batch = random_params(), make_batch()
    stacked = stacking.stack_blocks(params)
    expected = models.expected_params(models.Gpt2(SCANNED))
    shapes = lambda x: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), x)  # noqa: E731
    assert shapes(stacked) == shapes(expected)
    for depth in (None, 2):
        want = apply(params, batch, num_layers=depth)
        got = apply(stacked, batch, SCANNED, depth)
        np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)
        if depth is None:
            np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
    want = lm_logits(params, batch)
    np.testing.assert_allclose(lm_logits(stacked, batch, SCANNED), want, rtol=1e-5, atol=1e-5)


def test_low_precision_activations():
    params, batch = random_params(), make_batch()
    config = dataclasses.replace(TINY, dtype="bfloat16")
    got, logits = apply(params, batch, config), lm_logits(params, batch, config)
    assert got.pooled.dtype == got.layers.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(got.pooled, apply(params, batch).pooled, atol=0.1)
    assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros((3, 9), np.int32)}, r"shape \(3, 9\), expected .* L <= 8"),
        ({"input_ids": np.zeros((3, 6), np.float32)}, "dtype float32, expected an integer"),
        ({"attention_mask": np.ones((3, 5), np.int32)}, r"attention_mask: shape \(3, 5\)"),
    ],
)
def test_bad_batches(change, message):
    for function in (apply, lm_logits):
        with pytest.raises(ValueError, match=message):
            function(random_params(), {**make_batch(), **change})


def test_config_lists_all_problems():
    with pytest.raises(ValueError, match=r"width=10: .*; activation='tanh'.*; layer_norm_eps=0"):
        models.Gpt2Config(width=10, num_heads=3, activation="tanh", layer_norm_eps=0)
    with pytest.raises(ValueError, match="max_length=0: expected a positive integer"):
        models.Gpt2Config(max_length=0)
