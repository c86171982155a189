"""A backbone with a classification head: what a fine-tuned checkpoint of one task holds.

The parameters are {"backbone": ..., "head": ...}; the head belongs to one task and is never merged.
Dropout is not modelled. Numerics: the head runs in float32 on the backbone's float32 pooled vector.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import layers

_HIDDEN_HEADS = {"bert": ("pooler", "classifier"), "roberta": ("dense", "out_proj")}
HEAD_KINDS = ("linear", *_HIDDEN_HEADS)


class HiddenHead(nn.Module):
    """Two dense layers with tanh between them; the first keeps the width.

    Attributes:
      names: of the two layers.
      num_labels: width of the second.
      use_bias: whether the second has a bias.
      param_dtype: dtype of the parameters.
    """

    names: tuple[str, str]
    num_labels: int
    use_bias: bool
    param_dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, d] to [B, num_labels]."""
        dtypes = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        first, second = self.names
        x = jnp.tanh(nn.Dense(x.shape[-1], **dtypes, name=first)(x))
        return nn.Dense(self.num_labels, use_bias=self.use_bias, **dtypes, name=second)(x)


class SequenceClassifier(nn.Module):
    """A backbone and its head; see the module's docstring.

    Attributes:
      backbone: a module that maps a batch to `Features`.
      num_labels: number of classes; 1 for a regression, such as STS-B.
      head_kind: "linear" has "head/kernel" and "head/bias". "bert" is BERT's pooler, a dense layer
        "head/pooler" with tanh, then "head/classifier" (arXiv:1810.04805, section 4.1). "roberta" is
        the same with the names "head/dense" and "head/out_proj". These two read the first token.
      use_bias: whether the last layer has a bias; decoders score without one.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    backbone: nn.Module
    num_labels: int
    head_kind: str = "linear"
    use_bias: bool = True

    def __post_init__(self):
        """Checks every field."""
        problems = layers.positive_problems(num_labels=self.num_labels)
        if self.head_kind not in HEAD_KINDS:
            problems.append(
                f"head_kind={self.head_kind!r}: expected one of {', '.join(HEAD_KINDS)}"
            )
        pool = getattr(self.backbone.config, "pool", None)
        if self.head_kind in _HIDDEN_HEADS and pool != "cls":
            problems.append(
                f"head_kind={self.head_kind!r}: expected a backbone with pool='cls', got {pool!r}"
            )
        if problems:
            raise ValueError("SequenceClassifier: " + "; ".join(problems))
        super().__post_init__()

    def example_batch(self) -> dict[str, jax.Array]:
        """Returns the backbone's example batch."""
        return self.backbone.example_batch()

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Classifies a batch.

        Args:
          batch: what the backbone takes.

        Returns:
          Logits, or the predicted number where `num_labels` is 1: [B, num_labels], float32.

        Raises:
          ValueError: where the backbone raises it.
        """
        param_dtype = self.backbone.config.param_dtype
        if self.head_kind == "linear":
            head = nn.Dense(
                self.num_labels,
                use_bias=self.use_bias,
                dtype=jnp.float32,
                param_dtype=param_dtype,
                name="head",
            )
        else:
            names = _HIDDEN_HEADS[self.head_kind]
            head = HiddenHead(names, self.num_labels, self.use_bias, param_dtype, name="head")
        return head(self.backbone(batch).pooled)
