"""Transformer pieces that the image and the text backbones share.

Every kernel is a matrix [in, out]: the heads of attention are split by a reshape of its
activations, so a merger or an offset sees the same matrices as the papers do. Numerics: layer norms
take the two-pass variance and, as softmax does, run in float32 whatever `dtype` is.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (arXiv:1606.08415, section 2), written with erf.

    `jax.nn.gelu` writes the same function with erfc, which XLA computes more slowly on CPUs.

    Args:
      x: any shape, a floating dtype.

    Returns:
      x * Phi(x), same shape and dtype.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid form of GELU (arXiv:1606.08415, section 2), which CLIP uses.

    Args:
      x: any shape, a floating dtype.

    Returns:
      x * sigmoid(1.702 x), same shape and dtype.
    """
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh form of GELU (arXiv:1606.08415, section 2), which GPT-2 uses.

    Args:
      x: any shape, a floating dtype.

    Returns:
      Same shape and dtype.
    """
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


def layer_norm(epsilon: float, dtype: Dtype, param_dtype: Dtype, name: str) -> nn.LayerNorm:
    """Returns a layer norm whose statistics are float32 and whose variance takes two passes.

    Args:
      epsilon: added to the variance.
      dtype: dtype of the output.
      param_dtype: dtype of scale and bias.
      name: name of the submodule.

    Returns:
      The module.
    """
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        name=name,
    )


class Attention(nn.Module):
    """Multi-head self-attention with four 2-D kernels: query, key, value and out.

    Attributes:
      num_heads: number of heads; divides the width.
      dtype: dtype of the activations; the softmax is float32.
      param_dtype: dtype of the parameters.
    """

    num_heads: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Attends.

        Args:
          x: [B, N, d].
          mask: bool [B, 1, 1, N], True where a token may be attended to, or None for all.

        Returns:
          [B, N, d].
        """
        width = x.shape[-1]

        def dense(name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        query, key, value = (heads(dense(name)(x)) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return dense("out")(y.reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers, fc1 and fc2, with an activation between them.

    Attributes:
      mlp_dim: width of the hidden layer.
      activation: a key of `ACTIVATIONS`.
      dtype: dtype of the activations.
      param_dtype: dtype of the parameters.
    """

    mlp_dim: int
    activation: str = "gelu"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, N, d] to [B, N, d]."""
        width = x.shape[-1]
        x = nn.Dense(self.mlp_dim, dtype=self.dtype, param_dtype=self.param_dtype, name="fc1")(x)
        x = ACTIVATIONS[self.activation](x)
        return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name="fc2")(x)


def check_num_layers(num_layers: int | None, available: int) -> int:
    """Returns how many blocks to run.

    Args:
      num_layers: None for all.
      available: number of blocks of the model.

    Returns:
      A number in 1..available.

    Raises:
      ValueError: if `num_layers` is not in 1..available.
    """
    if num_layers is None:
        return available
    if not 1 <= num_layers <= available:
        raise ValueError(f"num_layers={num_layers}: expected None or 1..{available}")
    return num_layers


def positive_problems(**values: int | None) -> list[str]:
    """Returns one sentence for each value that is not a positive integer (None passes)."""
    return [
        f"{name}={value!r}: expected a positive integer"
        for name, value in values.items()
        if value is not None and (not isinstance(value, int) or value < 1)
    ]
