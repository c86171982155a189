"""The router-free identifier: SVD signatures of the tasks (ReTeX version 2, arXiv:2606.26902v2).

Each task's signature is the subspace of the top right singular vectors of its calibration features,
taken from the merged model. An input's score for a task is minus its projection residual, the distance of
its feature from the task's (affine) subspace; the smallest residual wins. Version 2's abstract leaves rank,
centring, normalisation and feature layer open: all are parameters, and so is whitening by the covariance
that the tasks share, which measures residuals in units of the spread within tasks. Needs unlabelled
calibration inputs whose task is known. Decompositions in float64 on the host, once; scores in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.identifier import features as common
from retex_jax.identifier.features import Whitening
from retex_jax.typing import Array

# Up to this fraction of the largest singular value a direction is rounding of float32 features.
_NO_ENERGY = 1e-6

NEEDS = "unlabelled calibration inputs of each task"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Signatures:
    """The tasks' subspaces.

    Attributes:
      centers: mu_t, [T, d], float32; when not centred, the zero feature (in whitened coordinates, if any).
      bases: V_t, [T, r, d], float32; orthonormal rows, zero rows past a task's own rank.
      normalize: whether features are scaled to unit length first.
      whitening: after that, and before all else, or None.
    """

    centers: jax.Array
    bases: jax.Array
    normalize: bool = field(default=False, metadata={"static": True})
    whitening: Whitening | None = None

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.centers.shape[0]


def fit(
    features_per_task: Sequence[Array],
    rank: int = 8,
    *,
    center: bool = True,
    normalize: bool = False,
    energy: float | None = None,
    whiten: bool = False,
    shrinkage: float = 0.1,
) -> Signatures:
    """Computes one signature a task.

    Args:
      features_per_task: T arrays [n_t, d] of calibration features.
      rank: dimensions of each subspace; with `energy`, the most dimensions.
      center: whether the subspace passes through the task's mean rather than through the origin.
      normalize: whether to scale every feature to unit length first.
      energy: if given, each task takes only as many dimensions as hold this fraction of its squared
        singular values, in (0, 1].
      whiten: whether to divide by the root of the covariance within tasks, after normalising.
      shrinkage: of that covariance; see `features.inverse_root`.

    Returns:
      The signatures.

    Raises:
      ValueError: if there is no task, the arrays are not [n_t, d] with one d, a value is NaN or Inf,
        `energy` is not in (0, 1], `shrinkage` is not in [0, 1], or `rank` is not from 1 to min(n_t, d) - 1
        (centring uses up one input, and a subspace of d dimensions fits everything); all problems are
        listed. Or if there is no covariance to whiten by.
    """
    features, problems = common.to_host(features_per_task)
    problems += _rank_problems(features, rank, center)
    problems += option_problems(energy=energy, shrinkage=shrinkage)
    if problems:
        raise ValueError("\n".join(problems))
    if normalize:
        features = [common.unit(task) for task in features]
    whitening = Whitening.fit(features, shrinkage) if whiten else None
    signatures = [_signature(task, rank, center, energy, whitening) for task in features]
    centers, bases = (np.stack(parts) for parts in zip(*signatures, strict=True))
    return Signatures(
        jnp.asarray(centers, jnp.float32), jnp.asarray(bases, jnp.float32), normalize, whitening
    )


def option_problems(
    *, energy: float | None = None, shrinkage: float = 0.1, **_: object
) -> list[str]:
    """What is wrong with options of `fit` whatever the features are."""
    problems = []
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy: got {energy!r}, expected a fraction in (0, 1]")
    return problems + common.shrinkage_problems(shrinkage)


@jax.jit
def scores(signatures: Signatures, features: jax.Array) -> jax.Array:
    """Minus the projection residual of each feature on each task's subspace.

    Args:
      signatures: from `fit`.
      features: [B, d], float32.

    Returns:
      [B, T], float32, <= 0; larger is likelier.
    """
    features = common.on_device(features, signatures.normalize)
    if signatures.whitening is not None:
        features = signatures.whitening(features)

    def score(center: jax.Array, basis: jax.Array) -> jax.Array:
        centered = features - center
        with jax.default_matmul_precision("highest"):
            residual = centered - (centered @ basis.T) @ basis
        return -jnp.linalg.norm(residual, axis=1)

    return jax.vmap(score, out_axes=1)(signatures.centers, signatures.bases)


def add(signatures: Signatures, features: Array) -> Signatures:
    """Adds a task, with the rank, centring, normalisation and whitening of the others.

    Args:
      signatures: from `fit`.
      features: [n, d], of the new task.

    Returns:
      T + 1 signatures, of which the first T are as they were.

    Raises:
      ValueError: as `fit`.
    """
    rank, whitening = signatures.bases.shape[1], signatures.whitening
    width = signatures.bases.shape[2]
    uncentered = np.float32(_zero(width, whitening))
    center = bool(np.any(np.asarray(signatures.centers) != uncentered))
    arrays, problems = common.to_host([features])
    problems += _rank_problems(arrays, rank, center)
    if problems:
        raise ValueError("\n".join(problems))
    own = common.unit(arrays[0]) if signatures.normalize else arrays[0]
    mean, basis = _signature(own, rank, center, None, whitening)
    return replace(
        signatures,
        centers=jnp.concatenate([signatures.centers, jnp.asarray(mean, jnp.float32)[None]]),
        bases=jnp.concatenate([signatures.bases, jnp.asarray(basis, jnp.float32)[None]]),
    )


def take(signatures: Signatures, tasks: Sequence[int]) -> Signatures:
    """The signatures of some tasks only, in this order."""
    rows = np.asarray(tasks)
    return replace(signatures, centers=signatures.centers[rows], bases=signatures.bases[rows])


def _zero(width: int, whitening: Whitening | None) -> np.ndarray:
    zero = np.zeros(width)
    return zero if whitening is None else whitening.on_host(zero)


def _signature(
    features: np.ndarray,
    rank: int,
    center: bool,
    energy: float | None,
    whitening: Whitening | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Center [d] and basis [rank, d] of one task's features, which are normalised already."""
    zero = _zero(features.shape[1], whitening)
    if whitening is not None:
        features = whitening.on_host(features)
    mean = features.mean(axis=0) if center else zero
    _, singular_values, vectors = np.linalg.svd(features - mean, full_matrices=False)
    basis = vectors[:rank].copy()
    basis[singular_values[:rank] <= _NO_ENERGY * singular_values[0]] = 0
    if energy is not None:
        held = np.cumsum(singular_values**2) / max(np.sum(singular_values**2), 1e-300)
        basis[np.searchsorted(held, energy) + 1 :] = 0
    return mean, basis


def _rank_problems(features: list[np.ndarray], rank: int, center: bool) -> list[str]:
    problems = []
    is_integer = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    for task, array in enumerate(features):
        if array.ndim != 2 or array.shape[1:] != features[0].shape[1:]:
            continue
        largest = min(array.shape[0] - int(center), array.shape[1] - 1)
        if not is_integer or not 1 <= rank <= largest:
            problems.append(
                f"rank: got {rank!r}, expected 1 to {largest} for task {task}, "
                f"which has {array.shape[0]} inputs of {array.shape[1]} features"
            )
    return problems
