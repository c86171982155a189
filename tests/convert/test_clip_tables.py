"""Tests of the tables of CLIP and of its text tower: round trips, and parity with torch."""

import dataclasses
import math
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from retex_jax import convert, models, tree

VISION = dataclasses.replace(
    models.CLIP_B32,
    image_size=28,
    patch_size=14,
    width=12,
    num_layers=2,
    num_heads=2,
    mlp_dim=20,
    projection_dim=6,
)
TEXT = models.ClipTextConfig(
    vocab_size=60,
    width=8,
    num_layers=2,
    num_heads=2,
    mlp_dim=10,
    max_length=9,
    projection_dim=6,
    eos_token_id=59,
)
MODEL = models.Clip(VISION, TEXT)
FULL = {
    "b32": models.CLIP_MODEL_B32,
    "b16": models.CLIP_MODEL_B16,
    "l14": models.CLIP_MODEL_L14,
}
TEMPLATES = ["a photo of a {}.", "a drawing of a {}.", "the {} of mine"]
NAMES = ["cat", "small dog", "aeroplane", "rose"]


def random_params(model):
    rng = np.random.default_rng(0)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: np.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


def make_tokenizer(config):
    """Two tokens a word, then the end of text, also as padding."""

    def tokenize(texts):
        ids = np.full((len(texts), config.max_length), config.vocab_size - 1, np.int32)
        lengths = []
        for row, text in enumerate(texts):
            word_ids = [
                sum(map(ord, word)) * prime % (config.vocab_size - 3)
                for word in text.split()
                for prime in (31, 57)
            ]
            word_ids = word_ids[: config.max_length - 1]
            ids[row, : len(word_ids)] = word_ids
            lengths.append(len(word_ids) + 1)
        mask = np.arange(config.max_length) < np.array(lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.astype(np.int32)}

    return tokenize


def torch_config(clip, model, eos_token_id):
    """The transformers configuration of one of our models."""
    vision, text = model.vision_config, model.text_config
    return clip.CLIPConfig(
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_dim,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": vision.projection_dim,
        },
        text_config={
            "hidden_size": text.width,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.mlp_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_length,
            "projection_dim": text.projection_dim,
            "pad_token_id": 1,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": eos_token_id,
        },
        projection_dim=vision.projection_dim,
    )


@pytest.fixture(scope="module")
def torch_clip():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    clip = pytest.importorskip("transformers.models.clip")
    return torch, clip


