"""Llama (arXiv:2302.13971, section 2.2) and, by configuration, Qwen2 (arXiv:2407.10671, section 2.2).

Pre-norm causal blocks with RMSNorm (arXiv:1910.07467), rotary positions (see `models.rope`), grouped
queries (arXiv:2305.13245) and a gated SiLU MLP (SwiGLU, arXiv:2002.05202). Qwen2 and the first Qwen
(arXiv:2309.16609, section 2.3) add a bias to query, key and value. Attention is never windowed. The
pooled vector is the last real token's, as Hugging Face's LlamaForSequenceClassification reads it;
there the padding token tells which is the last, here the attention mask.

Numerics: activations in `dtype`, parameters in `param_dtype`; norms, rotation, softmax, logits and
the returned features in float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import causal, layers, rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a Llama or Qwen2.

    Attributes:
      vocab_size: number of tokens.
      width: d, the width of a token.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads, divides `num_heads`; None for as many.
      head_dim: width of a head, even; None for width / num_heads.
      mlp_dim: hidden width of each MLP.
      max_length: longest sequence (no parameter depends on it).
      qkv_bias: whether query, key and value have a bias.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: a `rope.RopeScaling` or a mapping of its fields, or None.
      norm_eps: epsilon of every RMSNorm.
      lm_head: "tied" (the token embedding), "untied" (a kernel of its own) or "none" (no logits).
      scan: whether the blocks are one scan over stacked parameters; see `models.stacking`.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    vocab_size: int = 32000
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 11008
    max_length: int = 2048
    qkv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: rope.RopeScaling | None = None
    norm_eps: float = 1e-6
    lm_head: str = "untied"
    scan: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Fills in what follows from other fields, normalises dtypes and checks every field."""
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", rope.RopeScaling(**self.rope_scaling))
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        problems = layers.positive_problems(
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            max_length=self.max_length,
        )
        if not problems:
            problems = self._head_problems()
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                problems.append(f"{name}={getattr(self, name)}: expected a positive number")
        if self.lm_head not in ("tied", "untied", "none"):
            problems.append(f"lm_head={self.lm_head!r}: expected 'tied', 'untied' or 'none'")
        layers.raise_problems(self, problems)

    def _head_problems(self):
        problems = []
        if self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_kv_heads={self.num_kv_heads}: expected a divisor of num_heads={self.num_heads}"
            )
        if self.head_dim is None:
            if self.width % self.num_heads:
                problems.append(
                    f"width={self.width}: expected a multiple of num_heads={self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}: expected an even number")
        return problems

    @property
    def feature_dim(self) -> int:
        """Width of the pooled vector."""
        return self.width


QWEN2_0_5B = DecoderConfig(
    vocab_size=151936,
    width=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    mlp_dim=4864,
    max_length=131072,
    qkv_bias=True,
    rope_theta=1e6,
    lm_head="tied",
)
"""Qwen2-0.5B: 494.0M parameters."""

LLAMA_3_2_1B = DecoderConfig(
    vocab_size=128256,
    width=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=8192,
    max_length=131072,
    rope_theta=5e5,
    rope_scaling=rope.RopeScaling(factor=32.0),
    norm_eps=1e-5,
    lm_head="tied",
)
"""Llama 3.2 1B: 1.236G parameters."""

SMOLLM2_135M = DecoderConfig(
    vocab_size=49152,
    width=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    max_length=8192,
    rope_theta=1e5,
    norm_eps=1e-5,
    lm_head="tied",
)
"""SmolLM2-135M: 134.5M parameters."""

QWEN_14B = DecoderConfig(
    vocab_size=152064,
    width=5120,
    num_layers=40,
    num_heads=40,
    mlp_dim=13696,
    max_length=2048,
    qkv_bias=True,
)
"""The first Qwen-14B: 14.17G parameters. Its file's intermediate_size, 27392, counts gate and up together.
Beyond 2048 tokens the released code rescales RoPE and the attention logits, which is not done here."""


class Attention(nn.Module):
    """Grouped-query causal attention with four 2-D kernels.

    Attributes:
      config: of the whole model.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, rotary: tuple[jax.Array, jax.Array], past: Any
    ) -> tuple[jax.Array, Any]:
        """Maps [B, T, d] to the same and the tokens' keys and values; see `causal.attend`."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def heads(name: str, count: int) -> jax.Array:
            size = config.head_dim
            y = nn.Dense(count * size, use_bias=config.qkv_bias, **dtypes, name=name)(x)
            return y.reshape(*y.shape[:-1], count, size)

        query = rope.rotate(heads("query", config.num_heads), rotary)
        key = rope.rotate(heads("key", config.num_kv_heads), rotary)
        value = heads("value", config.num_kv_heads)
        y = causal.attend(query, key, value, mask, past)
        return nn.Dense(config.width, use_bias=False, **dtypes, name="out")(y), (key, value)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Attributes:
      config: of the whole model.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, d] to [B, T, d]."""
        config = self.config

        def dense(name: str, width: int) -> nn.Dense:
            dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
            return nn.Dense(width, use_bias=False, **dtypes, name=name)

        hidden = jax.nn.silu(dense("gate", config.mlp_dim)(x)) * dense("up", config.mlp_dim)(x)
        return dense("down", config.width)(hidden)


class Block(nn.Module):
    """One pre-norm transformer block.

    Attributes:
      config: of the whole model.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, rotary: tuple[jax.Array, jax.Array], past: Any
    ) -> tuple[jax.Array, Any]:
        """Maps [B, T, d] to the same and the tokens' keys and values; see `causal.attend`."""
        attention = Attention(self.config, name="attention")
        y, present = attention(_norm(self.config, "norm1")(x), mask, rotary, past)
        x = x + y
        return x + GatedMlp(self.config, name="mlp")(_norm(self.config, "norm2")(x)), present


class Decoder(causal.CausalLM):
    """Llama or Qwen2; see the module's docstring.

    Attributes:
      config: shape and options.
    """

    config: DecoderConfig

    def setup(self):
        """Makes the token embedding and, where it is not the head as well, the head."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.token_embedding = causal.TokenEmbedding(
            config.vocab_size,
            config.width,
            **dtypes,
            embedding_init=nn.initializers.normal(0.02),
        )
        if config.lm_head == "untied":
            self.lm_head = nn.Dense(
                config.vocab_size, use_bias=False, **dtypes, dot_general=causal.float32_dot
            )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps final hidden states [..., width] to logits [..., vocab_size], float32.

        Raises:
          ValueError: if the configuration says that there is no head.
        """
        if self.config.lm_head == "none":
            raise ValueError("lm_head='none': this model gives no logits")
        if self.config.lm_head == "tied":
            return self.token_embedding.attend(hidden)
        return self.lm_head(hidden)

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
        frequency = rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        rotary = rope.angles(tokens.positions, frequency)
        x, means, present = causal.run_blocks(
            lambda name: Block(config, name=name),
            lambda block, x, past: block(x, tokens.mask, rotary, past),
            self.token_embedding(tokens.input_ids),
            tokens,
            cache,
            config=config,
            depth=depth,
        )
        if depth == config.num_layers:
            x = _norm(config, "final_norm")(x)
        if self.is_initializing() and config.lm_head == "untied":
            self.logits(x)  # features need no head, but its parameters belong to the model
        return x, means, present


def _norm(config: DecoderConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )
