"""Vision transformer (arXiv:2010.11929): DINOv2 and, by configuration, CLIP's vision tower.

DINOv2 (arXiv:2304.07193) adds LayerScale (arXiv:2103.17239, section 2.1) to each residual branch.
CLIP (arXiv:2103.00020, section 2.4) has a layer norm before the first block, no bias in the patch
embedding, the sigmoid GELU and a projection of the class token. Both are pre-norm.

Numerics: activations in `dtype`, parameters in `param_dtype`; layer norms, softmax and the returned
features in float32. The patch embedding is one matrix product of flattened patches, equal to the
strided convolution.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import layers, stacking
from retex_jax.models.features import Features
from retex_jax.models.vit_config import ViTConfig


class PatchEmbed(nn.Module):
    """Embeds non-overlapping patches; the kernel is HWIO, [patch, patch, 3, d].

    Attributes:
      patch_size: side of a patch, pixels.
      width: d.
      use_bias: whether a bias [d] is added.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.
    """

    patch_size: int
    width: int
    use_bias: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps [B, H, W, 3] to [B, (H / patch) * (W / patch), d], patches in row-major order."""
        patch, width = self.patch_size, self.width
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (patch, patch, 3, width), self.param_dtype
        )
        batch, height, breadth, channels = image.shape
        rows, columns = height // patch, breadth // patch
        x = image.astype(self.dtype).reshape(batch, rows, patch, columns, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch * patch * channels)
        x = x @ kernel.astype(self.dtype).reshape(-1, width)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (width,), self.param_dtype)
            x = x + bias.astype(self.dtype)
        return x


class Block(nn.Module):
    """One pre-norm transformer block.

    Attributes:
      config: of the whole model.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, N, d] to [B, N, d]."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def norm(name: str) -> nn.LayerNorm:
            return layers.layer_norm(config.layer_norm_eps, name=name, **dtypes)

        def scaled(name: str, y: jax.Array) -> jax.Array:
            if not config.layer_scale:
                return y
            scale = self.param(
                name, nn.initializers.ones_init(), (config.width,), config.param_dtype
            )
            return y * scale.astype(config.dtype)

        attention = layers.Attention(config.num_heads, **dtypes, name="attention")
        mlp = layers.Mlp(config.mlp_dim, config.activation, **dtypes, name="mlp")
        x = x + scaled("layer_scale1", attention(norm("norm1")(x)))
        return x + scaled("layer_scale2", mlp(norm("norm2")(x)))


class ViT(nn.Module):
    """Vision transformer; see the module's docstring.

    Attributes:
      config: shape and options.
    """

    config: ViTConfig

    def example_batch(self) -> dict[str, jax.Array]:
        """Returns a batch of one black image, for `init` and `jax.eval_shape`."""
        side = self.config.image_size
        return {"image": jnp.zeros((1, side, side, 3), jnp.uint8)}

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], num_layers: int | None = None) -> Features:
        """Computes the features of a batch of images.

        Args:
          batch: holds "image" [B, image_size, image_size, 3]: uint8 (scaled to [0, 1] and
            normalised here) or floating (taken as normalised). Other entries are ignored.
          num_layers: stop after this many blocks; None runs all. Parameters can only be initialised
            with None.

        Returns:
          Features: `pooled` [B, config.feature_dim], after the final norm, the projection where
          there is one, and L2 normalisation where `config.normalize` asks for it (None when the pass
          stopped early); `layers` [number of blocks run, B, width], means over all tokens, the class
          token among them. Both float32.

        Raises:
          ValueError: if the image is not [B, image_size, image_size, 3], its dtype is neither uint8
            nor floating, or `num_layers` is not in 1..config.num_layers.
        """
        config = self.config
        depth = layers.check_num_layers(num_layers, config.num_layers)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        x = PatchEmbed(
            config.patch_size, config.width, config.patch_bias, **dtypes, name="patch_embed"
        )(normalize_images(batch["image"], config))

        init = nn.initializers.normal(0.02)
        cls_token = self.param("cls_token", init, (config.width,), config.param_dtype)
        cls_tokens = jnp.broadcast_to(cls_token.astype(config.dtype), (x.shape[0], 1, config.width))
        position = nn.Embed(
            config.grid_side**2 + 1,
            config.width,
            param_dtype=config.param_dtype,
            embedding_init=init,
            name="position_embedding",
        )
        x = jnp.concatenate([cls_tokens, x], axis=1) + position.embedding.astype(config.dtype)
        if config.pre_norm:
            x = layers.layer_norm(config.layer_norm_eps, name="pre_norm", **dtypes)(x)

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = block(x)
            return x, jnp.mean(x, axis=1, dtype=jnp.float32)

        x, means = stacking.run_blocks(
            lambda name: Block(config, name=name),
            body,
            x,
            num_layers=config.num_layers,
            depth=depth,
            scan=config.scan,
        )
        if depth < config.num_layers:
            return Features(None, means)

        norm = layers.layer_norm(config.layer_norm_eps, name="final_norm", **dtypes)
        if config.pool == "cls":
            pooled = norm(x[:, 0])
        elif config.pool == "cls_mean":
            x = norm(x)
            mean = jnp.mean(x[:, 1:], axis=1, dtype=jnp.float32).astype(config.dtype)
            pooled = jnp.concatenate([x[:, 0], mean], axis=-1)
        else:
            pooled = jnp.mean(norm(x[:, 1:]), axis=1, dtype=jnp.float32).astype(config.dtype)
        if config.projection_dim is not None:
            pooled = nn.Dense(config.projection_dim, use_bias=False, **dtypes, name="projection")(
                pooled
            )
        pooled = pooled.astype(jnp.float32)
        return Features(layers.l2_normalize(pooled) if config.normalize else pooled, means)


def normalize_images(image: jax.Array, config: ViTConfig) -> jax.Array:
    """Scales uint8 images to [0, 1] and normalises them; passes floating images through.

    Args:
      image: [B, image_size, image_size, 3], uint8 or floating.
      config: gives the size, mean and standard deviation.

    Returns:
      Same shape; float32 for uint8 input, else the input's dtype.

    Raises:
      ValueError: if the shape is another one, or the dtype is neither uint8 nor floating.
    """
    image = jnp.asarray(image)
    side = config.image_size
    if image.ndim != 4 or image.shape[1:] != (side, side, 3):
        raise ValueError(f"image: shape {image.shape}, expected [B, {side}, {side}, 3]")
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    if image.dtype != jnp.uint8:
        raise ValueError(f"image: dtype {image.dtype}, expected uint8 or floating")
    scale = [1 / (255 * std) for std in config.image_std]
    shift = [-mean / std for mean, std in zip(config.image_mean, config.image_std, strict=True)]
    return image.astype(jnp.float32) * jnp.array(scale) + jnp.array(shift)
