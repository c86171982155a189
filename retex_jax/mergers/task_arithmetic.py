"""Task Arithmetic (arXiv:2212.04089): theta_0 + scaling * sum_t tau_t.

Needs no data for a given scaling; the scaling is usually chosen on labelled validation data (0.3 for
eight vision tasks, from a grid of 0.1 to 1). Computed in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import check_finite_number, merge_parts, padded, sum_experts
from retex_jax.typing import Params


def add_task_vectors(
    experts: ExpertSet, name: str, part: slice | None = None, *, scaling: float
) -> jax.Array:
    """theta_0 + scaling * sum_t tau_t of one leaf, [*shape], or of one of its parts, `padded`, [m]; float32."""
    pretrained = jnp.asarray(padded(experts.pretrained(name, part), part), dtype=jnp.float32)
    total = sum_experts(experts, name, part, lambda some: some.task_vectors(name, part))
    return pretrained + scaling * total


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
    return merge_parts(experts, partial(add_task_vectors, experts, scaling=scaling))
