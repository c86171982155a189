"""BERT encoder (arXiv:1810.04805); covers all-MiniLM-L6-v2 (arXiv:2002.10957) and RoBERTa.

Post-norm blocks: each residual sum is normalised. The pooled vector is the masked mean of the last
hidden state, as sentence-transformers pools MiniLM (arXiv:1908.10084, section 3), not
L2-normalised; or that of the first token, which classifiers read. BERT's pooler (dense and tanh on
the first token) is part of the classification head: see `models.SequenceClassifier`.

RoBERTa (arXiv:1907.11692) is the same network with one token type and positions that start at
padding_idx + 1. They count real tokens by the attention mask; transformers counts the tokens whose id
is not padding_idx, which is the same wherever padding has that id and nothing else does.

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


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and options of a BERT encoder.

    Attributes:
      vocab_size: number of tokens.
      width: d, the width of a token.
      num_layers: number of blocks.
      num_heads: attention heads; divides `width`.
      mlp_dim: hidden width of each MLP.
      max_length: longest sequence; see `position_rows`.
      num_token_types: rows of the token-type table.
      padding_idx: None numbers positions 0, 1, ...; a number counts them from padding_idx + 1 over
        real tokens and gives padding the position padding_idx, as RoBERTa does.
      pool: "mean" (over real tokens) or "cls" (the first token).
      activation: a key of `layers.ACTIVATIONS`; "gelu" is exact.
      layer_norm_eps: epsilon of every layer norm.
      scan: whether the blocks are one scan over stacked parameters; see `models.stacking`.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    vocab_size: int = 30522
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 512
    num_token_types: int = 2
    padding_idx: int | None = None
    pool: str = "mean"
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
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
            "num_token_types",
        )
        if self.padding_idx is not None and (
            not isinstance(self.padding_idx, int) or self.padding_idx < 0
        ):
            problems.append(f"padding_idx={self.padding_idx!r}: expected None or a number >= 0")
        if self.pool not in ("cls", "mean"):
            problems.append(f"pool={self.pool!r}: expected 'cls' or 'mean'")
        layers.raise_problems(self, problems)

    @property
    def feature_dim(self) -> int:
        """Width of the pooled vector."""
        return self.width

    @property
    def position_rows(self) -> int:
        """Rows of the position table: RoBERTa's first padding_idx + 1 belong to no real token."""
        return (
            self.max_length if self.padding_idx is None else self.max_length + self.padding_idx + 1
        )


BERT_BASE = BertConfig(pool="cls")
"""BERT-base, uncased: 109.48M parameters with the pooler."""

ROBERTA_BASE = BertConfig(
    vocab_size=50265, num_token_types=1, padding_idx=1, pool="cls", layer_norm_eps=1e-5
)
"""RoBERTa-base: 124.06M parameters without a head; the position table has 514 rows."""

MINILM_L6 = BertConfig(width=384, num_layers=6, num_heads=12, mlp_dim=1536)
"""all-MiniLM-L6-v2: 22.6M parameters without the pooler."""


class Block(nn.Module):
    """One post-norm transformer block.

    Attributes:
      config: of the whole model.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps [B, L, d] to [B, L, d]; `mask` is bool [B, 1, 1, L]."""
        config = self.config
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        attention = layers.Attention(config.num_heads, **dtypes, name="attention")
        mlp = layers.Mlp(config.mlp_dim, config.activation, **dtypes, name="mlp")
        x = layers.layer_norm(config.layer_norm_eps, name="norm1", **dtypes)(x + attention(x, mask))
        return layers.layer_norm(config.layer_norm_eps, name="norm2", **dtypes)(x + mlp(x))


class Bert(nn.Module):
    """BERT encoder; see the module's docstring.

    Attributes:
      config: shape and options.
    """

    config: BertConfig

    def example_batch(self) -> dict[str, jax.Array]:
        """Returns a batch of one token, for `init` and `jax.eval_shape`."""
        token = jnp.zeros((1, 1), jnp.int32)
        return {"input_ids": token, "attention_mask": token + 1}

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], num_layers: int | None = None) -> Features:
        """Computes the features of a batch of token sequences.

        Args:
          batch: "input_ids" int [B, L], tokens in 0..vocab_size - 1 (not checked: XLA clamps
            others); "attention_mask" [B, L], non-zero where a token is real; optionally
            "token_type_ids" int [B, L] (zeros without it). Other entries are ignored.
          num_layers: stop after this many blocks; None runs all. Parameters can only be initialised
            with None.

        Returns:
          Features: `pooled` [B, width], by `config.pool` the mean of the last hidden state over real
          tokens or its first token (None when the pass stopped early); `layers` [number of blocks
          run, B, width], the mean after each block. Both float32; a mean over no tokens is zero.

        Raises:
          ValueError: if `input_ids` is not [B, L] with L <= max_length, the shapes of its
            companions differ from it, or `num_layers` is not in 1..config.num_layers.
        """
        config = self.config
        depth = layers.check_num_layers(num_layers, config.num_layers)
        input_ids, real, token_types = layers.check_tokens(
            batch, config.max_length, optional=("token_type_ids",)
        )
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def table(name: str, rows: int) -> nn.Embed:
            return nn.Embed(
                rows, config.width, **dtypes, embedding_init=nn.initializers.normal(0.02), name=name
            )

        position = table("position_embedding", config.position_rows)
        token_type = table("token_type_embedding", config.num_token_types)
        x = table("word_embedding", config.vocab_size)(input_ids)
        if config.padding_idx is None:
            x = x + position.embedding[: input_ids.shape[1]].astype(config.dtype)
        else:
            x = x + position(jnp.cumsum(real, axis=1) * real + config.padding_idx)
        # Without token types every token is of type 0.
        first_type = token_type.embedding[0].astype(config.dtype)
        x = x + (first_type if token_types is None else token_type(token_types))
        x = layers.layer_norm(config.layer_norm_eps, name="embedding_norm", **dtypes)(x)

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
        return Features(x[:, 0].astype(jnp.float32) if config.pool == "cls" else means[-1], means)
