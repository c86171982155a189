"""Tables and readers for the image backbones: DINOv2 and CLIP's vision tower.

The names are those of Hugging Face's `Dinov2Model` and `CLIPVisionModelWithProjection`, as their
files on the hub have them; DINOv2's newer spelling (q_proj, k_proj, v_proj, o_proj) is read too.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from retex_jax import models
from retex_jax.convert import onnx_dinov2
from retex_jax.convert.engine import (
    CONV,
    TRANSPOSE,
    Rule,
    Table,
    drop_leading,
    to_flax,
)
from retex_jax.convert.prefixed import prefixed

_BLOCK = "encoder.layer.{i}."

DINOV2 = Table(
    name="DINOv2",
    rules=(
        Rule("embeddings.cls_token", "cls_token", drop_leading(2, ndim=3)),
        Rule(
            "embeddings.position_embeddings",
            "position_embedding/embedding",
            drop_leading(1, ndim=3),
        ),
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", CONV),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embed/bias"),
        *(
            rule
            for flax, torch, alias in (
                ("query", "attention.query", "q_proj"),
                ("key", "attention.key", "k_proj"),
                ("value", "attention.value", "v_proj"),
                ("out", "output.dense", "o_proj"),
            )
            for rule in (
                Rule(
                    f"{_BLOCK}attention.{torch}.weight",
                    f"blocks_{{i}}/attention/{flax}/kernel",
                    TRANSPOSE,
                    (f"{_BLOCK}attention.{alias}.weight",),
                ),
                Rule(
                    f"{_BLOCK}attention.{torch}.bias",
                    f"blocks_{{i}}/attention/{flax}/bias",
                    aliases=(f"{_BLOCK}attention.{alias}.bias",),
                ),
            )
        ),
        *(
            rule
            for n in (1, 2)
            for rule in (
                Rule(f"{_BLOCK}norm{n}.weight", f"blocks_{{i}}/norm{n}/scale"),
                Rule(f"{_BLOCK}norm{n}.bias", f"blocks_{{i}}/norm{n}/bias"),
                Rule(f"{_BLOCK}layer_scale{n}.lambda1", f"blocks_{{i}}/layer_scale{n}"),
                Rule(f"{_BLOCK}mlp.fc{n}.weight", f"blocks_{{i}}/mlp/fc{n}/kernel", TRANSPOSE),
                Rule(f"{_BLOCK}mlp.fc{n}.bias", f"blocks_{{i}}/mlp/fc{n}/bias"),
            )
        ),
        Rule("layernorm.weight", "final_norm/scale"),
        Rule("layernorm.bias", "final_norm/bias"),
    ),
    ignore=(r"(dinov2\.)?embeddings\.mask_token",),
    prefixes=("dinov2.",),
)
"""Hugging Face's Dinov2Model <-> ViT with LayerScale."""

DINOV2_CLASSIFIER = Table(
    name="DINOv2 classifier",
    rules=(
        *prefixed(DINOV2.rules, torch="dinov2.", flax="backbone/"),
        Rule("classifier.weight", "head/kernel", TRANSPOSE),
        Rule("classifier.bias", "head/bias"),
    ),
    ignore=(r"dinov2\.embeddings\.mask_token",),
)
"""Hugging Face's Dinov2ForImageClassification <-> SequenceClassifier of a ViT with pool="cls_mean"."""

_CLIP = "vision_model."
_LAYER = "vision_model.encoder.layers.{i}."

_CLIP_RULES = (
    Rule(f"{_CLIP}embeddings.class_embedding", "cls_token"),
    Rule(f"{_CLIP}embeddings.patch_embedding.weight", "patch_embed/kernel", CONV),
    Rule(f"{_CLIP}embeddings.position_embedding.weight", "position_embedding/embedding"),
    Rule(f"{_CLIP}pre_layrnorm.weight", "pre_norm/scale"),
    Rule(f"{_CLIP}pre_layrnorm.bias", "pre_norm/bias"),
    *(
        rule
        for flax, torch in (
            ("query", "q_proj"),
            ("key", "k_proj"),
            ("value", "v_proj"),
            ("out", "out_proj"),
        )
        for rule in (
            Rule(
                f"{_LAYER}self_attn.{torch}.weight",
                f"blocks_{{i}}/attention/{flax}/kernel",
                TRANSPOSE,
            ),
            Rule(f"{_LAYER}self_attn.{torch}.bias", f"blocks_{{i}}/attention/{flax}/bias"),
        )
    ),
    *(
        rule
        for n in (1, 2)
        for rule in (
            Rule(f"{_LAYER}layer_norm{n}.weight", f"blocks_{{i}}/norm{n}/scale"),
            Rule(f"{_LAYER}layer_norm{n}.bias", f"blocks_{{i}}/norm{n}/bias"),
            Rule(f"{_LAYER}mlp.fc{n}.weight", f"blocks_{{i}}/mlp/fc{n}/kernel", TRANSPOSE),
            Rule(f"{_LAYER}mlp.fc{n}.bias", f"blocks_{{i}}/mlp/fc{n}/bias"),
        )
    ),
    Rule(f"{_CLIP}post_layernorm.weight", "final_norm/scale"),
    Rule(f"{_CLIP}post_layernorm.bias", "final_norm/bias"),
    Rule("visual_projection.weight", "projection/kernel", TRANSPOSE),
)

