"""What the identifiers do with features before anything else: checks, unit length, whitening.

On the host in float64, once; on the device in float32, products at the highest precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.typing import Array

# Up to this fraction of the largest standard deviation a direction is rounding of float32 features.
_ROUNDING = 1e-6


def to_host(features_per_task: Sequence[Array]) -> tuple[list[np.ndarray], list[str]]:
    """Reads features of T tasks.

    Args:
      features_per_task: T arrays that should be [n_t, d] with one d, and finite.

    Returns:
      The arrays, float64, and what is wrong with them.
    """
    arrays = [np.asarray(task, dtype=np.float64) for task in features_per_task]
    problems = [] if arrays else ["features_per_task: got no task"]
    for task, array in enumerate(arrays):
        if array.ndim != 2 or not array.size or array.shape[1:] != arrays[0].shape[1:]:
            problems.append(
                f"features_per_task[{task}]: got shape {array.shape}, expected [n, d] with one d"
            )
        elif not np.isfinite(array).all():
            problems.append(f"features_per_task[{task}]: has values that are NaN or Inf")
    return arrays, problems


def unit(features: np.ndarray) -> np.ndarray:
    """Scales rows [..., d] to unit length; a row of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def on_device(features: Array, normalize: bool) -> jax.Array:
    """Features [..., d] as float32, scaled to unit length if asked for."""
    features = jnp.asarray(features, jnp.float32)
    if not normalize:
        return features
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def shrinkage_problems(shrinkage: float) -> list[str]:
    """What is wrong with a shrinkage: nothing if it is from 0 to 1."""
    if not isinstance(shrinkage, bool) and 0 <= shrinkage <= 1:
        return []
    return [f"shrinkage: got {shrinkage!r}, expected a fraction in [0, 1]"]


def covariance(features: np.ndarray) -> np.ndarray:
    """Maximum-likelihood covariance of [n, d]: [d, d], the mean of n outer products."""
    centered = features - features.mean(axis=0)
    return centered.T @ centered / len(features)


def has_spread(features: np.ndarray) -> bool:
    """Whether [n, d] differ by more than rounding of float32 features."""
    return bool(
        np.trace(covariance(features)) > _ROUNDING**2 * np.mean(np.sum(features**2, axis=1))
    )


def inverse_root(matrix: np.ndarray, shrinkage: float) -> np.ndarray:
    """Symmetric root of the pseudo-inverse of a covariance that is shrunk to a multiple of the identity.

    Args:
      matrix: C, [d, d], positive semi-definite, not 0.
      shrinkage: s; what is inverted is (1 - s) C + s tr(C)/d I. With 0 directions without variance get no
        weight.

    Returns:
      [d, d], float64.
    """
    width = len(matrix)
    shrunk = (1 - shrinkage) * matrix + shrinkage * np.trace(matrix) / width * np.eye(width)
    values, vectors = np.linalg.eigh(shrunk)
    deviations = np.sqrt(np.maximum(values, 0))
    kept = deviations > _ROUNDING * deviations[-1]
    return (vectors[:, kept] / deviations[kept]) @ vectors[:, kept].T


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whitening:
    """The coordinates in which the covariance within tasks is the identity: (x - origin) root.

    Attributes:
      origin: the mean of the tasks' means, [d], float32.
      root: symmetric, [d, d], float32.
    """

    origin: jax.Array
    root: jax.Array

    @classmethod
    def fit(cls, features: Sequence[np.ndarray], shrinkage: float) -> "Whitening":
        """Fits the covariance that tasks share: the mean of theirs, however many inputs each has.

        Args:
          features: T arrays [n_t, d], float64.
          shrinkage: see `inverse_root`.

        Returns:
          The whitening.

        Raises:
          ValueError: if the inputs of each task are all equal.
        """
        if not any(has_spread(task) for task in features):
            raise ValueError(
                "features_per_task: the inputs of each task are all equal, so they have no covariance"
            )
        shared = np.mean([covariance(task) for task in features], axis=0)
        origin = np.mean([task.mean(axis=0) for task in features], axis=0)
        root = inverse_root(shared, shrinkage)
        return cls(jnp.asarray(origin, jnp.float32), jnp.asarray(root, jnp.float32))

    def on_host(self, features: np.ndarray) -> np.ndarray:
        """[..., d] to [..., d], float64, with the stored numbers."""
        origin, root = (np.asarray(part, np.float64) for part in (self.origin, self.root))
        return (features - origin) @ root

    def __call__(self, features: jax.Array) -> jax.Array:
        """[..., d] to [..., d], float32."""
        return jnp.matmul(features - self.origin, self.root, precision="highest")
