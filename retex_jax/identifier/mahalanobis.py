"""Training-free routing by one Gaussian a task (ReTeX, arXiv:2606.26902, appendix E, Eqs. 17 and 18).

score_t = -(f_t - mu_t)^T C_t^-1 (f_t - mu_t), where f_t is the input's feature from *expert* t: an input of
unknown task runs through all experts up to the layer, T passes instead of one. The paper inverts C_t, which has
no inverse with fewer than d + 1 calibration inputs, and leaves the estimate open: here it is the
maximum-likelihood covariance, shrunk towards a multiple of the identity. There is no determinant term, as in
the paper, so that a wide Gaussian is preferred to a narrow one.

With [B, d] instead of [T, B, d] the same features serve all tasks: those of the merged model, say. Needs
unlabelled calibration inputs whose task is known, and the experts, or recovered ones, at inference. Moments
in float64 on the host, once; scores in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.identifier import features as common
from retex_jax.typing import Array

NEEDS = "unlabelled calibration inputs of each task; all experts at inference"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaussians:
    """A Gaussian a task.

    Attributes:
      means: mu_t, [T, d], float32.
      roots: C_t^(-1/2), symmetric, [T, d, d], float32.
      normalize: whether features are scaled to unit length first.
      shrinkage: of the covariances, for tasks that are added.
    """

    means: jax.Array
    roots: jax.Array
    normalize: bool = field(default=False, metadata={"static": True})
    shrinkage: float = field(default=0.1, metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.means.shape[0]


def fit(
    features_per_task: Sequence[Array], *, shrinkage: float = 0.1, normalize: bool = False
) -> Gaussians:
    """Computes a mean and a covariance a task.

    Args:
      features_per_task: T arrays [n_t, d] of calibration features, task t's from expert t.
      shrinkage: see `features.inverse_root`; 0 is the pseudo-inverse.
      normalize: whether to scale every feature to unit length first.

    Returns:
      The Gaussians.

    Raises:
      ValueError: if there is no task, the arrays are not [n_t, d] with one d, a value is NaN or Inf, the
        inputs of a task are all equal, or `shrinkage` is not in [0, 1]; all problems are listed.
    """
    features, problems = common.to_host(features_per_task)
    if not problems:
        features = [common.unit(task) for task in features] if normalize else features
        problems += [
            f"features_per_task[{task}]: the inputs are all equal, so they have no covariance"
            for task, array in enumerate(features)
            if not common.has_spread(array)
        ]
    problems += option_problems(shrinkage=shrinkage)
    if problems:
        raise ValueError("\n".join(problems))
    means = np.stack([task.mean(axis=0) for task in features])
    roots = np.stack([common.inverse_root(common.covariance(task), shrinkage) for task in features])
    return Gaussians(
        jnp.asarray(means, jnp.float32), jnp.asarray(roots, jnp.float32), normalize, shrinkage
    )


def option_problems(*, shrinkage: float = 0.1, **_: object) -> list[str]:
    """What is wrong with options of `fit` whatever the features are."""
    return common.shrinkage_problems(shrinkage)


@jax.jit
def scores(gaussians: Gaussians, features: jax.Array) -> jax.Array:
    """Minus the squared Mahalanobis distance of each input from each task's Gaussian (Eq. 17).

    Args:
      gaussians: from `fit`.
      features: [T, B, d], float32, the inputs' features from expert t; or [B, d], the same for all tasks.

    Returns:
      [B, T], float32, <= 0; larger is likelier.

    Raises:
      ValueError: if the features are of another number of experts.
    """
    features = common.on_device(features, gaussians.normalize)
    if features.ndim == 3 and features.shape[0] != gaussians.num_tasks:
        raise ValueError(
            f"features: got shape {features.shape}, expected [{gaussians.num_tasks}, B, d], "
            "of every expert"
        )

    def score(mean: jax.Array, root: jax.Array, own: jax.Array) -> jax.Array:
        white = jnp.matmul(own - mean, root, precision="highest")
        return -jnp.sum(white**2, axis=1)

    axes = (0, 0, 0 if features.ndim == 3 else None)
    mapped = jax.vmap(score, in_axes=axes, out_axes=1)
    return mapped(gaussians.means, gaussians.roots, features)


def add(gaussians: Gaussians, features: Array) -> Gaussians:
    """Adds a task, shrunk as the others.

    Args:
      gaussians: from `fit`.
      features: [n, d], of the new task, from its expert.

    Returns:
      T + 1 Gaussians, of which the first T are as they were.

    Raises:
      ValueError: as `fit`.
    """
    own = fit([features], shrinkage=gaussians.shrinkage, normalize=gaussians.normalize)
    return replace(
        gaussians,
        means=jnp.concatenate([gaussians.means, own.means]),
        roots=jnp.concatenate([gaussians.roots, own.roots]),
    )


def take(gaussians: Gaussians, tasks: Sequence[int]) -> Gaussians:
    """The Gaussians of some tasks only, in this order."""
    rows = np.asarray(tasks)
    return replace(gaussians, means=gaussians.means[rows], roots=gaussians.roots[rows])
