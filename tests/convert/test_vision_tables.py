"""Tests of the tables of the image backbones: round trips, and parity with torch."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from retex_jax import convert, models, tree
from retex_jax.convert import vit
from retex_jax.convert.architectures import ARCHITECTURES
from retex_jax.snapshot import Snapshot

TINY = models.ViTConfig(
    image_size=28, patch_size=14, width=12, num_layers=2, num_heads=2, mlp_dim=20, layer_scale=True
)
TINY_CLIP = dataclasses.replace(
    models.CLIP_B32,
    image_size=28,
    patch_size=14,
    width=12,
    num_layers=2,
    num_heads=2,
    mlp_dim=20,
    projection_dim=5,
)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(models.ViT(config))
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(p.dtype), expected)


def assert_same(got, want):
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def read_clip(source, config):
    model = models.ViT(config)
    table = ARCHITECTURES["CLIPVisionModelWithProjection"].table(model)
    return convert.to_flax(Snapshot(source), table, models.expected_params(model))


def test_dinov2_round_trip():
    params = random_params(TINY)
    tensors = convert.to_torch(params, convert.DINOV2)
    assert tensors["embeddings.position_embeddings"].shape == (1, 5, 12)
    assert tensors["encoder.layer.1.mlp.fc1.weight"].shape == (20, 12)
    assert_same(vit.dinov2_from_tensors(tensors, TINY), params)
    back = convert.to_torch(vit.dinov2_from_tensors(tensors, TINY), convert.DINOV2)
    assert all(back[name].tobytes() == x.tobytes() for name, x in tensors.items())


def test_dinov2_takes_the_first_blocks_and_resizes_the_grid():
    params = random_params(TINY)
    data = safetensors.numpy.save(convert.to_torch(params, convert.DINOV2))
    config = dataclasses.replace(TINY, num_layers=1, image_size=42)
    got = vit.dinov2_from_tensors(Snapshot(data), config)
    want = {name: x for name, x in params.items() if name != "blocks_1"}
    grid = convert.resize_position_grid(params["position_embedding"]["embedding"], 3)
    assert_same(got, {**want, "position_embedding": {"embedding": grid}})


def test_dinov2_of_another_size_lists_what_is_wrong():
    tensors = convert.to_torch(random_params(TINY), convert.DINOV2)
    with pytest.raises(ValueError) as error:
        vit.dinov2_from_tensors(tensors, dataclasses.replace(TINY, num_layers=3, mlp_dim=21))
    text = str(error.value)
    assert "missing: encoder.layer.2.mlp.fc1.weight (for blocks_2/mlp/fc1/kernel)" in text
    assert "encoder.layer.1.mlp.fc1.weight" in text and "shape [20, 12], expected [21, 12]" in text


def test_clip_round_trip(tmp_path):
    params = random_params(TINY_CLIP)
    tensors = convert.to_torch(params, convert.CLIP_VISION)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(read_clip(tmp_path, TINY_CLIP), params)


def test_clip_reads_past_the_text_half_and_a_projection_that_is_not_wanted(tmp_path):
    params = random_params(TINY_CLIP)
    tensors = convert.to_torch(params, convert.CLIP_VISION)
    tensors["text_model.final_layer_norm.bias"] = np.zeros(3, np.float32)
    tensors["text_projection.weight"] = np.zeros((3, 3), np.float32)
    tensors["logit_scale"] = np.array(1, np.float32)
    tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    data = safetensors.numpy.save(tensors)
    assert_same(read_clip(data, TINY_CLIP), params)
    params.pop("projection")
    config = dataclasses.replace(TINY_CLIP, projection_dim=None)
    assert_same(read_clip(data, config), params)
    tensors["vision_model.head.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"extra: vision_model\.head\.weight"):
        read_clip(safetensors.numpy.save(tensors), config)


def noisy(model, torch, scale=0.3):
    """Moves every parameter of a torch model, so that no bias is 0 and no scale 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def numpy_state(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.fixture(scope="module")
def torch_models():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return torch


@pytest.mark.torch
@pytest.mark.parametrize("image_size", [28, 56])
def test_dinov2_equals_transformers(torch_models, image_size):
    torch = torch_models
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    model = noisy(
        Dinov2Model(
            Dinov2Config(
                hidden_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                mlp_ratio=2,
                image_size=28,
                patch_size=14,
                layer_norm_eps=1e-6,
            )
        ),
        torch,
    )
    x = np.random.default_rng(0).normal(size=(3, image_size, image_size, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.tensor(x.transpose(0, 3, 1, 2)), output_hidden_states=True)
    config = dataclasses.replace(TINY, image_size=image_size, mlp_dim=24)
    params = vit.dinov2_from_tensors(numpy_state(model), config)
    got = models.ViT(config).apply({"params": params}, {"image": x})
    np.testing.assert_allclose(got.pooled, want.pooler_output.numpy(), rtol=1e-4, atol=1e-5)
    for i, hidden in enumerate(want.hidden_states[1:]):
        np.testing.assert_allclose(got.layers[i], hidden.numpy().mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.torch
def test_clip_equals_transformers(torch_models, tmp_path):
    torch = torch_models
    from transformers.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = noisy(
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=20,
                projection_dim=5,
                image_size=28,
                patch_size=14,
            )
        ),
        torch,
    )
    x = np.random.default_rng(0).normal(size=(3, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.tensor(x.transpose(0, 3, 1, 2)), output_hidden_states=True)
    model.save_pretrained(tmp_path)  # the names of the file, which may differ from the model's
    params = read_clip(tmp_path, TINY_CLIP)
    got = models.ViT(TINY_CLIP).apply({"params": params}, {"image": x})
    np.testing.assert_allclose(got.pooled, want.image_embeds.numpy(), rtol=1e-4, atol=1e-5)
    for i, hidden in enumerate(want.hidden_states[1:]):
        np.testing.assert_allclose(got.layers[i], hidden.numpy().mean(1), rtol=1e-4, atol=1e-5)