# transformers 5 writes a vision tower of its own without "vision_model.", older releases with it.
CLIP_VISION = Table(
    name="CLIP vision tower",
    rules=tuple(
        dataclasses.replace(rule, aliases=(rule.torch.removeprefix(_CLIP),))
        if rule.torch.startswith(_CLIP)
        else rule
        for rule in _CLIP_RULES
    ),
    ignore=(
        r"text_model\..*",
        r"text_projection\.weight",
        r"logit_scale",
        r"vision_model\.embeddings\.position_ids",
    ),
)
"""Hugging Face's CLIPVisionModelWithProjection <-> ViT; the text half of a CLIPModel is ignored."""


def resize_position_grid(grid: np.ndarray, new_side: int) -> np.ndarray:
    """Resizes a square grid of position embeddings, the class token's row apart.

    Bicubic with a = -0.75, half-pixel centres, clamped edges and no antialiasing: what
    `torch.nn.functional.interpolate` does in transformers' DINOv2 (`jax.image.resize` takes a =
    -0.5 and antialiases). Computed in float64.

    Args:
      grid: [1 + side**2, d]; row 0 belongs to the class token.
      new_side: patches along one side of the new image.

    Returns:
      [1 + new_side**2, d], dtype of `grid`; `grid` itself where the side does not change.

    Raises:
      ValueError: if `grid` is not [1 + side**2, d] for a whole side >= 1, or new_side < 1.
    """
    side = math.isqrt(max(len(grid) - 1, 0)) if grid.ndim == 2 else 0
    if side < 1 or side * side != len(grid) - 1:
        raise ValueError(f"grid: shape {grid.shape}, expected [1 + side**2, d]")
    if new_side < 1:
        raise ValueError(f"new_side={new_side}: expected at least 1")
    if new_side == side:
        return grid
    weights = _bicubic_matrix(side, new_side)
    patches = grid[1:].astype(np.float64).reshape(side, side, -1)
    rows = np.tensordot(weights, patches, axes=(1, 0))
    resized = np.tensordot(weights, rows, axes=(1, 1)).swapaxes(0, 1)
    resized = resized.reshape(new_side * new_side, -1).astype(grid.dtype)
    return np.concatenate([grid[:1], resized])


def _bicubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Returns the interpolation weights [new, old] of cubic convolution (Keys 1981, eq. 4)."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - (left + tap))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        column = np.clip(left + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), column), np.where(t <= 1, near, far))
    return weights


def with_grid(tensors: Mapping[str, np.ndarray], side: int) -> dict[str, np.ndarray]:
    """Returns DINOv2's tensors with a position grid of another side; see `resize_position_grid`."""
    tensors = dict(tensors)
    for key in ("embeddings.position_embeddings", "dinov2.embeddings.position_embeddings"):
        x = tensors.get(key)
        if x is not None and x.ndim == 3 and len(x) == 1:
            tensors[key] = resize_position_grid(np.asarray(x[0]), side)[None]
    return tensors


def dinov2_from_tensors(tensors: Mapping[str, np.ndarray], config: models.ViTConfig) -> dict:
    """Converts tensors with Dinov2Model's names.

    Args:
      tensors: torch name -> array.
      config: the position grid is resized to its image size, and its first `num_layers` blocks are
        taken.

    Returns:
      Params of `models.ViT(config)`.

    Raises:
      ValueError: listing every tensor that is missing, extra, duplicate or misshaped.
    """
    kept = {key: x for key, x in tensors.items() if _block_index(key) < config.num_layers}
    kept = with_grid(kept, config.grid_side)
    return to_flax(kept, DINOV2, models.expected_params(models.ViT(config)))


def _block_index(key: str) -> int:
    parts = key.removeprefix("dinov2.").split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layer"] and parts[2].isdecimal() else -1


def dinov2_from_onnx(data: bytes, config: models.ViTConfig) -> dict:
    """Reads a DINOv2 backbone from an ONNX file that a torch Dinov2Model was exported to.

    Args:
      data: the file's content.
      config: as for `dinov2_from_tensors`.

    Returns:
      Params of `models.ViT(config)`.

    Raises:
      ValueError: if the file is not ONNX, or as for `dinov2_from_tensors`.
      RuntimeError: if the `onnx` package is not installed.
    """
    return dinov2_from_tensors(onnx_dinov2.read_onnx_backbone(data), config)
