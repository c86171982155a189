"""CLIP (arXiv:2103.00020): both towers and the learned temperature of their cosines.

The parameters are those of `ViT` under "vision" and of `ClipText` under "text", so either tower can be
applied, merged or recovered alone, and the scalar "logit_scale", whose exponential multiplies the
cosines. Numerics: as the towers; the normalisation and the logits are float32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import layers
from retex_jax.models.clip_text import (
    CLIP_TEXT_B16,
    CLIP_TEXT_B32,
    CLIP_TEXT_L14,
    ClipText,
    ClipTextConfig,
)
from retex_jax.models.vit import ViT
from retex_jax.models.vit_config import CLIP_B16, CLIP_B32, CLIP_L14, ViTConfig


class Clip(nn.Module):
    """CLIP; see the module's docstring.

    Attributes:
      vision_config: of the image tower.
      text_config: of the text tower, with the same `feature_dim`.

    Raises:
      ValueError: if the towers' feature dimensions differ.
    """

    vision_config: ViTConfig
    text_config: ClipTextConfig

    def __post_init__(self):
        """Checks that the towers share a space."""
        image, text = self.vision_config.feature_dim, self.text_config.feature_dim
        if image != text:
            raise ValueError(f"Clip: images have {image} features, texts {text}, expected the same")
        super().__post_init__()

    def example_batch(self) -> dict[str, jax.Array]:
        """Returns one black image and one token, for `init` and `jax.eval_shape`."""
        towers = ViT(self.vision_config, parent=None), ClipText(self.text_config, parent=None)
        return towers[0].example_batch() | towers[1].example_batch()

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Compares every image with every text.

        Args:
          batch: "image" as `ViT` takes it, "input_ids" and "attention_mask" as `ClipText` does. There
            may be more texts than images, or fewer.

        Returns:
          Logits [number of images, number of texts], float32: cosines times exp(logit_scale).

        Raises:
          ValueError: where a tower raises it.
        """
        image = ViT(self.vision_config, name="vision")(batch).pooled
        text = ClipText(self.text_config, name="text")(batch).pooled
        scale = self.param(
            "logit_scale",
            nn.initializers.constant(math.log(1 / 0.07)),
            (),
            self.text_config.param_dtype,
        )
        cosines = layers.l2_normalize(image) @ layers.l2_normalize(text).T
        return cosines * jnp.exp(scale.astype(jnp.float32))


CLIP_MODEL_B32 = Clip(CLIP_B32, CLIP_TEXT_B32)
"""CLIP ViT-B/32: 151.28M parameters."""

CLIP_MODEL_B16 = Clip(CLIP_B16, CLIP_TEXT_B16)
"""CLIP ViT-B/16: 149.62M parameters."""

CLIP_MODEL_L14 = Clip(CLIP_L14, CLIP_TEXT_L14)
"""CLIP ViT-L/14: 427.62M parameters."""
