"""The inputs of linear layers, against what a model must feed them."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree
from retex_jax.models import stacking
from retex_jax.models.interception import linear_inputs

SIZES = {"width": 12, "num_layers": 2, "num_heads": 2, "mlp_dim": 20}
VISION = models.ViTConfig(image_size=8, patch_size=4, layer_scale=True, projection_dim=5, **SIZES)
BERT = models.BertConfig(vocab_size=30, max_length=8, pool="cls", **SIZES)
TEXT = models.ClipTextConfig(
    vocab_size=30, max_length=8, projection_dim=5, eos_token_id=29, **SIZES
)
DECODER = models.DecoderConfig(
    vocab_size=30, num_kv_heads=1, max_length=8, qkv_bias=True, lm_head="untied", **SIZES
)
MODELS = {
    "vit": models.ViT(VISION),
    "bert": models.Bert(BERT),
    "roberta": models.Bert(dataclasses.replace(BERT, padding_idx=1, num_token_types=1)),
    "clip_text": models.ClipText(TEXT),
    "gpt2": models.Gpt2(models.Gpt2Config(vocab_size=30, max_length=8, **SIZES)),
    "decoder": models.Decoder(DECODER),
    "clip": models.Clip(VISION, TEXT),
    "classifier": models.SequenceClassifier(models.Bert(BERT), 3, "roberta"),
}
BATCH = {
    "image": np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32),
    "input_ids": np.array([[4, 9, 6, 29, 3], [7, 29, 1, 1, 1]], np.int32),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int32),
}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


class Small(nn.Module):
    """Two layers on tokens, the second twice, and one on their mean."""

    @nn.compact
    def __call__(self, batch):
        second = nn.Dense(3, name="second")
        x = jnp.tanh(nn.Dense(3, name="first")(batch["x"]))
        return nn.Dense(2, use_bias=False, name="last")(jnp.mean(second(second(x)), axis=1))


def small():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    shapes = {"first": (4, 3), "second": (3, 3), "last": (3, 2)}
    params = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
        for name, shape in shapes.items()
    }
    del params["last"]["bias"]
    return x, jax.tree.map(jnp.float32, params)


def by_hand(x, params):
    first, second = (
        {name: np.asarray(leaf, np.float64) for name, leaf in params[layer].items()}
        for layer in ("first", "second")
    )
    once = np.tanh(x @ first["kernel"] + first["bias"])
    twice = once @ second["kernel"] + second["bias"]
    return x, once, twice, (twice @ second["kernel"] + second["bias"]).mean(axis=1)


def assert_rows(found, want):
    assert found.dtype == jnp.float32
    want = np.asarray(want)
    np.testing.assert_allclose(found, want.reshape(-1, want.shape[-1]), rtol=1e-5, atol=1e-6)


def test_by_hand():
    x, params = small()
    found = linear_inputs(Small(), params, {"x": x})
    assert list(found) == ["first/kernel", "last/kernel", "second/kernel"]
    first, once, twice, last = by_hand(x, params)
    assert_rows(found["first/kernel"], first)
    assert_rows(found["second/kernel"], np.concatenate([once, twice]))
    assert_rows(found["last/kernel"], last)


def test_padding_by_hand():
    x, params = small()
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    found = linear_inputs(Small(), params, {"x": x, "attention_mask": mask})
    first, once, twice, last = by_hand(x, params)
    assert_rows(found["first/kernel"], first * mask[..., None])
    both = np.concatenate([once * mask[..., None], twice * mask[..., None]])
    assert_rows(found["second/kernel"], both)
    assert_rows(found["last/kernel"], last * [[1], [0]])


def test_a_mask_of_another_shape():
    x, params = small()
    with pytest.raises(ValueError, match=r"first/kernel: its input has shape \(2, 3, 4\)"):
        linear_inputs(Small(), params, {"x": x, "attention_mask": np.ones((2, 4))})


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_of_every_model(name):
    model = MODELS[name]
    params = models.expected_params(model)
    found = jax.eval_shape(lambda p, b: linear_inputs(model, p, b), params, BATCH)
    kernels = {
        leaf: spec.shape
        for leaf, spec in tree.flatten(params).items()
        if leaf.endswith("kernel") and len(spec.shape) == 2
    }
    kernels.pop("lm_head/kernel", None)  # features do not need it
    assert {leaf: x.shape[1] for leaf, x in found.items()} == {
        leaf: shape[0] for leaf, shape in kernels.items()
    }
    assert len(kernels) >= 8
    for leaf, x in found.items():
        if any(part in leaf for part in ("projection", "head")):
            assert x.shape[0] == 2
        else:  # 4 patches and the class token, or 5 tokens
            assert x.shape[0] == 10


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_rows_of_padding_are_zero(name):
    model = MODELS[name]
    params = random_params(model)
    found = jax.jit(lambda p, b: linear_inputs(model, p, b))(params, BATCH)
    junk = dict(BATCH, input_ids=np.where(BATCH["attention_mask"], BATCH["input_ids"], 5))
    other = jax.jit(lambda p, b: linear_inputs(model, p, b))(params, junk)
    for leaf, x in found.items():
        zero = ~np.any(np.asarray(x), axis=1)
        is_token = x.shape[0] == 10 and "vision" not in leaf
        want = BATCH["attention_mask"].ravel() == 0 if is_token else np.zeros(len(x), bool)
        np.testing.assert_array_equal(zero, want, err_msg=leaf)
        np.testing.assert_allclose(x, other[leaf], rtol=1e-5, atol=1e-5)


def test_a_transformer_layer_by_hand():
    params = random_params(MODELS["bert"])
    found = linear_inputs(MODELS["bert"], params, BATCH)
    flat = {leaf: np.asarray(x, np.float64) for leaf, x in tree.flatten(params).items()}
    x = flat["word_embedding/embedding"][BATCH["input_ids"]]
    x = x + flat["position_embedding/embedding"][:5] + flat["token_type_embedding/embedding"][0]
    x = (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)
    x = x * flat["embedding_norm/scale"] + flat["embedding_norm/bias"]
    real = BATCH["attention_mask"][..., None]
    for name in ("query", "key", "value"):
        assert_rows(found[f"blocks_0/attention/{name}/kernel"], x * real)
    for block in ("blocks_0", "blocks_1"):
        before = np.asarray(found[f"{block}/mlp/fc1/kernel"], np.float64)
        before = before @ flat[f"{block}/mlp/fc1/kernel"] + flat[f"{block}/mlp/fc1/bias"]
        erf = np.vectorize(math.erf)(before / math.sqrt(2))
        assert_rows(
            found[f"{block}/mlp/fc2/kernel"], 0.5 * before * (1 + erf) * real.reshape(-1, 1)
        )


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_the_patch_embedding_on_request(name):
    params = random_params(MODELS[name])
    leaf = "patch_embed/kernel" if name == "vit" else "vision/patch_embed/kernel"
    assert leaf not in linear_inputs(MODELS[name], params, BATCH)
    found = linear_inputs(MODELS[name], params, BATCH, patch_embed=True)[leaf]
    patches = [
        BATCH["image"][i, y : y + 4, x : x + 4].ravel()
        for i in range(2)
        for y in (0, 4)
        for x in (0, 4)
    ]
    assert_rows(found, patches)
    # They are what the kernel multiplies, flattened in the same order.
    embed = {k: np.asarray(v) for k, v in tree.flatten(params).items() if "patch_embed" in k}
    bias = embed.get(leaf.replace("kernel", "bias"), 0)
    own = params if name == "vit" else params["vision"]
    _, state = MODELS["vit"].apply(
        {"params": own}, BATCH, capture_intermediates=lambda m, _: m.name == "patch_embed"
    )
    want = state["intermediates"]["patch_embed"]["__call__"][0]
    np.testing.assert_allclose(
        np.asarray(found) @ embed[leaf].reshape(-1, 12) + bias,
        np.asarray(want).reshape(-1, 12),
        rtol=1e-4,
        atol=1e-4,
    )


def test_images_are_not_masked_by_the_texts_beside_them():
    # As many images as texts, and as many patches as tokens.
    params = random_params(MODELS["clip"])
    found = linear_inputs(MODELS["clip"], params, BATCH)
    alone = linear_inputs(MODELS["vit"], params["vision"], {"image": BATCH["image"]})
    for leaf, x in alone.items():
        np.testing.assert_array_equal(found[f"vision/{leaf}"], x)


def test_jit_equals_eager():
    params = random_params(MODELS["gpt2"])
    eager = linear_inputs(MODELS["gpt2"], params, BATCH)
    compiled = jax.jit(lambda p, b: linear_inputs(MODELS["gpt2"], p, b))(params, BATCH)
    assert eager.keys() == compiled.keys()
    for leaf, x in eager.items():
        np.testing.assert_allclose(compiled[leaf], x, rtol=1e-5, atol=1e-5)


def test_low_precision_activations_are_returned_in_float32():
    model = models.Bert(dataclasses.replace(BERT, dtype="bfloat16"))
    found = jax.eval_shape(lambda p: linear_inputs(model, p, BATCH), models.expected_params(model))
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


def test_a_scan_is_refused():
    params = stacking.stack_blocks(random_params(MODELS["bert"]))
    scanned = models.Bert(dataclasses.replace(BERT, scan=True))
    with pytest.raises(ValueError, match=r"scan=True, such as 'blocks/.*unstack_blocks"):
        linear_inputs(scanned, params, BATCH)
