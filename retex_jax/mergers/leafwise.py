"""Lifts the form of a merger from one leaf to the whole model, a leaf at a time."""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.typing import Params


def merge_leaves(experts: ExpertSet, merge_leaf: Callable[[str], jax.Array]) -> Params:
    """Merges every float leaf and copies the others from the pretrained model.

    Args:
      experts: the experts.
      merge_leaf: leaf name to merged leaf, [*shape], float32.

    Returns:
      Nested dict with the pretrained model's shapes and dtypes.
    """
    merged = {}
    for name, spec in experts.leaves.items():
        if tree.is_float(spec.dtype):
            merged[name] = merge_leaf(name).astype(jax.dtypes.canonicalize_dtype(spec.dtype))
        else:
            merged[name] = experts.pretrained(name)
    return tree.unflatten(merged)


def sum_over_tasks(values: jax.Array) -> jax.Array:
    """[T, *shape] to [*shape]: one addition after another, as XLA reduces a leading axis slowly on CPU."""
    return reduce(jnp.add, jnp.unstack(values))


def check_finite_number(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number."""
    if not jnp.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
