"""Transformer pieces that the image and the text backbones share.

Every kernel is a matrix [in, out]: the heads of attention are split by a reshape of its
activations, so a merger or an offset sees the same matrices as the papers do. Numerics: layer norms
take the two-pass variance and, as softmax does, run in float32 whatever `dtype` is.
"""

from collections.abc import Callable, Mapping
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
      causal: whether a token attends only to itself and to the tokens before it.
      dtype: dtype of the activations; the softmax is float32.
      param_dtype: dtype of the parameters.
    """

    num_heads: int
    causal: bool = False
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
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=self.causal)
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


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divides vectors by their Euclidean norm, in float32.

    Args:
      x: [..., d], a floating dtype.

    Returns:
      [..., d], float32, of norm 1; shorter where the norm of x is below 1e-12, zero where x is zero.
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def mean_weights(real: jax.Array) -> jax.Array:
    """Returns the weights whose sum over tokens is the mean over the real ones.

    Args:
      real: bool [B, L].

    Returns:
      [B, L], float32; each row sums to 1, or is zero where no token is real.
    """
    weight = real.astype(jnp.float32)
    return weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)


def check_tokens(
    batch: Mapping[str, jax.Array], max_length: int, optional: tuple[str, ...] = ()
) -> tuple:
    """Checks a batch of token sequences.

    Args:
      batch: "input_ids" int [B, L], "attention_mask" [B, L], non-zero where a token is real.
      max_length: longest sequence.
      optional: names of further entries [B, L] that the batch may hold.

    Returns:
      input_ids, the attention mask as bool [B, L], then the optional entries (None where absent).

    Raises:
      ValueError: if `input_ids` is not an integer [B, L] with 1 <= L <= max_length, or the shape of
        another entry differs from its own.
    """
    input_ids = jnp.asarray(batch["input_ids"])
    real = jnp.asarray(batch["attention_mask"]) != 0
    others = {name: batch.get(name) for name in optional}
    problems = []
    if input_ids.ndim != 2 or not 1 <= input_ids.shape[1] <= max_length:
        problems.append(
            f"input_ids: shape {input_ids.shape}, expected [B, L] with 1 <= L <= {max_length}"
        )
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        problems.append(f"input_ids: dtype {input_ids.dtype}, expected an integer dtype")
    for name, x in {"attention_mask": real, **others}.items():
        if x is not None and x.shape != input_ids.shape:
            problems.append(
                f"{name}: shape {x.shape}, expected that of input_ids {input_ids.shape}"
            )
    if problems:
        raise ValueError("; ".join(problems))
    return input_ids, real, *others.values()


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


def check_config(config: Any, *sizes: str) -> list[str]:
    """Normalises a transformer's configuration, and checks the fields that all of them have.

    Args:
      config: frozen dataclass with `dtype`, `param_dtype` (made NumPy dtypes in place), `width`,
        `num_heads`, `activation` and `layer_norm_eps`.
      sizes: names of the fields that are positive integers, or None.

    Returns:
      One sentence for each field whose value cannot be used.
    """
    for name in ("dtype", "param_dtype"):
        object.__setattr__(config, name, jnp.dtype(getattr(config, name)))
    problems = positive_problems(**{name: getattr(config, name) for name in sizes})
    if not problems and config.width % config.num_heads:
        problems.append(
            f"width={config.width}: expected a multiple of num_heads={config.num_heads}"
        )
    if config.activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        problems.append(f"activation={config.activation!r}: expected one of {known}")
    if not config.layer_norm_eps > 0:
        problems.append(f"layer_norm_eps={config.layer_norm_eps}: expected a positive number")
    return problems


def raise_problems(config: Any, problems: list[str]) -> None:
    """Raises one ValueError that lists the problems of a configuration, if there are any."""
    if problems:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(problems))
