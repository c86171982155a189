"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).

Pre-norm causal blocks with learned positions and the tanh GELU; query, key and value are one fused
kernel [d, 3d], as the released checkpoints have them, and the language model's head is the token
embedding. The pooled vector is the last real token's, as Hugging Face's GPT2ForSequenceClassification
reads it; there the padding token tells which is the last, here the attention mask.

Numerics: activations in `dtype`, parameters in `param_dtype`; layer norms, softmax, logits and the
returned features in float32.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import causal, layers


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """Shape and options of a GPT-2.

    Attributes:
      vocab_size: number of tokens.
      width: d, the width of a token.
      num_layers: number of blocks.
      num_heads: attention heads; divides `width`.
      mlp_dim: hidden width of each MLP.
      max_length: longest sequence, the rows of the position table.
      activation: a key of `layers.ACTIVATIONS`.
      layer_norm_eps: epsilon of every layer norm.
      scan: whether the blocks are one scan over stacked parameters; see `models.stacking`.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    vocab_size: int = 50257
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 1024
    activation: str = "gelu_tanh"
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
        )
        layers.raise_problems(self, problems)

    @property
    def feature_dim(self) -> int:
        """Width of the pooled vector."""
        return self.width


GPT2 = Gpt2Config()
"""GPT-2, the smallest: 124.4M parameters."""

GPT2_MEDIUM = Gpt2Config(width=1024, num_layers=24, num_heads=16, mlp_dim=4096)
"""GPT-2 medium: 354.8M parameters."""


class Attention(nn.Module):
    """Multi-head causal attention with a fused kernel for query, key and value.

    Attributes:
      config: of the whole model.
    """

    config: Gpt2Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        """Maps [B, T, d] to the same and the tokens' keys and values; see `causal.attend`."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        fused = nn.Dense(3 * config.width, **dtypes, name="qkv")(x)
        query, key, value = (
            y.reshape(*y.shape[:-1], config.num_heads, -1) for y in jnp.split(fused, 3, axis=-1)
        )
        y = causal.attend(query, key, value, mask, past)
        return nn.Dense(config.width, **dtypes, name="out")(y), (key, value)


class Block(nn.Module):
    """One pre-norm transformer block.

    Attributes:
      config: of the whole model.
    """

    config: Gpt2Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        """Maps [B, T, d] to the same and the tokens' keys and values; see `causal.attend`."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def norm(name: str) -> nn.LayerNorm:
            return layers.layer_norm(config.layer_norm_eps, name=name, **dtypes)

        y, present = Attention(config, name="attention")(norm("norm1")(x), mask, past)
        x = x + y
        mlp = layers.Mlp(config.mlp_dim, config.activation, **dtypes, name="mlp")
        return x + mlp(norm("norm2")(x)), present


class Gpt2(causal.CausalLM):
    """GPT-2; see the module's docstring.

    Attributes:
      config: shape and options.
    """

    config: Gpt2Config

    def setup(self):
        """Makes the token embedding, which is the head as well."""
        config = self.config
        self.token_embedding = causal.TokenEmbedding(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps final hidden states [..., width] to logits [..., vocab_size], float32."""
        return self.token_embedding.attend(hidden)

    @nn.compact
    def states(
        self, tokens: causal.Tokens, cache: causal.Cache | None = None, depth: int | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Computes the hidden states of new tokens.

        Args:
          tokens: [B, T].
          cache: of the tokens before, or None.
          depth: how many blocks run; None for all. The final norm follows only after the last one.

        Returns:
          As `causal.run_blocks`, the hidden state after the final norm.
        """
        config = self.config
        depth = depth or config.num_layers
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        position = nn.Embed(
            config.max_length,
            config.width,
            **dtypes,
            embedding_init=nn.initializers.normal(0.01),
            name="position_embedding",
        )
        x, means, present = causal.run_blocks(
            lambda name: Block(config, name=name),
            lambda block, x, past: block(x, tokens.mask, past),
            self.token_embedding(tokens.input_ids) + position(tokens.positions),
            tokens,
            cache,
            config=config,
            depth=depth,
        )
        if depth == config.num_layers:
            x = layers.layer_norm(config.layer_norm_eps, name="final_norm", **dtypes)(x)
        return x, means, present
