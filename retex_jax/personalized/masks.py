"""Binary masks of T tasks, packed to bits."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@jax.jit
def pack(masks: jax.Array) -> jax.Array:
    """Packs the masks of one leaf, eight entries to a byte, first entry highest.

    Args:
      masks: [T, *shape], bool.

    Returns:
      [T, ceil(size / 8)], uint8; the last byte of a task is filled with zeros.
    """
    return jnp.packbits(masks.reshape(masks.shape[0], -1), axis=1)


def unpack(packed: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Unpacks the mask of one task: [ceil(size / 8)], uint8, to [*shape], bool."""
    bits = jnp.unpackbits(packed, count=math.prod(shape))
    return bits.reshape(shape).astype(jnp.bool_)
