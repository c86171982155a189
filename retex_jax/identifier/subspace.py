"""The router-free identifier: SVD signatures of the tasks (ReTeX version 2, arXiv:2606.26902v2).

Each task's signature is the subspace of the top right singular vectors of its calibration features,
taken from the merged model. An input's score for a task is minus its projection residual, the distance of
its feature from the task's (affine) subspace; the smallest residual wins. Version 2's abstract leaves rank,
centring, normalisation and feature layer open: all are parameters. Needs unlabelled calibration inputs
whose task is known. Decompositions in float64 on the host, once; scores in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.typing import Array

# Up to this fraction of the largest singular value a direction is rounding of float32 features.
_NO_ENERGY = 1e-6

NEEDS = "unlabelled calibration inputs of each task"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Signatures:
    """The tasks' subspaces.

    Attributes:
      centers: mu_t, [T, d], float32; zeros when not centred.
      bases: V_t, [T, r, d], float32; orthonormal rows, zero rows past a task's own rank.
      normalize: whether features are scaled to unit length first.
    """

    centers: jax.Array
    bases: jax.Array
    normalize: bool = field(default=False, metadata={"static": True})


def fit(
    features_per_task: Sequence[Array],
    rank: int = 8,
    *,
    center: bool = True,
    normalize: bool = False,
    energy: float | None = None,
) -> Signatures:
    """Computes one signature a task.

    Args:
      features_per_task: T arrays [n_t, d] of calibration features.
      rank: dimensions of each subspace; with `energy`, the most dimensions.
      center: whether the subspace passes through the task's mean rather than through the origin.
      normalize: whether to scale every feature to unit length first.
      energy: if given, each task takes only as many dimensions as hold this fraction of its squared
        singular values, in (0, 1].

    Returns:
      The signatures.

    Raises:
      ValueError: if there is no task, the arrays are not [n_t, d] with one d, a value is NaN or Inf,
        `energy` is not in (0, 1], or `rank` is not from 1 to min(n_t, d) - 1 (centring uses up one
        input, and a subspace of d dimensions fits everything); all problems are listed.
    """
    features = [np.asarray(task, dtype=np.float64) for task in features_per_task]
    _check(features, rank, center, energy)
    centers, bases = [], []
    for task in features:
        if normalize:
            task = task / np.maximum(np.linalg.norm(task, axis=1, keepdims=True), 1e-12)
        mean = task.mean(axis=0) if center else np.zeros(task.shape[1])
        _, singular_values, vectors = np.linalg.svd(task - mean, full_matrices=False)
        basis = vectors[:rank].copy()
        basis[singular_values[:rank] <= _NO_ENERGY * singular_values[0]] = 0
        if energy is not None:
            held = np.cumsum(singular_values**2) / max(np.sum(singular_values**2), 1e-300)
            basis[np.searchsorted(held, energy) + 1 :] = 0
        centers.append(mean)
        bases.append(basis)
    return Signatures(
        jnp.asarray(np.stack(centers), jnp.float32),
        jnp.asarray(np.stack(bases), jnp.float32),
        normalize,
    )


@jax.jit
def scores(signatures: Signatures, features: jax.Array) -> jax.Array:
    """Minus the projection residual of each feature on each task's subspace.

    Args:
      signatures: from `fit`.
      features: [B, d], float32.

    Returns:
      [B, T], float32, <= 0; larger is likelier.
    """
    features = jnp.asarray(features, jnp.float32)
    if signatures.normalize:
        norms = jnp.linalg.norm(features, axis=1, keepdims=True)
        features = features / jnp.maximum(norms, 1e-12)

    def score(center: jax.Array, basis: jax.Array) -> jax.Array:
        centered = features - center
        with jax.default_matmul_precision("highest"):
            residual = centered - (centered @ basis.T) @ basis
        return -jnp.linalg.norm(residual, axis=1)

    return jax.vmap(score, out_axes=1)(signatures.centers, signatures.bases)


def _check(features: list[np.ndarray], rank: int, center: bool, energy: float | None) -> None:
    problems = []
    if not features:
        problems.append("features_per_task: got no task")
    for task, array in enumerate(features):
        if array.ndim != 2 or array.shape[1:] != features[0].shape[1:]:
            problems.append(
                f"features_per_task[{task}]: got shape {array.shape}, expected [n, d] with one d"
            )
            continue
        if not np.isfinite(array).all():
            problems.append(f"features_per_task[{task}]: has values that are NaN or Inf")
        largest = min(array.shape[0] - int(center), array.shape[1] - 1)
        is_integer = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
        if not is_integer or not 1 <= rank <= largest:
            problems.append(
                f"rank: got {rank!r}, expected 1 to {largest} for task {task}, "
                f"which has {array.shape[0]} inputs of {array.shape[1]} features"
            )
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy: got {energy!r}, expected a fraction in (0, 1]")
    if problems:
        raise ValueError("\n".join(problems))
