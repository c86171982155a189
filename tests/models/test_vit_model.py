"""Tests of the vision transformer without any weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree
from retex_jax.models import vit

TINY = models.ViTConfig(
    image_size=8, patch_size=4, width=12, num_layers=3, num_heads=2, mlp_dim=20, layer_scale=True
)


def random_params(config=TINY, seed=0):
    """Random leaves, so that no bias is 0 and no scale 1; cheaper than initialisation."""
    rng = np.random.default_rng(seed)
    expected = models.expected_params(models.ViT(config))
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


def images(n=2, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(config, params, image, num_layers=None):
    return models.ViT(config).apply({"params": params}, {"image": image}, num_layers=num_layers)


def count(config):
    return sum(
        math.prod(x.shape) for x in jax.tree.leaves(models.expected_params(models.ViT(config)))
    )


def test_leaf_names_and_shapes():
    config = dataclasses.replace(TINY, num_layers=1, pre_norm=True, projection_dim=5)
    shapes = {
        k: v.shape for k, v in tree.flatten(models.expected_params(models.ViT(config))).items()
    }
    block = {
        **{f"attention/{n}/kernel": (12, 12) for n in ("query", "key", "value", "out")},
        **{f"attention/{n}/bias": (12,) for n in ("query", "key", "value", "out")},
        **{f"norm{n}/{leaf}": (12,) for n in (1, 2) for leaf in ("scale", "bias")},
        **{f"layer_scale{n}": (12,) for n in (1, 2)},
        "mlp/fc1/kernel": (12, 20),
        "mlp/fc1/bias": (20,),
        "mlp/fc2/kernel": (20, 12),
        "mlp/fc2/bias": (12,),
    }
    assert shapes == {
        "patch_embed/kernel": (4, 4, 3, 12),
        "patch_embed/bias": (12,),
        "cls_token": (12,),
        "position_embedding/embedding": (5, 12),
        **{f"{n}/{leaf}": (12,) for n in ("pre_norm", "final_norm") for leaf in ("scale", "bias")},
        "projection/kernel": (12, 5),
        **{f"blocks_0/{k}": v for k, v in block.items()},
    }


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (dataclasses.replace(models.DINOV2_SMALL, image_size=518), 22_056_192),
        (models.CLIP_B32, 87_849_216),
        (models.CLIP_B16, 86_192_640),
        (models.CLIP_L14, 303_966_208),
    ],
)
def test_presets_have_the_published_sizes(config, want):
    assert count(config) == want


def test_patch_embedding_is_the_strided_convolution():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    module = vit.PatchEmbed(4, 5, True, jnp.float32, jnp.float32)
    params = {
        "kernel": rng.normal(size=(4, 4, 3, 5)).astype(np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    got = module.apply({"params": params}, x)
    want = jax.lax.conv_general_dilated(
        x, params["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(got, want.reshape(2, 6, 5) + params["bias"], rtol=1e-5, atol=1e-5)


def test_uint8_is_normalised_and_floats_are_not():
    params = random_params()
    x = images()
    normalised = (x / 255 - np.array(TINY.image_mean)) / np.array(TINY.image_std)
    got = apply(TINY, params, x)
    want = apply(TINY, params, normalised.astype(np.float32))
    np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-4, atol=1e-5)
    other = dataclasses.replace(TINY, image_mean=(0, 0, 0))
    assert np.abs(apply(other, params, x).pooled - got.pooled).max() > 1e-2


@pytest.mark.parametrize("depth", [1, 2])
def test_stopping_early_gives_the_first_layers(depth):
    params = random_params()
    whole, part = apply(TINY, params, images()), apply(TINY, params, images(), num_layers=depth)
    assert whole.layers.shape == (3, 2, 12)
    assert part.pooled is None
    np.testing.assert_array_equal(part.layers, whole.layers[:depth])


def test_stopping_early_reads_no_later_parameter():
    params = random_params()
    del params["blocks_2"], params["final_norm"]
    assert apply(TINY, params, images(), num_layers=2).layers.shape == (2, 2, 12)


def test_a_shorter_model_is_a_prefix_with_the_final_norm():
    params = random_params()
    short = dataclasses.replace(TINY, num_layers=2)
    got = apply(short, {k: v for k, v in params.items() if k != "blocks_2"}, images())
    np.testing.assert_array_equal(got.layers, apply(TINY, params, images()).layers[:2])
    assert got.pooled.shape == (2, 12)


def test_layers_are_means_over_all_tokens():
    # With every residual branch scaled by 0, each hidden state is the embedded input.
    params = random_params()
    for i in range(3):
        for name in ("layer_scale1", "layer_scale2"):
            params[f"blocks_{i}"][name] = jnp.zeros(12)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    patches = vit.PatchEmbed(4, 12, True, jnp.float32, jnp.float32).apply(
        {"params": params["patch_embed"]}, x
    )
    tokens = jnp.concatenate([jnp.tile(params["cls_token"], (2, 1, 1)), patches], axis=1)
    tokens = np.asarray(tokens + params["position_embedding"]["embedding"], np.float64)
    features = apply(TINY, params, x)
    for layer in features.layers:
        np.testing.assert_allclose(layer, tokens.mean(1), rtol=1e-4, atol=1e-5)

    def norm(h):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        return h * params["final_norm"]["scale"] + params["final_norm"]["bias"]

    np.testing.assert_allclose(features.pooled, norm(tokens[:, 0]), rtol=1e-4, atol=1e-5)
    mean = apply(dataclasses.replace(TINY, pool="mean"), params, x).pooled
    np.testing.assert_allclose(mean, norm(tokens[:, 1:]).mean(1), rtol=1e-4, atol=1e-5)


def test_projection_is_applied_to_the_pooled_vector():
    params = random_params()
    kernel = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    projected = apply(
        dataclasses.replace(TINY, projection_dim=5),
        {**params, "projection": {"kernel": kernel}},
        images(),
    )
    plain = apply(TINY, params, images())
    np.testing.assert_allclose(projected.pooled, plain.pooled @ kernel, rtol=1e-4, atol=1e-5)


def test_jit_equals_eager_and_rows_are_independent():
    params = random_params()
    x = images(4)
    jitted = apply(TINY, params, x)
    eager = models.ViT(TINY).apply({"params": params}, {"image": x})
    np.testing.assert_allclose(jitted.pooled, eager.pooled, rtol=1e-5, atol=1e-5)
    changed = x.copy()
    changed[[0, 1, 3]] = 0
    np.testing.assert_allclose(
        apply(TINY, params, changed).pooled[2], jitted.pooled[2], rtol=1e-5, atol=1e-5
    )


def test_initial_parameters_have_the_expected_shapes_and_depend_on_the_key():
    config = dataclasses.replace(TINY, num_layers=1)
    one, two = (models.init_params(models.ViT(config), jax.random.key(k)) for k in (0, 1))
    expected = models.expected_params(models.ViT(config))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), one) == jax.tree.map(
        lambda p: (p.shape, p.dtype), expected
    )
    assert np.any(one["patch_embed"]["kernel"] != two["patch_embed"]["kernel"])
    np.testing.assert_array_equal(one["blocks_0"]["layer_scale1"], np.ones(12))


def test_vmap_over_parameters_equals_a_loop():
    several = [random_params(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *several)
    x = images(3)[:, None]
    got = jax.vmap(lambda p, x: apply(TINY, p, x).pooled)(stacked, x)
    want = jnp.stack([apply(TINY, p, i).pooled for p, i in zip(several, x, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_low_precision_activations():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = random_params(config)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    got, want = apply(config, params, images()), apply(TINY, params, images())
    assert got.pooled.dtype == got.layers.dtype == jnp.float32
    np.testing.assert_allclose(got.pooled, want.pooled, atol=0.1)
    assert not np.array_equal(got.pooled, want.pooled)


def test_param_dtype_is_that_of_every_parameter():
    config = dataclasses.replace(TINY, param_dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(models.expected_params(models.ViT(config)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_gradient_reaches_every_parameter():
    params = random_params()
    grads = jax.grad(lambda p: jnp.sum(apply(TINY, p, images()).pooled ** 2))(params)
    dead = [k for k, g in tree.flatten(grads).items() if not np.any(g)]
    assert dead == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 8, 7, 3), np.uint8), r"shape \(2, 8, 7, 3\), expected \[B, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"expected \[B, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.int32), r"dtype int32, expected uint8 or floating"),
    ],
)
def test_bad_images(image, message):
    params = random_params()
    with pytest.raises(ValueError, match=message):
        apply(TINY, params, image)


def test_config_lists_all_problems():
    with pytest.raises(ValueError, match="ViTConfig") as error:
        models.ViTConfig(image_size=30, width=10, num_heads=3, activation="relu", pool="max")
    for part in (
        "image_size=30: expected a multiple of patch_size=16",
        "width=10: expected a multiple of num_heads=3",
        "activation='relu': expected one of gelu, gelu_tanh, quick_gelu, silu",
        "pool='max'",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="num_layers=0: expected a positive integer"):
        models.ViTConfig(num_layers=0)


def test_config_is_hashable_with_dtype_names_and_lists():
    config = models.ViTConfig(dtype="bfloat16", image_mean=[0, 0, 0])
    assert hash(config) == hash(models.ViTConfig(dtype=jnp.bfloat16, image_mean=(0.0, 0.0, 0.0)))
