"""Tests of the Llama and Qwen2 decoder without any weights, against float64 NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree
from retex_jax.models import rope, stacking

TINY = models.DecoderConfig(
    vocab_size=30,
    width=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    max_length=8,
    qkv_bias=True,
    lm_head="untied",
)
SCANNED = dataclasses.replace(TINY, scan=True)
SCALING = models.RopeScaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=20)


def random_params(config=TINY, seed=0):
    """Random leaves, so that no bias is 0 and no scale 1; cheaper than initialisation."""
    rng = np.random.default_rng(seed)
    expected = models.expected_params(models.Decoder(config))
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


def make_batch():
    ids = np.random.default_rng(0).integers(1, 30, (3, 6)).astype(np.int32)
    mask = (np.arange(6) < np.array([[6], [2], [4]])).astype(np.int32)
    return {"input_ids": ids * mask, "attention_mask": mask}


@functools.partial(jax.jit, static_argnums=(2, 3))
def apply(params, batch, config=TINY, num_layers=None):
    return models.Decoder(config).apply({"params": params}, batch, num_layers=num_layers)


@functools.partial(jax.jit, static_argnums=2)
def lm_logits(params, batch, config=TINY):
    return models.Decoder(config).apply({"params": params}, batch, method="lm_logits")


def reference(params, config, ids):
    """Hidden states after each block and after the final norm of one sequence, float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    size, length = config.head_dim, len(ids)
    shared = config.num_heads // config.num_kv_heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale["scale"]

    def dense(x, layer):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def turn(x, place):
        """Multiplies the pairs (i, i + size / 2), read as complex numbers, by exp(i angle)."""
        angle = place * config.rope_theta ** (-2 * np.arange(size // 2) / size)
        z = (x[: size // 2] + 1j * x[size // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag])

    x = params["token_embedding"]["embedding"][ids]
    states = []
    for i in range(config.num_layers):
        block = params[f"blocks_{i}"]
        y = norm(x, block["norm1"])
        query, key, value = (
            dense(y, block["attention"][name]).reshape(length, -1, size)
            for name in ("query", "key", "value")
        )
        out = np.zeros((length, config.num_heads, size))
        for t in range(length):
            for h in range(config.num_heads):
                group = h // shared
                q = turn(query[t, h], t)
                scores = [q @ turn(key[s, group], s) / math.sqrt(size) for s in range(t + 1)]
                weights = np.exp(scores - np.max(scores))
                out[t, h] = weights / weights.sum() @ value[: t + 1, group]
        x = x + dense(out.reshape(length, -1), block["attention"]["out"])
        y = norm(x, block["norm2"])
        gate = dense(y, block["mlp"]["gate"])
        x = x + dense(
            gate / (1 + np.exp(-gate)) * dense(y, block["mlp"]["up"]), block["mlp"]["down"]
        )
        states.append(x)
    return states, norm(x, params["final_norm"])


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, head_dim=None, width=16, num_kv_heads=1, lm_head="tied"),
        dataclasses.replace(TINY, num_kv_heads=None, qkv_bias=False, rope_theta=50.0),
    ],
    ids=["untied", "tied-one-kv-head", "without-bias"],
)
def test_equals_float64_reference(config):
    params, batch = random_params(config), make_batch()
    features, logits = apply(params, batch, config), lm_logits(params, batch, config)
    head = (
        params["token_embedding"]["embedding"].T
        if config.lm_head == "tied"
        else params["lm_head"]["kernel"]
    )
    for b, length in enumerate((6, 2, 4)):
        states, final = reference(params, config, batch["input_ids"][b, :length])
        for i, state in enumerate(states):
            want = state.mean(0)
            np.testing.assert_allclose(features.layers[i, b], want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(features.pooled[b], final[-1], rtol=1e-4, atol=1e-4)
        want = final @ np.asarray(head, np.float64)
        np.testing.assert_allclose(logits[b, :length], want, rtol=1e-4, atol=1e-4)


def test_leaf_names_and_shapes():
    config = dataclasses.replace(TINY, num_layers=1)
    expected = tree.flatten(models.expected_params(models.Decoder(config)))
    block = {
        "attention/query/kernel": (12, 24),
        "attention/query/bias": (24,),
        **{f"attention/{name}/kernel": (12, 12) for name in ("key", "value")},
        **{f"attention/{name}/bias": (12,) for name in ("key", "value")},
        "attention/out/kernel": (24, 12),
        "norm1/scale": (12,),
        "norm2/scale": (12,),
        "mlp/gate/kernel": (12, 20),
        "mlp/up/kernel": (12, 20),
        "mlp/down/kernel": (20, 12),
    }
    shapes = {
        "token_embedding/embedding": (30, 12),
        "final_norm/scale": (12,),
        "lm_head/kernel": (12, 30),
        **{f"blocks_0/{name}": shape for name, shape in block.items()},
    }
    assert {name: x.shape for name, x in expected.items()} == shapes
    del shapes["lm_head/kernel"]
    for head in ("tied", "none"):
        model = models.Decoder(dataclasses.replace(config, lm_head=head))
        assert tree.flatten(models.expected_params(model)).keys() == shapes.keys()


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (models.QWEN2_0_5B, 494_032_768),
        (models.LLAMA_3_2_1B, 1_235_814_400),
        (models.SMOLLM2_135M, 134_515_008),
        (models.QWEN_14B, 14_167_290_880),
    ],
)
def test_presets_have_the_published_sizes(config, want):
    shapes = jax.tree.leaves(models.expected_params(models.Decoder(config)))
    assert sum(math.prod(x.shape) for x in shapes) == want


