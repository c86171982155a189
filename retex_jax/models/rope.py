"""Rotary position embedding (RoPE, arXiv:2104.09864, section 3.4.2), with Llama 3's rescaling.

Pairs are (i, i + head_dim / 2), as Hugging Face's checkpoints have them, not neighbours as in the
paper: the two differ by a fixed permutation of each head's rows, which those checkpoints contain.

Numerics: frequencies from float64, angles and rotation in float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rescaling of the frequencies, for sequences beyond the pretrained length.

    Wavelengths up to original_max_length / high_freq_factor stay, those beyond original_max_length /
    low_freq_factor grow by `factor`, and between them the frequency is interpolated (what
    transformers calls rope_type "llama3").

    Attributes:
      factor: how much the long wavelengths grow.
      low_freq_factor: see above.
      high_freq_factor: see above; more than low_freq_factor.
      original_max_length: the pretrained length, tokens.

    Raises:
      ValueError: listing every field whose value cannot be used.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        """Checks every field."""
        problems = [
            f"{field.name}={value}: expected a positive number"
            for field in dataclasses.fields(self)
            if not (value := getattr(self, field.name)) > 0
        ]
        if not self.high_freq_factor > self.low_freq_factor:
            problems.append(
                f"high_freq_factor={self.high_freq_factor}: "
                f"expected more than low_freq_factor={self.low_freq_factor}"
            )
        if problems:
            raise ValueError("RopeScaling: " + "; ".join(problems))


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns the angle that each pair turns by from one position to the next.

    Args:
      head_dim: even.
      theta: base of the geometric series of wavelengths.
      scaling: Llama 3's, or None.

    Returns:
      [head_dim / 2], float32, radians.
    """
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_length * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def angles(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns the cosine and sine of every token's angles.

    Args:
      positions: int [B, T].
      frequency: of `frequencies`.

    Returns:
      Two arrays [B, T, 1, head_dim / 2], float32.
    """
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs of each head.

    Args:
      x: queries or keys, [B, T, heads, head_dim].
      rotary: of `angles`.

    Returns:
      Same shape and dtype.
    """
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
