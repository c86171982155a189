"""TIES-Merging (arXiv:2306.01708): trim, elect sign, disjoint merge.

Trimming and the majority sign are global, over the whole flattened model. The k-th largest magnitude of
each task is found exactly without sorting or stacking the model: a float32 magnitude orders like its bit
pattern; a sample brackets the pattern, and one pass over the model counts what lies above the bracket and
makes a histogram of what lies inside. Where the sample misleads, histograms of all patterns, coarse and then
fine, find it. Arithmetic is in float32.
"""

import math
import threading
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import (
    Leaves,
    check_finite_number,
    fold_tasks,
    map_parts,
    merge_leaves,
    padded,
    sum_over_tasks,
)
from retex_jax.typing import Array, Params

# Bins of a histogram, at most and, of many tasks, at least; and those of all tasks' histograms.
_BINS = 1 << 20
_LEAST_BINS = 1 << 12
_ALL_BINS = 1 << 23
_ALL = 1 << 31  # bit patterns of magnitudes
_SAMPLE = 1 << 17
_CANCELLED = 2  # instead of a sign

Cancelled = tuple[np.ndarray, np.ndarray]
"""Positions in a flattened leaf or part where values cancel, and what a positive majority makes of them."""

DEFAULT_SCALING = {"mean": 1.0, "sum": 0.3}


@jax.jit
def elect_signs(task_vectors: jax.Array, majority_sign: float | jax.Array) -> jax.Array:
    """Elects one sign per parameter by total mass. TIES (arXiv:2306.01708, section 3.1), step 2.

    A sum of zero takes the majority sign of the whole model, as the authors' code does.

    Args:
      task_vectors: trimmed, [T, *shape], float32.
      majority_sign: of the whole model: -1 or +1.

    Returns:
      Signs in {-1, +1}, [*shape], float32.
    """
    signs = jnp.sign(sum_over_tasks(task_vectors))
    return jnp.where(signs == 0, majority_sign, signs)