def test_initialised_parameters_give_logits():
    config = dataclasses.replace(TINY, num_layers=1)
    params = models.init_params(models.Decoder(config), jax.random.key(0))
    logits = lm_logits(params, make_batch(), config)
    assert np.isfinite(logits).all() and np.std(logits) > 1e-3
    np.testing.assert_array_equal(params["final_norm"]["scale"], np.ones(12))


def test_features_need_no_head():
    params, batch = random_params(), make_batch()
    want = apply(params, batch)
    del params["lm_head"]
    config = dataclasses.replace(TINY, lm_head="none")
    np.testing.assert_array_equal(apply(params, batch, config).pooled, want.pooled)
    with pytest.raises(ValueError, match="lm_head='none'"):
        lm_logits(params, batch, config)


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


def test_a_row_without_tokens_is_zero_and_harmless():
    params, batch = random_params(), make_batch()
    batch["attention_mask"][1] = 0
    got = apply(params, batch)
    np.testing.assert_array_equal(got.pooled[1], np.zeros(12))
    grads = jax.grad(lambda p: jnp.sum(apply(p, batch).pooled ** 2))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.any(grads["blocks_0"]["attention"]["key"]["kernel"])


def test_scanned_equals_unrolled():
    params, batch = random_params(), make_batch()
    stacked = stacking.stack_blocks(params)
    expected = models.expected_params(models.Decoder(SCANNED))
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda x: x.shape, expected)
    for depth in (None, 2):
        want = apply(params, batch, num_layers=depth)
        got = apply(stacked, batch, SCANNED, depth)
        np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)
        if depth is None:
            np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
        else:
            assert got.pooled is None and want.pooled is None
    want = lm_logits(params, batch)
    np.testing.assert_allclose(lm_logits(stacked, batch, SCANNED), want, rtol=1e-5, atol=1e-5)


def test_low_precision_activations():
    params, batch = random_params(), make_batch()
    config = dataclasses.replace(TINY, dtype="bfloat16")
    got, logits = apply(params, batch, config), lm_logits(params, batch, config)
    assert got.pooled.dtype == got.layers.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(got.pooled, apply(params, batch).pooled, atol=0.1)
    assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16)))


def test_rotated_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))
    frequency = rope.frequencies(6, 100.0)

    def product(q, k):
        turned = (
            rope.rotate(x, rope.angles(jnp.array([[place]]), frequency))
            for x, place in ((query, q), (key, k))
        )
        return float(jnp.sum(jnp.multiply(*turned)))

    assert product(7, 3) == pytest.approx(product(14, 10), abs=1e-5)
    assert product(0, 0) == pytest.approx(float(jnp.sum(query * key)), abs=1e-5)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_rope_scaling_keeps_short_and_stretches_long_wavelengths():
    theta, size = 100.0, 8
    plain, scaled = rope.frequencies(size, theta), rope.frequencies(size, theta, SCALING)
    # Wavelengths 2 pi 100^(i/4): 6.3, 19.9, 62.8, 199; short is below 20 / 4, long above 20.
    middle = (20 / (2 * math.pi) - 1) / 3
    want = [
        middle + (1 - middle) / 8,
        (20 * 100**-0.25 / (2 * math.pi) - 1) / 3 * (7 / 8) + 1 / 8,
        1 / 8,
        1 / 8,
    ]
    np.testing.assert_allclose(scaled / plain, want, rtol=1e-5)
    wide = dataclasses.replace(SCALING, original_max_length=1000)
    np.testing.assert_allclose(rope.frequencies(size, theta, wide)[:3], plain[:3], rtol=1e-6)


def test_rope_scaling_reaches_the_model():
    params, batch = random_params(), make_batch()
    config = dataclasses.replace(TINY, rope_scaling={"factor": 8.0, "original_max_length": 20})
    assert config.rope_scaling == SCALING
    changed = np.abs(lm_logits(params, batch, config) - lm_logits(params, batch)).max(axis=(0, 2))
    assert changed[0] == 0 and changed[5] > 1e-3


def test_config_lists_all_problems():
    with pytest.raises(ValueError, match="DecoderConfig") as error:
        models.DecoderConfig(num_heads=6, num_kv_heads=4, width=10, lm_head="own", rope_theta=0)
    for part in (
        "num_kv_heads=4: expected a divisor of num_heads=6",
        "width=10: expected a multiple of num_heads=6",
        "head_dim=1: expected an even number",
        "rope_theta=0: expected a positive number",
        "lm_head='own': expected 'tied', 'untied' or 'none'",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="head_dim=0: expected a positive integer"):
        models.DecoderConfig(head_dim=0)
    with pytest.raises(ValueError, match=r"factor=0: .*; high_freq_factor=1: expected more than"):
        models.RopeScaling(0, high_freq_factor=1)


def test_config_fills_in_what_follows():
    config = models.DecoderConfig(width=64, num_heads=4)
    assert (config.num_kv_heads, config.head_dim, config.feature_dim) == (4, 16, 64)
    assert hash(config) == hash(dataclasses.replace(config, num_kv_heads=4, head_dim=16))
