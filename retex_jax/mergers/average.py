"""Weight Averaging: the mean of the experts (model soups, arXiv:2203.05482, section 2).

Needs no data and no pretrained model. Computed in float32 and stored in the pretrained model's dtype.
"""

import jax

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import merge_parts, sum_over_tasks
from retex_jax.typing import Params


@jax.jit
def average_leaf(experts: jax.Array) -> jax.Array:
    """Mean over tasks: [T, *shape] float32 to [*shape]."""
    return sum_over_tasks(experts) / len(experts)


def fit(experts: ExpertSet, *, key: jax.Array | None = None) -> Params:
    """Averages the experts.

    Args:
      experts: the experts.
      key: not used; every method takes one.

    Returns:
      The merged model.
    """
    del key
    return merge_parts(experts, lambda name, part: average_leaf(experts.stacked(name, part)))
