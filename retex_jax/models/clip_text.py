"""CLIP's text tower (arXiv:2103.00020, section 2.4): a causal transformer pooled at its last token.

Pre-norm blocks, a final norm, the hidden state of the end-of-text token, and a projection without
bias to the space that images share. Attention is causal, so what follows the end-of-text token changes
nothing in the pooled vector.

Numerics: activations in `dtype`, parameters in `param_dtype`; layer norms, softmax, means and the
returned features in float32.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import layers, stacking
from retex_jax.models.features import Features

LEGACY_EOS = 2
"""The end-of-text id of configs that transformers wrote before it read that field; see `ClipTextConfig`."""


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Shape and options of CLIP's text tower.

    Attributes:
      vocab_size: number of tokens.
      width: d, the width of a token.
      num_layers: number of blocks.
      num_heads: attention heads; divides `width`.
      mlp_dim: hidden width of each MLP.
      max_length: longest sequence, the rows of the position table.
      projection_dim: width of the pooled vector.
      eos_token_id: the end-of-text token; a sequence is pooled at its first one. The value 2, which
        old configs hold by mistake, pools at the first occurrence of the sequence's largest id
        instead, as transformers does: OpenAI's end-of-text id is the largest of its vocabulary.
      activation: a key of `layers.ACTIVATIONS`.
      layer_norm_eps: epsilon of every layer norm.
      scan: whether the blocks are one scan over stacked parameters; see `models.stacking`.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    vocab_size: int = 49408
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    max_length: int = 77
    projection_dim: int = 512
    eos_token_id: int = 49407
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    scan: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Normalises dtypes and checks every field."""
        problems = layers.check_config(
            self,
            "vocab_size",
            "width",
            "num_layers",
            "num_heads",
            "mlp_dim",
            "max_length",
            "projection_dim",
        )
        has_tokens = not layers.positive_problems(vocab_size=self.vocab_size)
        if has_tokens and not 0 <= self.eos_token_id < self.vocab_size:
            problems.append(
                f"eos_token_id={self.eos_token_id}: expected a token, 0..{self.vocab_size - 1}"
            )
        layers.raise_problems(self, problems)

    @property
    def feature_dim(self) -> int:
        """Width of the pooled vector."""
        return self.projection_dim


CLIP_TEXT_B32 = ClipTextConfig()
"""CLIP ViT-B/32, text tower."""

CLIP_TEXT_B16 = ClipTextConfig()
"""CLIP ViT-B/16, text tower."""

CLIP_TEXT_L14 = ClipTextConfig(width=768, num_heads=12, mlp_dim=3072, projection_dim=768)
"""CLIP ViT-L/14, text tower."""


class Block(nn.Module):
    """One causal pre-norm transformer block.

    Attributes:
      config: of the whole tower.
    """

    config: ClipTextConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps [B, L, d] to [B, L, d]; `mask` is bool [B, 1, 1, L]."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def norm(name: str) -> nn.LayerNorm:
            return layers.layer_norm(config.layer_norm_eps, name=name, **dtypes)

        attention = layers.Attention(config.num_heads, causal=True, **dtypes, name="attention")
        mlp = layers.Mlp(config.mlp_dim, config.activation, **dtypes, name="mlp")
        x = x + attention(norm("norm1")(x), mask)
        return x + mlp(norm("norm2")(x))


class ClipText(nn.Module):
    """CLIP's text tower; see the module's docstring.

    Attributes:
      config: shape and options.
    """

    config: ClipTextConfig

    def example_batch(self) -> dict[str, jax.Array]:
        """Returns a batch of one token, for `init` and `jax.eval_shape`."""
        token = jnp.zeros((1, 1), jnp.int32)
        return {"input_ids": token, "attention_mask": token + 1}

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], num_layers: int | None = None) -> Features:
        """Computes the features of a batch of token sequences.

        Args:
          batch: "input_ids" int [B, L], tokens in 0..vocab_size - 1 (not checked: XLA clamps
            others), right-padded; "attention_mask" [B, L], non-zero where a token is real. Other
            entries are ignored.
          num_layers: stop after this many blocks; None runs all. Parameters can only be initialised
            with None.

        Returns:
          Features: `pooled` [B, projection_dim], not L2-normalised (None when the pass stopped
          early; a row without an end-of-text token is pooled at its first token, as transformers
          does); `layers` [number of blocks run, B, width], the mean over real tokens after each
          block. Both float32.

        Raises:
          ValueError: if `input_ids` is not [B, L] with L <= max_length, the shape of the mask
            differs from it, or `num_layers` is not in 1..config.num_layers.
        """
        config = self.config
        depth = layers.check_num_layers(num_layers, config.num_layers)
        input_ids, real = layers.check_tokens(batch, config.max_length)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def table(name: str, rows: int, std: float) -> nn.Embed:
            init = nn.initializers.normal(std)
            return nn.Embed(rows, config.width, **dtypes, embedding_init=init, name=name)

        position = table("position_embedding", config.max_length, 0.01)
        x = table("token_embedding", config.vocab_size, 0.02)(input_ids)
        x = x + position.embedding[: input_ids.shape[1]].astype(config.dtype)

        mask = real[:, None, None, :]
        weight = layers.mean_weights(real)

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = block(x, mask)
            return x, jnp.sum(x.astype(jnp.float32) * weight[:, :, None], axis=1)

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

        # Argmax gives the first of equals.
        score = input_ids if config.eos_token_id == LEGACY_EOS else input_ids == config.eos_token_id
        end = jnp.argmax(score, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = layers.layer_norm(config.layer_norm_eps, name="final_norm", **dtypes)(x)
        x = nn.Dense(config.projection_dim, use_bias=False, **dtypes, name="projection")(x)
        return Features(x.astype(jnp.float32), means)
