"""Tests of the pieces that both backbones share, against float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax.models import layers


def test_gelu_is_x_times_normal_cdf():
    x = np.linspace(-6, 6, 49)
    want = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x, jnp.float32)), want, atol=1e-6)


def test_quick_gelu_by_hand():
    got = layers.quick_gelu(jnp.array([0.0, 1.0, -2.0]))
    want = [0.0, 1 / (1 + math.exp(-1.702)), -2 / (1 + math.exp(3.404))]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_layer_norm_keeps_precision_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 0.1, (4, 64)).astype(np.float32)
    norm = layers.layer_norm(1e-6, jnp.float32, jnp.float32, None)
    got = norm.apply(norm.init(jax.random.key(0), x), x)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        got, want, atol=2e-3
    )  # float32 spacing at 1000 is 6e-5, the scale 0.1


def attention_reference(params, x, num_heads, real, causal):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)

    def dense(name, y):
        return y @ params[name]["kernel"] + params[name]["bias"]

    tokens, width = x.shape
    out = np.zeros((tokens, width))
    query, key, value = (dense(name, x) for name in ("query", "key", "value"))
    size = width // num_heads
    for h in range(num_heads):
        part = slice(h * size, (h + 1) * size)
        logits = query[:, part] @ key[:, part].T / np.sqrt(size)
        logits[:, ~real] = -np.inf
        if causal:
            logits[np.triu_indices(tokens, 1)] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out[:, part] = weights / weights.sum(1, keepdims=True) @ value[:, part]
    return dense("out", out)


@pytest.mark.parametrize(
    ("masked", "causal"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_attention_equals_float64_reference(masked, causal):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 12)).astype(np.float32)
    real = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool) if masked else np.ones((2, 5), bool)
    module = layers.Attention(num_heads=3, causal=causal)
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    got = module.apply({"params": params}, x, real[:, None, None, :] if masked else None)
    for b in range(2):
        want = attention_reference(params, x[b].astype(np.float64), 3, real[b], causal)
        np.testing.assert_allclose(got[b], want, rtol=1e-4, atol=1e-5)


def test_l2_normalize():
    x = jnp.array([[3.0, -4.0], [0.0, 0.0], [3e-6, 4e-6]], jnp.bfloat16)
    got = layers.l2_normalize(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[0.6, -0.8], [0, 0], [0.6, 0.8]], atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [1, 0, 1], rtol=1e-6)
    grad = jax.grad(lambda x: layers.l2_normalize(x).sum())(jnp.zeros((1, 2)))
    assert np.isfinite(grad).all()


def test_mean_weights():
    real = jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_array_equal(layers.mean_weights(real), [[0.5, 0.5, 0], [0, 0, 0]])


def test_attention_kernels_are_matrices():
    params = layers.Attention(num_heads=3).init(jax.random.key(0), jnp.zeros((1, 2, 12)))["params"]
    assert {name: leaf["kernel"].shape for name, leaf in params.items()} == dict.fromkeys(
        ("query", "key", "value", "out"), (12, 12)
    )


@pytest.mark.parametrize("value", [0, -1, 4])
def test_num_layers_out_of_range(value):
    with pytest.raises(ValueError, match=rf"num_layers={value}: expected None or 1\.\.3"):
        layers.check_num_layers(value, 3)
