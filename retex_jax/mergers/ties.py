"""TIES-Merging (arXiv:2306.01708): trim, elect sign, disjoint merge.

Trimming and the majority sign are global, over the whole flattened model. The trimming threshold is
found exactly without sorting or stacking the model: a float32 magnitude orders like its bit pattern, so
two passes of histograms (upper, then lower 16 bits) give the k-th largest magnitude of each task. Memory
is one leaf's stack. Arithmetic is in float32.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import check_finite_number, merge_leaves, sum_over_tasks
from retex_jax.typing import Params

_BINS = 1 << 16

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
    agreeing = jnp.where(task_vectors * signs > 0, task_vectors, 0.0)
    total = sum_over_tasks(agreeing)
    if merge == "sum":
        return total
    return total / jnp.maximum(sum_over_tasks((agreeing != 0).astype(jnp.int32)), 1)


def thresholds(experts: ExpertSet, density: float) -> np.ndarray:
    """The magnitude of each task's k-th largest task-vector entry, k = floor(density * size).

    Args:
      experts: the experts.
      density: fraction kept, in (0, 1].

    Returns:
      [T], float32; exact. At least one entry a task is kept.
    """
    size = sum(int(np.prod(experts.leaves[name].shape)) for name in experts.float_leaves)
    keep = np.full(experts.num_tasks, max(1, int(density * size)))
    upper, above = _select_bin(experts, keep, prefix=None)
    lower, _ = _select_bin(experts, keep - above, prefix=upper)
    return (upper.astype(np.uint32) * _BINS + lower.astype(np.uint32)).view(np.float32)


def _select_bin(
    experts: ExpertSet, keep: np.ndarray, prefix: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The bin of 16 bits that holds each task's keep-th largest magnitude, and the count above it."""
    counts = np.zeros((experts.num_tasks, _BINS), dtype=np.int64)
    for name in experts.float_leaves:
        magnitudes = np.abs(np.asarray(experts.task_vectors(name)))
        bits = magnitudes.reshape(experts.num_tasks, -1).view(np.uint32)
        for task in range(experts.num_tasks):
            half = bits[task] >> 16
            if prefix is not None:
                half = bits[task][half == prefix[task]] & (_BINS - 1)
            counts[task] += np.bincount(half, minlength=_BINS)
    at_least = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    chosen = (at_least >= keep[:, None]).sum(axis=1) - 1
    rows = np.arange(experts.num_tasks)
    return chosen, at_least[rows, chosen] - counts[rows, chosen]


def majority_sign(experts: ExpertSet, limits: jax.Array) -> float:
    """Sign of the sum over the model of the elected signs; -1 when they cancel, as the code does."""
    total = 0
    for name in experts.float_leaves:
        trimmed = trim(experts.task_vectors(name), limits)
        total += int(jnp.sign(sum_over_tasks(trimmed)).sum(dtype=jnp.int32))
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
    limits = jnp.asarray(thresholds(experts, density))
    majority = majority_sign(experts, limits)

    def merge_leaf(name: str) -> jax.Array:
        trimmed = trim(experts.task_vectors(name), limits)
        merged = disjoint_merge(trimmed, elect_signs(trimmed, majority), merge)
        return jnp.asarray(experts.pretrained(name), dtype=jnp.float32) + scaling * merged

    return merge_leaves(experts, merge_leaf)
