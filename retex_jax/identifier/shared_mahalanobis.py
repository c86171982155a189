"""Mahalanobis distance with one covariance for all tasks, on the merged model's features.

Linear discriminant analysis without the prior: score_t = -(x - mu_t)^T C^-1 (x - mu_t), C the mean of the
tasks' maximum-likelihood covariances, shrunk towards a multiple of the identity. Unlike the paper's (see
`mahalanobis`) it runs one model, and stores one d x d matrix for any number of tasks. Needs unlabelled
calibration inputs whose task is known. Moments in float64 on the host, once; scores in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.identifier import features as common
from retex_jax.identifier.features import Whitening
from retex_jax.typing import Array

NEEDS = "unlabelled calibration inputs of each task"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedGaussians:
    """Gaussians of one covariance.

    Attributes:
      whitening: by that covariance.
      means: mu_t in whitened coordinates, [T, d], float32.
      normalize: whether features are scaled to unit length first.
    """

    whitening: Whitening
    means: jax.Array
    normalize: bool = field(default=False, metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.means.shape[0]


def fit(
    features_per_task: Sequence[Array], *, shrinkage: float = 0.1, normalize: bool = False
) -> SharedGaussians:
    """Computes the means and the shared covariance.

    Args:
      features_per_task: T arrays [n_t, d] of calibration features.
      shrinkage: see `features.inverse_root`; 0 is the pseudo-inverse.
      normalize: whether to scale every feature to unit length first.

    Returns:
      The Gaussians.

    Raises:
      ValueError: if there is no task, the arrays are not [n_t, d] with one d, a value is NaN or Inf, or
        `shrinkage` is not in [0, 1]; all problems are listed. Or if the inputs of each task are all equal.
    """
    features, problems = common.to_host(features_per_task)
    problems += option_problems(shrinkage=shrinkage)
    if problems:
        raise ValueError("\n".join(problems))
    if normalize:
        features = [common.unit(task) for task in features]
    whitening = Whitening.fit(features, shrinkage)
    means = np.stack([whitening.on_host(task).mean(axis=0) for task in features])
    return SharedGaussians(whitening, jnp.asarray(means, jnp.float32), normalize)


def option_problems(*, shrinkage: float = 0.1, **_: object) -> list[str]:
    """What is wrong with options of `fit` whatever the features are."""
    return common.shrinkage_problems(shrinkage)


@jax.jit
def scores(gaussians: SharedGaussians, features: jax.Array) -> jax.Array:
    """Minus the squared Mahalanobis distance of each feature from each task's mean.

    Args:
      gaussians: from `fit`.
      features: [B, d], float32.

    Returns:
      [B, T], float32, <= 0; larger is likelier.
    """
    white = gaussians.whitening(common.on_device(features, gaussians.normalize))

    def score(mean: jax.Array) -> jax.Array:
        return -jnp.sum((white - mean) ** 2, axis=1)

    return jax.vmap(score, out_axes=1)(gaussians.means)


def add(gaussians: SharedGaussians, features: Array) -> SharedGaussians:
    """Adds a task by its mean; the covariance stays that of the others.

    Args:
      gaussians: from `fit`.
      features: [n, d], of the new task.

    Returns:
      T + 1 Gaussians, of which the first T are as they were.

    Raises:
      ValueError: if the features are not [n, d], or a value is NaN or Inf.
    """
    arrays, problems = common.to_host([features])
    if problems:
        raise ValueError("\n".join(problems))
    own = common.unit(arrays[0]) if gaussians.normalize else arrays[0]
    mean = gaussians.whitening.on_host(own).mean(axis=0)
    means = jnp.concatenate([gaussians.means, jnp.asarray(mean, jnp.float32)[None]])
    return replace(gaussians, means=means)


def take(gaussians: SharedGaussians, tasks: Sequence[int]) -> SharedGaussians:
    """The Gaussians of some tasks only, in this order."""
    return replace(gaussians, means=gaussians.means[np.asarray(tasks)])