@jax.jit
def trim(task_vectors: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Zeroes what is smaller in magnitude than its task's threshold; ties are kept.

    Args:
      task_vectors: [T, *shape], float32.
      thresholds: [T], float32.

    Returns:
      [T, *shape], float32.
    """
    limits = thresholds.reshape(-1, *[1] * (task_vectors.ndim - 1))
    return jnp.where(jnp.abs(task_vectors) >= limits, task_vectors, 0.0)


@jax.jit(static_argnames="merge")
def disjoint_merge(
    task_vectors: jax.Array, signs: jax.Array, merge: Literal["mean", "sum"]
) -> jax.Array:
    """Merges, per parameter, only the values that have the elected sign. Step 3.

    Args:
      task_vectors: trimmed, [T, *shape], float32.
      signs: elected, in {-1, +1}, [*shape].
      merge: "mean" over the agreeing nonzero values, or their "sum".

    Returns:
      The merged task vector, [*shape], float32; 0 where nothing agrees.
    """

    # Task by task: XLA makes one loop of it on a CPU, a quarter of the time of [T, *shape] in between.
    def agreeing(one: jax.Array) -> jax.Array:
        return jnp.where(one * signs > 0, one, 0.0)

    total = fold_tasks(jnp.add, task_vectors, agreeing)
    if merge == "sum":
        return total
    counts = fold_tasks(jnp.add, task_vectors, lambda one: (agreeing(one) != 0).astype(jnp.float32))
    return total / jnp.maximum(counts, 1)


@jax.jit
def _elect(trimmed: jax.Array) -> jax.Array:
    """Signs where their sum is not zero, `_CANCELLED` where values cancel, 0 where there are none: [*shape], int8."""
    signs = elect_signs(trimmed, 0.0)
    is_kept = fold_tasks(jnp.logical_or, trimmed, lambda one: one != 0)
    return jnp.where((signs == 0) & is_kept, _CANCELLED, signs).astype(jnp.int8)


@jax.jit(static_argnames="merge")
def _ties_leaf(
    pretrained: Array,
    task_vectors: Array,
    limits: Array,
    majority_sign: float | jax.Array,
    scaling: float | jax.Array,
    merge: Literal["mean", "sum"],
) -> tuple[jax.Array, jax.Array]:
    """The merged leaf, float32, and what was elected in it, see `_elect`."""
    pretrained = jnp.asarray(pretrained, jnp.float32)
    trimmed = trim(task_vectors, limits)
    # Elected once: XLA would sum the tasks anew for each of them that is compared with the sum's sign.
    elected = jax.lax.optimization_barrier(_elect(trimmed))
    signs = jnp.where(elected == _CANCELLED, majority_sign, elected.astype(jnp.float32))
    return pretrained + scaling * disjoint_merge(trimmed, signs, merge), elected


def thresholds(experts: ExpertSet, density: float) -> np.ndarray:
    """The magnitude of each task's k-th largest task-vector entry, k = floor(density * size).

    Args:
      experts: the experts.
      density: fraction kept, in (0, 1].

    Returns:
      [T], float32; exact. At least one entry a task is kept.
    """
    size = sum(int(np.prod(experts.leaves[name].shape)) for name in experts.float_leaves)
    keep = max(1, int(density * size))
    low, high = _sampled_brackets(experts, keep / size, size)
    while True:
        shift = _shift(high - low, _most_bins(experts.num_tasks))
        counts, above = _histograms(experts, low, high, shift)
        at_least = above[:, None] + counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        chosen = (at_least >= keep).sum(axis=1) - 1
        is_missed = (above >= keep) | (chosen < 0)
        low = np.where(is_missed, 0, low + (chosen << shift))
        high = np.where(is_missed, _ALL, np.minimum(low + (1 << shift), _ALL))
        if np.all(high - low == 1):
            return low.astype(np.uint32).view(np.float32)


def _most_bins(num_tasks: int) -> int:
    """Bins of a task's histogram, whose memory does not grow with the tasks until these are thousands."""
    return min(_BINS, max(_LEAST_BINS, _ALL_BINS // num_tasks))


def _shift(widths: np.ndarray, most_bins: int) -> np.ndarray:
    """How many low bits are left out, so that brackets of these widths have no more bins than these."""
    return np.maximum(0, np.ceil(np.log2(np.maximum(widths, 1) / most_bins))).astype(np.int64)


def _sampled_brackets(
    experts: ExpertSet, density: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bit patterns [low, high) between which each task's threshold lies, if a sample is a fair one."""
    step = max(1, size // _SAMPLE)
    sample = np.concatenate(
        [_magnitude_bits(experts, name, step) for name in experts.float_leaves], axis=1
    )
    sample.sort(axis=1)
    count = sample.shape[1]
    rank = (1 - density) * count
    margin = 5 * math.sqrt(density * rank) + 2
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    low = sample[:, first].astype(np.int64) if first > 0 else np.zeros(len(sample), np.int64)
    high = sample[:, last] + np.int64(1) if last < count else np.full(len(sample), _ALL)
    return low, high


def _magnitude_bits(experts: ExpertSet, name: str, step: int) -> np.ndarray:
    """Bit patterns of every step-th magnitude of a leaf: [T, n], uint32."""
    if None in experts.parts(name):
        whole = np.asarray(experts.task_vectors(name)).reshape(experts.num_tasks, -1)
        values = whole[:, ::step]
    else:
        values = np.asarray(experts.task_vectors(name, slice(None, None, step)))
    return np.abs(values).view(np.uint32)


def _histograms(
    experts: ExpertSet, low: np.ndarray, high: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Histograms of each task's bit patterns in [low, high), and the count of those above."""
    bins = int(((high - low - 1) >> shift).max()) + 1
    counts = np.zeros((experts.num_tasks, bins), np.int64)
    above = np.zeros(experts.num_tasks, np.int64)
    waiting: list[list[np.ndarray]] = [[] for _ in counts]  # many at once are counted faster
    num_waiting = np.zeros(experts.num_tasks, np.int64)
    most_waiting = _most_bins(experts.num_tasks)
    lock = threading.Lock()

    def add(task: int) -> None:
        counts[task] += np.bincount(np.concatenate(waiting[task]), minlength=bins)
        waiting[task].clear()
        num_waiting[task] = 0

    def count(name: str, part: slice | None) -> None:
        task_vectors = experts.task_vectors(name, part)
        own = np.asarray(task_vectors) if part is not None else np.array(task_vectors)
        patterns = own.reshape(len(low), -1).view(np.uint32)
        patterns &= np.uint32(_ALL - 1)
        patterns -= low.astype(np.uint32)[:, None]  # what is below `low` wraps to above 2^31
        for task, bits in enumerate(patterns):
            inside = bits[bits < np.uint32(high[task] - low[task])]
            beyond = np.count_nonzero(bits < _ALL) - inside.size
            with lock:
                waiting[task].append(inside >> np.uint32(shift[task]))
                num_waiting[task] += inside.size
                above[task] += beyond
                if num_waiting[task] > most_waiting:
                    add(task)

    for _ in map_parts(experts, count):
        pass
    for task in np.flatnonzero(num_waiting):
        add(int(task))
    return counts, above


@jax.jit
def _balance(task_vectors: jax.Array, limits: jax.Array) -> jax.Array:
    """The sum of the signs that a leaf elects: int32."""
    return elect_signs(trim(task_vectors, limits), 0.0).sum(dtype=jnp.int32)


def majority_sign(experts: ExpertSet, limits: Array) -> float:
    """Sign of the sum over the model of the elected signs; -1 when they cancel, as the code does."""

    def balance(name: str, part: slice | None) -> int:
        return int(_balance(experts.task_vectors(name, part), limits))

    total = sum(sum(pieces) for _, pieces in map_parts(experts, balance))
    return 1.0 if total > 0 else -1.0


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    density: float = 0.2,
    merge: Literal["mean", "sum"] = "mean",
    scaling: float | None = None,
) -> Params:
    """Merges by TIES.

    The paper and its code agree but for one entry: the code keeps floor(density * size) + 1 values a
    task, the paper (and this) the top floor(density * size), in both with everything that ties.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      density: fraction of each task vector that is kept, in (0, 1].
      merge: "mean" as TIES, or "sum" as AdaMerging and others use it. The two need different scalings.
      scaling: lambda on the merged task vector; 1.0 for "mean" and 0.3 for "sum" when not given.

    Returns:
      The merged model.

    Raises:
      ValueError: if `density` is not in (0, 1], `merge` is unknown or `scaling` is not finite.
    """
    del key
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density!r}, expected a fraction in (0, 1]")
    if merge not in DEFAULT_SCALING:
        raise ValueError(f"merge: got {merge!r}, expected one of {sorted(DEFAULT_SCALING)}")
    scaling = DEFAULT_SCALING[merge] if scaling is None else scaling
    check_finite_number("scaling", scaling)
    limits = thresholds(experts, density)
    leaves = Leaves(experts)

    def merge_part(name: str, part: slice | None) -> tuple[int, Cancelled | None]:
        pretrained = padded(experts.pretrained(name, part), part)
        task_vectors = padded(experts.task_vectors(name, part), part)
        merged, elected = _ties_leaf(pretrained, task_vectors, limits, -1.0, scaling, merge)
        leaves.put(name, part, merged)
        signs = np.asarray(elected).reshape(-1)
        positions = np.flatnonzero(signs == _CANCELLED)
        balance = int(signs.sum(dtype=np.int64)) - _CANCELLED * len(positions)
        if not len(positions):
            return balance, None
        other, _ = _ties_leaf(pretrained, task_vectors, limits, 1.0, scaling, merge)
        return balance, (positions, np.asarray(other).reshape(-1)[positions])

    # The majority is known after all leaves, and matters only where values cancel: seldom.
    total, cancelled = 0, []
    for name, pieces in map_parts(experts, merge_part):
        for part, (balance, values) in zip(experts.parts(name), pieces, strict=True):
            total += balance
            if values is not None:
                cancelled.append((name, part, *values))
    if total > 0:
        for name, part, positions, values in cancelled:
            leaves.amend(name, part, positions, values)
    return merge_leaves(experts, leaves.take)
