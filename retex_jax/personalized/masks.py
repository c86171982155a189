"""Binary masks of T tasks, packed to bits, and how a model is rebuilt leaf by leaf from its changes."""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.typing import Array, Params


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


def stored_pretrained(experts: ExpertSet) -> Params:
    """The pretrained model as states keep it: float leaves on the device, the others as they are."""
    flat = tree.flatten(experts.pretrained_params())
    return tree.unflatten(
        flat | {name: stored(flat[name], flat[name]) for name in experts.float_leaves}
    )


def stored(leaf: jax.Array | np.ndarray, like: jax.Array | np.ndarray) -> jax.Array:
    """A float leaf in the dtype of `like`; float64 becomes float32 where JAX keeps no float64."""
    return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(like.dtype))


@jax.jit
def _add(leaf: jax.Array, change: jax.Array) -> jax.Array:
    return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)


def add_changes(
    pretrained: Params, names: Iterable[str], change: Callable[[str], jax.Array]
) -> Params:
    """Adds a change to every named leaf, a leaf at a time.

    Args:
      pretrained: nested dict.
      names: of the leaves that change.
      change: leaf name to change, [*shape], float32.

    Returns:
      Nested dict like `pretrained`; sums are float32, then cast to each leaf's dtype.
    """
    flat = tree.flatten(pretrained)
    return tree.unflatten(flat | {name: _add(flat[name], change(name)) for name in names})


def check_task(task: int | jax.Array, num_tasks: int) -> None:
    """Raises ValueError if `task` is out of range; a traced one is not checked."""
    if not isinstance(task, Tracer) and not 0 <= task < num_tasks:
        raise ValueError(f"task: got {task}, expected 0 to {num_tasks - 1}")


def check_weights(weights: Array, num_tasks: int) -> jax.Array:
    """Mixing weights as [T], float32; raises ValueError for another shape."""
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (num_tasks,):
        raise ValueError(f"weights: got shape {weights.shape}, expected ({num_tasks},)")
    return weights
