"""Task Arithmetic (arXiv:2212.04089): theta_0 + scaling * sum_t tau_t.

Needs no data for a given scaling; the scaling is usually chosen on labelled validation data (0.3 for
eight vision tasks, from a grid of 0.1 to 1). Computed in float32.
"""

import jax
import jax.numpy as jnp

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import check_finite_number, merge_parts, sum_over_tasks
from retex_jax.typing import Params


@jax.jit
def task_arithmetic_leaf(
    pretrained: jax.Array, task_vectors: jax.Array, scaling: float | jax.Array
) -> jax.Array:
    """Adds the scaled sum of task vectors.

    Args:
      pretrained: [*shape], float32.
      task_vectors: [T, *shape], float32.
      scaling: lambda.

    Returns:
      [*shape], float32.
    """
    return pretrained + scaling * sum_over_tasks(task_vectors)


def fit(experts: ExpertSet, *, key: jax.Array | None = None, scaling: float = 0.3) -> Params:
    """Merges by Task Arithmetic.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      scaling: lambda; 0 gives the pretrained model, 1 / T gives Weight Averaging.

    Returns:
      The merged model.

    Raises:
      ValueError: if `scaling` is not finite.
    """
    del key
    check_finite_number("scaling", scaling)

    def merge_part(name: str, part: slice | None) -> jax.Array:
        pretrained = jnp.asarray(experts.pretrained(name, part), dtype=jnp.float32)
        return task_arithmetic_leaf(pretrained, experts.task_vectors(name, part), scaling)

    return merge_parts(experts, merge_part)
