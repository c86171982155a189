"""Lifts the form of a merger from one leaf, or one part of it, to the whole model."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.buffers import aligned_empty
from retex_jax.experts import PART_SIZES, ExpertSet
from retex_jax.typing import Array, Params

_Result = TypeVar("_Result")

_MAX_THREADS = 8  # a thread holds a few parts' stacks
_MOST_UNROLLED = 32  # tasks
_STACK = 1 << 24  # entries of whole leaves of experts that are added at once, or one leaf


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


def merge_parts(experts: ExpertSet, merge_part: Callable[[str, slice | None], jax.Array]) -> Params:
    """As `merge_leaves`, for a merger that works element by element.

    Args:
      experts: the experts.
      merge_part: (leaf name, part) to merged part, [n], of which more may be `padded`, float32; to the
        merged leaf, [*shape], for part None. It is called from several threads.

    Returns:
      Nested dict with the pretrained model's shapes and dtypes.
    """
    leaves = Leaves(experts)

    def put(name: str, part: slice | None) -> None:
        leaves.put(name, part, merge_part(name, part))

    for _ in map_parts(experts, put):
        pass
    return merge_leaves(experts, leaves.take)


class Leaves:
    """A model's float leaves, filled in parts."""

    def __init__(self, experts: ExpertSet):
        """Takes shapes and dtypes of the pretrained model, whose float64 becomes float32 where JAX keeps none."""
        self._shapes = {name: experts.leaves[name].shape for name in experts.float_leaves}
        self._dtypes = {
            name: jax.dtypes.canonicalize_dtype(experts.leaves[name].dtype) for name in self._shapes
        }
        self._leaves: dict[str, Any] = {
            name: aligned_empty([math.prod(shape)], self._dtypes[name])
            for name, shape in self._shapes.items()
            if None not in experts.parts(name)
        }

    def put(self, name: str, part: slice | None, values: jax.Array) -> None:
        """Stores a part, [n], of which more may be `padded`, or, for part None, the leaf, [*shape]."""
        if part is None:
            self._leaves[name] = values.astype(self._dtypes[name])
        else:
            self._leaves[name][part] = np.asarray(values)[: part.stop - part.start]

    def amend(
        self, name: str, part: slice | None, positions: np.ndarray, values: np.ndarray
    ) -> None:
        """Stores other values, [k], at positions in a flattened part or leaf that is stored."""
        leaf = self._leaves[name]
        if part is None:
            changed = leaf.reshape(-1).at[positions].set(values.astype(leaf.dtype))
            self._leaves[name] = changed.reshape(leaf.shape)
        else:
            leaf[part][positions] = values

    def take(self, name: str) -> jax.Array:
        """A leaf of which all parts are stored: [*shape]; it is not kept."""
        leaf = self._leaves.pop(name).reshape(self._shapes[name])
        return jax.device_put(leaf, may_alias=True) if isinstance(leaf, np.ndarray) else leaf


def map_parts(
    experts: ExpertSet,
    function: Callable[[str, slice | None], _Result],
    names: Sequence[str] | None = None,
) -> Iterator[tuple[str, list[_Result]]]:
    """Calls a function for every part of leaves.

    Args:
      experts: the experts.
      function: (leaf name, part) to anything that is computed when it returns, as what it reads is
        overwritten then; called from several threads, but for part None, as a whole leaf may need
        much memory or lie on several devices.
      names: of the leaves; all float leaves when not given.

    Yields:
      Leaf name and the results of its parts, in order.
    """
    names = experts.float_leaves if names is None else names
    parts = {name: experts.parts(name) for name in names}
    pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
    try:
        jobs = {
            name: [pool.submit(function, name, part) for part in ranges]
            for name, ranges in parts.items()
            if None not in ranges
        }
        for name in parts:
            if name in jobs:
                yield name, [job.result() for job in jobs.pop(name)]
            else:
                yield name, [function(name, None)]
    finally:
        pool.shutdown(cancel_futures=True)


def padded(values: Array, part: slice | None) -> Array:
    """A part with zeros behind it, so that parts have few sizes: compiling for one takes longer than a part.

    Args:
      values: [..., n]; the leaf, [..., *shape], for part None.
      part: which part of its leaf it is.

    Returns:
      [..., m], where m >= n is one of a few sizes, or the largest part, and which may lie in the memory of
      `values`; the leaf for part None.
    """
    if part is None:
        return values
    size = values.shape[-1]
    room = next((bucket for bucket in PART_SIZES if bucket >= size), size)
    if room > size:
        longer = aligned_empty([*values.shape[:-1], room], values.dtype)
        longer[..., :size], longer[..., size:] = values, 0
        values = longer
    return jax.device_put(values, may_alias=True)


def fold_tasks(
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    values: jax.Array,
    each: Callable[[jax.Array], jax.Array] = lambda one: one,
) -> jax.Array:
    """Combines the tasks' values one after another, as XLA reduces a leading axis slowly on CPU.

    Args:
      combine: two arrays [*shape] to one.
      values: [T, *shape].
      each: what is done with a task's values before.

    Returns:
      [*shape].
    """
    if len(values) > _MOST_UNROLLED:  # compiling takes as long as there are tasks
        return jax.lax.fori_loop(
            1,
            len(values),
            lambda task, sofar: combine(sofar, each(values[task])),
            each(values[0]),
        )
    return reduce(combine, [each(one) for one in jnp.unstack(values)])


def sum_over_tasks(values: jax.Array) -> jax.Array:
    """[T, *shape] to [*shape]."""
    return fold_tasks(jnp.add, values)


def sum_experts(
    experts: ExpertSet,
    name: str,
    part: slice | None,
    read: Callable[[ExpertSet], Array],
) -> jax.Array:
    """The sum of a leaf, or of a part of it, `padded`, over experts that are read a few at a time.

    Args:
      experts: the experts.
      name: of the leaf.
      part: of it; None for all.
      read: some experts to what is added: [c, *shape], float32.

    Returns:
      [*shape], or [m], float32.
    """
    size = math.prod(experts.leaves[name].shape) if part is None else part.stop - part.start
    starts = range(0, experts.num_tasks, max(1, min(_MOST_UNROLLED, _STACK // max(size, 1))))
    chunks = (range(start, min(start + starts.step, experts.num_tasks)) for start in starts)
    total = None
    for chunk in chunks:
        some = padded(read(experts.take(chunk)), part)
        # Computed before the next are read, which may take the same memory.
        total = jax.block_until_ready(_sum(some) if total is None else _add(total, some))
    assert total is not None
    return total


_sum = jax.jit(sum_over_tasks)


@partial(jax.jit, donate_argnums=0)
def _add(total: jax.Array, values: jax.Array) -> jax.Array:
    return total + sum_over_tasks(values)


def check_finite_number(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number."""
    if not jnp.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
