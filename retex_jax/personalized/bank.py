"""T whole experts beside the pretrained model, and their mixtures: what DaWin, SMEAR and WEMoE store.

Leaves are kept in the experts' own dtypes, so nothing is lost and the bytes are those of T models (of the
leaves that are mixed). A mixture is theta_0 + sum_t w_t (theta_t - theta_0), computed in float32, a leaf and a
task at a time, and cast to the leaf's dtype.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.personalized import changes
from retex_jax.typing import Array, FlatParams, Params


def stack(experts: ExpertSet, names: Iterable[str]) -> FlatParams:
    """The named leaves of all experts: [T, *shape], the leaf's dtype (float64 becomes float32)."""
    stacked: FlatParams = {}
    for name in names:
        leaves = [experts.expert(name, task) for task in range(experts.num_tasks)]
        is_host = isinstance(leaves[0], np.ndarray)
        stacked[name] = changes.stored(
            np.stack(leaves) if is_host else jnp.stack(leaves), leaves[0]
        )
    return stacked


def num_tasks(stacked: Mapping[str, Array]) -> int:
    """T."""
    return next(iter(stacked.values())).shape[0]


def mix_leaf(pretrained: Array, stacked: Array, weights: jax.Array) -> jax.Array:
    """theta_0 + sum_t w_t (theta_t - theta_0) of one leaf.

    Args:
      pretrained: [*shape].
      stacked: [T, *shape].
      weights: [T], float32.

    Returns:
      [*shape], dtype of `pretrained`.
    """
    start = jnp.asarray(pretrained, jnp.float32)
    total = start
    for task in range(stacked.shape[0]):
        total = total + weights[task] * (jnp.asarray(stacked[task], jnp.float32) - start)
    return total.astype(pretrained.dtype)


def mix(pretrained: Params, stacked: Mapping[str, Array], weights: Array) -> Params:
    """Mixes the stacked leaves and copies the others from `pretrained`.

    Args:
      pretrained: nested dict.
      stacked: from `stack`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like `pretrained`.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    weights = changes.check_weights(jnp.asarray(weights), num_tasks(stacked))
    flat = tree.flatten(pretrained)
    mixed = {name: mix_leaf(flat[name], leaves, weights) for name, leaves in stacked.items()}
    return tree.unflatten(flat | mixed)