def noisy(model, torch, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def as_torch(torch, batch):
    arguments = {
        "input_ids": torch.tensor(batch["input_ids"]).long(),
        "attention_mask": torch.tensor(batch["attention_mask"]).long(),
    }
    if "image" in batch:
        arguments["pixel_values"] = torch.tensor(batch["image"].transpose(0, 3, 1, 2))
    return arguments


def images(config, n=3):
    side = config.image_size
    return np.random.default_rng(0).normal(size=(n, side, side, 3)).astype(np.float32)


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
        assert got[name].tobytes() == x.tobytes(), name


def test_clip_round_trip():
    params = random_params(MODEL)
    tensors = convert.to_torch(params, convert.CLIP)
    assert tensors["logit_scale"].shape == ()
    assert tensors["text_model.encoder.layers.1.mlp.fc1.weight"].shape == (10, 8)
    assert tensors["vision_model.encoder.layers.1.mlp.fc1.weight"].shape == (20, 12)
    back = convert.to_flax(tensors, convert.CLIP, models.expected_params(MODEL))
    assert_same_bytes(tree.flatten(back), tree.flatten(params))


def test_text_tower_reads_past_the_vision_half():
    params = random_params(MODEL)
    tensors = convert.to_torch(params, convert.CLIP)
    tensors["text_model.embeddings.position_ids"] = np.arange(9)[None]
    expected = models.expected_params(models.ClipText(TEXT))
    got = convert.to_flax(tensors, convert.CLIP_TEXT, expected)
    assert_same_bytes(tree.flatten(got), tree.flatten(params["text"]))


def test_old_buffers_are_read_past_and_nothing_else():
    tensors = convert.to_torch(random_params(MODEL), convert.CLIP)
    expected = models.expected_params(MODEL)
    tensors["text_model.embeddings.position_ids"] = np.arange(9)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    convert.to_flax(tensors, convert.CLIP, expected)
    tensors["text_model.head.weight"] = np.zeros(3, np.float32)
    del tensors["text_projection.weight"]
    with pytest.raises(ValueError) as error:
        convert.to_flax(tensors, convert.CLIP, expected)
    assert "extra: text_model.head.weight" in str(error.value)
    assert "missing: text_projection.weight (for text/projection/kernel)" in str(error.value)


def zero_shot_logits(model, params, image, tokenize):
    """Our logits for the templates, from the two towers."""
    head = models.zero_shot_head(
        models.ClipText(model.text_config),
        params["text"],
        params["logit_scale"],
        NAMES,
        TEMPLATES,
        tokenize,
        batch_size=5,
    )
    tower = models.ViT(dataclasses.replace(model.vision_config, normalize=True))
    apply = jax.jit(lambda p, x: tower.apply({"params": p}, {"image": x}).pooled)
    return np.asarray(apply(params["vision"], image) @ head["kernel"] + head["bias"])


def torch_zero_shot_logits(torch, model, image, tokenize):
    """What transformers' towers give for the same."""
    columns = []
    for name in NAMES:
        tokens = tokenize([template.replace("{}", name) for template in TEMPLATES])
        texts = model.get_text_features(**as_torch(torch, tokens)).pooler_output
        texts = torch.nn.functional.normalize(texts, dim=-1).mean(0)
        columns.append(torch.nn.functional.normalize(texts, dim=-1))
    pixels = torch.tensor(image.transpose(0, 3, 1, 2))
    images = model.get_image_features(pixel_values=pixels).pooler_output
    images = torch.nn.functional.normalize(images, dim=-1)
    return (images @ torch.stack(columns).T * model.logit_scale.exp()).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("eos_token_id", [59, 2])
def test_clip_equals_transformers(torch_clip, tmp_path, eos_token_id):
    torch, clip = torch_clip
    model = clip.CLIPModel(torch_config(clip, MODEL, eos_token_id))
    noisy(model, torch).save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    ours = models.Clip(VISION, dataclasses.replace(TEXT, eos_token_id=eos_token_id))
    params = convert.to_flax(tensors, convert.CLIP, models.expected_params(ours))
    assert_same_bytes(convert.to_torch(params, convert.CLIP), tensors)

    tokens = make_tokenizer(TEXT)(["one", "two or three", "a b c d"])
    # For old configs the largest id ends a text, wherever it stands.
    tokens["input_ids"][0, :5] = [4, 9, 58, 5, 58] if eos_token_id == 2 else [4, 59, 7, 59, 3]
    tokens["attention_mask"][0, :5] = 1
    if eos_token_id == 2:
        tokens["input_ids"][0, 5:] = 1
    batch = {"image": images(VISION, 2), **tokens}
    with torch.no_grad():
        want = model(**as_torch(torch, batch))
        hidden = model.text_model(**as_torch(torch, tokens), output_hidden_states=True)
    got = jax.jit(lambda p, b: ours.apply({"params": p}, b))(params, batch)
    np.testing.assert_allclose(got, want.logits_per_image.numpy(), rtol=0, atol=1e-4)

    text = models.ClipText(ours.text_config).apply({"params": params["text"]}, tokens)
    embeds = text.pooled / np.linalg.norm(text.pooled, axis=-1, keepdims=True)
    np.testing.assert_allclose(embeds, want.text_embeds.numpy(), rtol=0, atol=1e-5)
    mask = tokens["attention_mask"][:, :, None]
    for i, states in enumerate(hidden.hidden_states[1:]):
        mean = (states.numpy() * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(text.layers[i], mean, rtol=0, atol=1e-4)


@pytest.mark.torch
def test_text_model_equals_transformers(torch_clip, tmp_path):
    torch, clip = torch_clip
    config = torch_config(clip, MODEL, 59).text_config
    model = noisy(clip.CLIPTextModelWithProjection(config), torch)
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    ours = models.ClipText(TEXT)
    params = convert.to_flax(tensors, convert.CLIP_TEXT, models.expected_params(ours))
    assert_same_bytes(convert.to_torch(params, convert.CLIP_TEXT), tensors)
    tokens = make_tokenizer(TEXT)(["one", "two or three"])
    with torch.no_grad():
        want = model(**as_torch(torch, tokens)).text_embeds
    got = ours.apply({"params": params}, tokens).pooled
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)


@pytest.mark.torch
def test_zero_shot_equals_transformers(torch_clip):
    torch, clip = torch_clip
    model = noisy(clip.CLIPModel(torch_config(clip, MODEL, 59)), torch)
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    params = convert.to_flax(tensors, convert.CLIP, models.expected_params(MODEL))
    tokenize = make_tokenizer(TEXT)
    with torch.no_grad():
        want = torch_zero_shot_logits(torch, model, images(VISION), tokenize)
    got = zero_shot_logits(MODEL, params, images(VISION), tokenize)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.ptp(want, axis=1).min() > 1e-2


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", FULL)
def test_full_size_equals_transformers(torch_clip, name):
    torch, clip = torch_clip
    ours = FULL[name]
    torch.manual_seed(0)
    model = clip.CLIPModel(torch_config(clip, ours, ours.text_config.eos_token_id)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))  # that of the released models
    tensors = {key: x.numpy() for key, x in model.state_dict().items()}
    params = convert.to_flax(tensors, convert.CLIP, models.expected_params(ours))
    assert_same_bytes(convert.to_torch(params, convert.CLIP), tensors)
    tokenize = make_tokenizer(ours.text_config)
    image = images(ours.vision_config, 2)
    batch = {"image": image, **tokenize(["a photo of a cat.", "the dog", "rose"])}
    with torch.no_grad():
        want = model(**as_torch(torch, batch)).logits_per_image.numpy()
        want_zero_shot = torch_zero_shot_logits(torch, model, image, tokenize)
    got = jax.jit(lambda p, b: ours.apply({"params": p}, b))(params, batch)
    got_zero_shot = zero_shot_logits(ours, params, image, tokenize)
    for kind, x, y in (("clip", got, want), ("zero-shot", got_zero_shot, want_zero_shot)):
        print(
            f"{name} {kind}: largest difference of logits {np.abs(x - y).max():.2g}"
        )  # shown by -s
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)  # 1e-6 of the cosine
