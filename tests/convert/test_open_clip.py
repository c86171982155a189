"""Tests of OpenCLIP's names, against a state dict that the test lays out by hand from Hugging Face's."""

import os

import jax
import numpy as np
import pytest

from retex_jax import convert, models, tree
from retex_jax.convert import clip
from retex_jax.convert.open_clip import OPEN_CLIP, OPEN_CLIP_VISION

VISION = models.ViTConfig(
    image_size=8,
    patch_size=4,
    width=12,
    num_layers=2,
    num_heads=2,
    mlp_dim=20,
    activation="quick_gelu",
    pre_norm=True,
    patch_bias=False,
    projection_dim=6,
    layer_norm_eps=1e-5,
)
TEXT = models.ClipTextConfig(
    vocab_size=30,
    width=8,
    num_layers=2,
    num_heads=2,
    mlp_dim=16,
    max_length=7,
    projection_dim=6,
    eos_token_id=29,
)
MODEL = models.Clip(VISION, TEXT)


def random_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(p.dtype), models.expected_params(MODEL)
    )


def to_open_clip(tensors):
    """Renames a CLIPModel's tensors as OpenCLIP lays them out."""
    renamed = {
        "logit_scale": tensors["logit_scale"],
        "visual.conv1.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].T,
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        for old, new in (
            ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("text_model.final_layer_norm", "ln_final"),
        ):
            renamed[f"{new}.{kind}"] = tensors[f"{old}.{kind}"]
        for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
            for i in range(2):
                old, new = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
                parts = [tensors[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{new}.attn.in_proj_{kind}"] = np.concatenate(parts)
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    renamed[f"{new}.{b}.{kind}"] = tensors[f"{old}.{a}.{kind}"]
    return renamed


def assert_same(got, want):
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_names_and_layouts_are_those_laid_out_by_hand():
    params = random_params()
    tensors = convert.to_torch(params, OPEN_CLIP)
    want = to_open_clip(convert.to_torch(params, clip.CLIP))
    assert_same(tensors, want)
    assert tensors["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (36, 12)
    assert_same(convert.to_flax(want, OPEN_CLIP, models.expected_params(MODEL)), params)


def test_buffers_and_a_prefix_are_read_past():
    params = random_params()
    tensors = {f"module.{n}": x for n, x in convert.to_torch(params, OPEN_CLIP).items()}
    tensors["attn_mask"] = np.zeros((7, 7), np.float32)
    tensors["input_resolution"] = np.array(224)
    assert_same(convert.to_flax(tensors, OPEN_CLIP, models.expected_params(MODEL)), params)


def test_the_vision_tower_alone():
    params = random_params()
    expected = models.expected_params(models.ViT(VISION))
    tensors = convert.to_torch(params, OPEN_CLIP)
    assert_same(convert.to_flax(tensors, OPEN_CLIP_VISION, expected), params["vision"])
    renamed = {f"module.{name}": x for name, x in tensors.items()}
    assert_same(convert.to_flax(renamed, OPEN_CLIP_VISION, expected), params["vision"])
    tensors["visual.attnpool.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"extra: visual\.attnpool\.weight"):
        convert.to_flax(tensors, OPEN_CLIP_VISION, expected)


@pytest.mark.torch
def test_in_proj_is_torchs_multihead_attention():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    attention = torch.nn.MultiheadAttention(12, 2, batch_first=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    prefix = "visual.transformer.resblocks.0.attn."
    tensors = {prefix + name: x.numpy() for name, x in attention.state_dict().items()}
    flat = tree.flatten(random_params()["vision"])
    expected = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in flat.items()
        if name.startswith("blocks_0/attention/")
    }
    params = convert.to_flax(tensors, OPEN_CLIP_VISION, expected)["blocks_0"]["attention"]
    x = np.random.default_rng(0).normal(size=(3, 5, 12)).astype(np.float32)
    with torch.no_grad():
        want = attention(*[torch.tensor(x)] * 3)[0].numpy()
    module = models.layers.Attention(2)
    np.testing.assert_allclose(module.apply({"params": params}, x), want, rtol=0, atol=1e-5)
