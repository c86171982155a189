"""Tests of a whole CLIP and of zero-shot heads without any weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models
from retex_jax.models import zero_shot

VISION = models.ViTConfig(
    image_size=8, patch_size=4, width=12, num_layers=1, num_heads=2, mlp_dim=20, projection_dim=5
)
TEXT = models.ClipTextConfig(
    vocab_size=60,
    width=8,
    num_layers=1,
    num_heads=2,
    mlp_dim=10,
    max_length=8,
    projection_dim=5,
    eos_token_id=59,
)
MODEL = models.Clip(VISION, TEXT)
NAMES = ["cat", "dog", "{}"]
TEMPLATES = ["a {}.", "{} or {}"]


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(MODEL)
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply({"params": params}, batch)


def tokenize(texts):
    """One token a character (the last seven), then the end of text, also as padding."""
    ids = np.full((len(texts), 8), 59, np.int32)
    for row, text in enumerate(texts):
        for column, letter in enumerate(text[-7:]):
            ids[row, column] = ord(letter) % 59
    lengths = np.array([min(len(text), 7) + 1 for text in texts])
    return {"input_ids": ids, "attention_mask": (np.arange(8) < lengths[:, None]).astype(np.int32)}


def images(n=4):
    return np.random.default_rng(1).normal(size=(n, 8, 8, 3)).astype(np.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "want"),
    [
        (models.CLIP_MODEL_B32, 151_277_313),
        (models.CLIP_MODEL_B16, 149_620_737),
        (models.CLIP_MODEL_L14, 427_616_513),
    ],
)
def test_presets_have_the_published_sizes(model, want):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(models.expected_params(model))) == want


def test_logits_are_scaled_cosines_of_the_towers():
    params = random_params()
    assert params.keys() == {"vision", "text", "logit_scale"}
    tokens = tokenize(["cat", "a dog"])
    got = apply(MODEL, params, {"image": images(), **tokens})
    image = apply(models.ViT(VISION), params["vision"], {"image": images()}).pooled
    text = apply(models.ClipText(TEXT), params["text"], tokens).pooled
    want = unit(image) @ unit(text).T * math.exp(params["logit_scale"])
    assert got.shape == (4, 2) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_initial_temperature():
    # Under jit the other parameters are never computed.
    start = jax.jit(lambda key: models.init_params(MODEL, key)["logit_scale"])(jax.random.key(0))
    np.testing.assert_allclose(start, math.log(1 / 0.07), rtol=1e-6)


def test_towers_of_different_spaces():
    with pytest.raises(ValueError, match="images have 5 features, texts 6"):
        models.Clip(VISION, dataclasses.replace(TEXT, projection_dim=6))


def test_normalised_images():
    params = random_params()["vision"]
    config = dataclasses.replace(VISION, normalize=True)
    plain = apply(models.ViT(VISION), params, {"image": images()})
    got = apply(models.ViT(config), params, {"image": images()})
    np.testing.assert_allclose(got.pooled, unit(plain.pooled), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.layers, plain.layers)


def test_zero_shot_head_by_its_definition():
    params = random_params()
    head = models.zero_shot_head(
        models.ClipText(TEXT), params["text"], params["logit_scale"], NAMES, TEMPLATES, tokenize
    )
    for column, name in enumerate(NAMES):
        tokens = tokenize([f"a {name}.", f"{name} or {name}"])
        texts = apply(models.ClipText(TEXT), params["text"], tokens).pooled
        want = unit(unit(texts).mean(0)) * math.exp(params["logit_scale"])
        np.testing.assert_allclose(head["kernel"][:, column], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(head["bias"], np.zeros(3))
    assert head["kernel"].dtype == head["bias"].dtype == jnp.float32


def test_one_template_gives_the_logits_of_clip():
    params = random_params()
    head = models.zero_shot_head(
        models.ClipText(TEXT), params["text"], params["logit_scale"], NAMES, ["a {}."], tokenize
    )
    vision = models.ViT(dataclasses.replace(VISION, normalize=True))
    pooled = apply(vision, params["vision"], {"image": images()}).pooled
    batch = {"image": images(), **tokenize([f"a {name}." for name in NAMES])}
    want = apply(MODEL, params, batch)
    np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"], want, rtol=1e-5, atol=1e-5)


def test_batches_of_one_shape_give_what_one_batch_does(monkeypatch):
    params = random_params()["text"]
    texts = ["a", "bb", "ccc", "dd", "e"]
    want = zero_shot.encode_texts(models.ClipText(TEXT), params, texts, tokenize)
    shapes = []
    encode = zero_shot._encode

    def spy(model, params, tokens):
        shapes.append(tokens["input_ids"].shape)
        return encode(model, params, tokens)

    monkeypatch.setattr(zero_shot, "_encode", spy)
    got = zero_shot.encode_texts(models.ClipText(TEXT), params, texts, tokenize, batch_size=2)
    assert shapes == [(2, 8)] * 3
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_prompts():
    assert zero_shot.make_prompts(NAMES, TEMPLATES) == [
        "a cat.",
        "cat or cat",
        "a dog.",
        "dog or dog",
        "a {}.",
        "{} or {}",
    ]
    with pytest.raises(ValueError, match=r"class_names: got none.*templates\[1\]: 'a dog' has no"):
        zero_shot.make_prompts([], ["{}", "a dog"])
    with pytest.raises(ValueError, match="templates: got none"):
        zero_shot.make_prompts(["cat"], [])


def test_bad_tokens():
    params = random_params()["text"]

    def encode(texts, tokenize, **options):
        return zero_shot.encode_texts(models.ClipText(TEXT), params, texts, tokenize, **options)

    def cut(texts):
        tokens = tokenize(texts)
        tokens["input_ids"][1, :] = 3
        return tokens

    with pytest.raises(ValueError, match="1 texts without token 59, the first 'b'"):
        encode(["a", "b"], cut)
    with pytest.raises(ValueError, match=r"input_ids: shape \(1, 8\).*expected 2 rows"):
        encode(["a", "b"], lambda texts: tokenize(texts[:1]))
    with pytest.raises(ValueError, match="texts: got 0"):
        encode([], tokenize)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        encode(["a"], tokenize, batch_size=0)
