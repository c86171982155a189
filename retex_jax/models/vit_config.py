"""Shapes and options of the image backbones, and the presets of the released ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from retex_jax.models import layers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape and options of a vision transformer.

    Attributes:
      image_size: side of the square input, pixels.
      patch_size: side of a patch, pixels; divides `image_size`.
      width: d, the width of a token.
      num_layers: number of blocks.
      num_heads: attention heads; divides `width`.
      mlp_dim: hidden width of each MLP.
      activation: "gelu" (exact) or "quick_gelu".
      layer_scale: whether each residual branch is multiplied by a learned vector [d].
      pre_norm: whether the embedded tokens are normalised before the first block.
      patch_bias: whether the patch embedding has a bias.
      projection_dim: width of a bias-free projection of the pooled vector, or None.
      normalize: whether the pooled vector is divided by its Euclidean norm, last of all. With it,
        pooled @ kernel + bias of a zero-shot head are CLIP's logits; see `models.zero_shot`.
      layer_norm_eps: epsilon of every layer norm.
      pool: "cls" (class token), "mean" (over patch tokens) or "cls_mean" (one beside the other), after
        the final norm.
      image_mean: mean of each channel, for uint8 images scaled to [0, 1].
      image_std: standard deviation of each channel, for the same.
      scan: whether the blocks are one scan over stacked parameters; see `models.stacking`.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    layer_scale: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    projection_dim: int | None = None
    normalize: bool = False
    layer_norm_eps: float = 1e-6
    pool: str = "cls"
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    scan: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Normalises dtypes and sequences, and checks every field."""
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        problems = layers.check_config(
            self,
            "image_size",
            "patch_size",
            "width",
            "num_layers",
            "num_heads",
            "mlp_dim",
            "projection_dim",
        )
        sides = {"image_size": self.image_size, "patch_size": self.patch_size}
        if not layers.positive_problems(**sides) and self.image_size % self.patch_size:
            problems.append(
                f"image_size={self.image_size}: expected a multiple of patch_size={self.patch_size}"
            )
        if self.pool not in ("cls", "mean", "cls_mean"):
            problems.append(f"pool={self.pool!r}: expected 'cls', 'mean' or 'cls_mean'")
        if len(self.image_mean) != 3:
            problems.append(f"image_mean={self.image_mean}: expected 3 numbers")
        if len(self.image_std) != 3 or min(self.image_std) <= 0:
            problems.append(f"image_std={self.image_std}: expected 3 positive numbers")
        layers.raise_problems(self, problems)

    @property
    def grid_side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def feature_dim(self) -> int:
        """Width of the pooled vector."""
        return self.projection_dim or self.width * (2 if self.pool == "cls_mean" else 1)


DINOV2_SMALL = ViTConfig(patch_size=14, width=384, num_heads=6, mlp_dim=1536, layer_scale=True)
"""DINOv2 ViT-S/14 at 224 pixels: 22.06M parameters with the released 37 x 37 position grid."""

CLIP_B32 = ViTConfig(
    patch_size=32,
    activation="quick_gelu",
    pre_norm=True,
    patch_bias=False,
    projection_dim=512,
    layer_norm_eps=1e-5,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)
"""CLIP ViT-B/32, vision tower."""

CLIP_B16 = dataclasses.replace(CLIP_B32, patch_size=16)
"""CLIP ViT-B/16, vision tower."""

CLIP_L14 = dataclasses.replace(
    CLIP_B32,
    patch_size=14,
    width=1024,
    num_layers=24,
    num_heads=16,
    mlp_dim=4096,
    projection_dim=768,
)
"""CLIP ViT-L/14, vision tower."""
