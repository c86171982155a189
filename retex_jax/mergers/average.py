"""Weight Averaging: the mean of the experts (model soups, arXiv:2203.05482, section 2).

Needs no data and no pretrained model. Computed in float32 and stored in the pretrained model's dtype.
"""

from functools import partial

import jax

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import merge_parts, sum_experts
from retex_jax.typing import Params


def average(experts: ExpertSet, name: str, part: slice | None = None) -> jax.Array:
    """Mean over tasks of one leaf, [*shape], or of one of its parts, `padded`, [m]; float32."""
    total = sum_experts(experts, name, part, lambda some: some.stacked(name, part))
    return total / experts.num_tasks


def fit(experts: ExpertSet, *, key: jax.Array | None = None) -> Params:
    """Averages the experts.

    Args:
      experts: the experts.
      key: not used; every method takes one.

    Returns:
      The merged model.
    """
    del key
    return merge_parts(experts, partial(average, experts))
