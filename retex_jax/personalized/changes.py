"""How states keep a model, and how an expert is rebuilt from it by a change of every leaf."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.typing import Array, FlatParams, Params


def stored_pretrained(experts: ExpertSet) -> Params:
    """The pretrained model as states keep it: float leaves on the device, the others as they are."""
    leaves: FlatParams = {}
    for name, spec in experts.leaves.items():
        leaf = experts.pretrained(name)
        leaves[name] = stored(leaf, leaf) if tree.is_float(spec.dtype) else leaf
    return tree.unflatten(leaves)


def stored(leaf: jax.Array | np.ndarray, like: jax.Array | np.ndarray) -> jax.Array:
    """A float leaf in the dtype of `like`; float64 becomes float32 where JAX keeps no float64."""
    return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(like.dtype))


@jax.jit
def _add(leaf: jax.Array, change: jax.Array) -> jax.Array:
    return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)


def add_changes(base: Params, change: Callable[[str, tuple[int, ...]], jax.Array]) -> Params:
    """Adds a change to every float leaf, a leaf at a time.

    Args:
      base: nested dict.
      change: (leaf name, shape) -> change, [*shape], float32.

    Returns:
      Nested dict like `base`; sums are float32, then cast to each leaf's dtype.
    """
    flat = tree.flatten(base)
    floats = {name: leaf for name, leaf in flat.items() if tree.is_float(leaf.dtype)}
    return tree.unflatten(
        flat | {name: _add(leaf, change(name, leaf.shape)) for name, leaf in floats.items()}
    )


def add_mixture(
    base: Params,
    change: Callable[[str, tuple[int, ...], int], jax.Array],
    weights: Array,
    num_tasks: int,
) -> Params:
    """Adds to every float leaf the weighted sum of all tasks' changes.

    Args:
      base: nested dict.
      change: (leaf name, shape, task) -> change, [*shape], float32.
      weights: over tasks, [T], float32.
      num_tasks: T.

    Returns:
      As `add_changes`.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    weights = check_weights(weights, num_tasks)

    def mixture(name: str, shape: tuple[int, ...]) -> jax.Array:
        total = jnp.zeros(shape, jnp.float32)
        for task in range(num_tasks):
            total = total + weights[task] * change(name, shape, task)
        return total

    return add_changes(base, mixture)


def check_task(task: int | jax.Array, num_tasks: int) -> None:
    """Raises ValueError if `task` is no integer or out of range; a traced one is not checked."""
    if not isinstance(task, Tracer) and not 0 <= tree.as_integer("task", task) < num_tasks:
        raise ValueError(f"task: got {task}, expected 0 to {num_tasks - 1}")


def check_weights(weights: Array, num_tasks: int) -> jax.Array:
    """Mixing weights as [T], float32; raises ValueError for another shape."""
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (num_tasks,):
        raise ValueError(f"weights: got shape {weights.shape}, expected ({num_tasks},)")
    return weights
