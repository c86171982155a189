"""The SVD baseline: a truncated SVD of every expert's task vector.

The baseline of DTS ("Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging",
appendix B.1): the SVD of each matrix of tau_t, of which "only the top-r singular values" are kept, r being a
proportion as in DTS, chosen so that storage is comparable; leaves below two axes are kept unchanged. The
paper's AMR of it is larger than DTS' (5.87% against 3.68% on ViT-B/32), so that comparison is not at equal
bytes: here the budget is exact. Needs no data.

Numerics: see `low_rank`; factors are stored in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.personalized import changes, low_rank
from retex_jax.typing import Array, FlatParams, Layout, Params, ProgressFn

DEFAULT_RANK_RATIO = 0.3 / 16
"""As many bytes as DTS at its default of 0.3: 32 bits an element against two."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SvdState:
    """A base model and the low-rank differences of T experts from it.

    Attributes:
      base: nested dict, the pretrained model's shapes and dtypes.
      left: U Sigma, by matrix leaf: [T, a, k], float32.
      right: V^T, by matrix leaf: [T, k, b], float32, orthonormal rows.
      whole: differences of the other float leaves: [T, *shape], float32.
      layout: which axis of a kernel is the output.
    """

    base: Params
    left: FlatParams
    right: FlatParams
    whole: FlatParams
    layout: Layout = field(metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return next(iter({**self.left, **self.whole}.values())).shape[0]


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    rank: int | None = None,
    rank_ratio: float | None = None,
    bytes_per_task: float | None = None,
    amr: float | None = None,
    base: str | None = None,
    base_options: Mapping[str, Any] | None = None,
    group_bytes: int = 1 << 26,
    progress: ProgressFn | None = None,
) -> SvdState:
    """Truncates the SVD of every expert's difference from a base.

    At most one of the four sizes is given; `rank_ratio` is 0.3 / 16 when none is. A leaf whose rank is
    min(a, b) is kept whole, which is exact and takes fewer bytes than its factors.

    Args:
      experts: the experts.
      key: typed PRNG key for the base merger.
      rank: k of every matrix leaf, at most its min(a, b).
      rank_ratio: keeps rank floor(rank_ratio * min(a, b)), at least 1.
      bytes_per_task: keeps the largest rank ratio that stores no more bytes a task than this.
      amr: the same, as a fraction of the model's bytes.
      base: name of a merger; None means the pretrained model, and so task vectors.
      base_options: keywords of that merger.
      group_bytes: see `low_rank.decompose`.
      progress: see `low_rank.decompose`.

    Returns:
      The state.

    Raises:
      ValueError: if a size is out of range, too small or one of several, or the base is unknown.
    """
    low_rank.check_sizes(rank=rank, rank_ratio=rank_ratio, bytes_per_task=bytes_per_task, amr=amr)
    budget = low_rank.byte_budget(experts, bytes_per_task, amr)
    ranks = {name: plan.shape for name, plan in low_rank.matrix_plans(experts, min).items()}
    if budget is not None:
        sizes = {name: math.prod(experts.leaves[name].shape) for name in experts.float_leaves}
        small = sum(4 * size for name, size in sizes.items() if name not in ranks)
        rank_ratio = low_rank.largest_ratio(ranks.values(), _matrix_bytes, budget - small)
    ratio = DEFAULT_RANK_RATIO if rank_ratio is None else rank_ratio
    plans = low_rank.matrix_plans(
        experts,
        lambda shape: low_rank.leaf_rank(shape, ratio) if rank is None else min(rank, *shape),
    )
    plans = {name: plan for name, plan in plans.items() if plan.rank < min(plan.shape)}
    merged = low_rank.base_model(experts, base, base_options, key)
    flat = tree.flatten(merged)
    left: dict[str, list[jax.Array]] = {name: [] for name in sorted(plans)}
    right: dict[str, list[jax.Array]] = {name: [] for name in sorted(plans)}
    for name, part in low_rank.decompose(experts, flat, plans, group_bytes, progress):
        left[name].append(jnp.asarray(part.left.T * part.values, jnp.float32))
        right[name].append(jnp.asarray(part.right, jnp.float32))
    whole: FlatParams = {
        name: jnp.asarray(
            np.stack(
                [low_rank.difference(experts, flat, name, t) for t in range(experts.num_tasks)]
            ),
            jnp.float32,
        )
        for name in experts.float_leaves
        if name not in plans
    }
    return SvdState(
        base=merged,
        left={name: jnp.stack(parts) for name, parts in left.items()},
        right={name: jnp.stack(parts) for name, parts in right.items()},
        whole=whole,
        layout=experts.layout,
    )


def _matrix_bytes(shape: tuple[int, int], rank: int) -> int:
    return 4 * (math.prod(shape) if rank >= min(shape) else rank * sum(shape))


def extra_bytes(state: SvdState) -> int:
    """Bytes stored beside the base, for all tasks."""
    return tree.param_bytes((state.left, state.right, state.whole))


@jax.jit(static_argnames=("view", "shape"))
def _product(
    left: jax.Array,
    right: jax.Array,
    task: int | jax.Array,
    view: tree.MatrixView,
    shape: tuple[int, ...],
) -> jax.Array:
    product = jnp.matmul(left[task], right[task], precision="highest")
    return jnp.asarray(tree.from_matrix(product, view, shape))


def _restored(state: SvdState, name: str, shape: tuple[int, ...], task: int | jax.Array) -> Any:
    view = tree.matrix_view(name, shape, state.layout)
    if view is None or name in state.whole:
        return state.whole[name][task]
    return _product(state.left[name], state.right[name], task, view, shape)


def recover(state: SvdState, task: int | jax.Array) -> Params:
    """Recovers one expert: the base plus its truncated difference.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like `state.base`.

    Raises:
      ValueError: if `task` is out of range.
    """
    changes.check_task(task, state.num_tasks)
    return changes.add_changes(state.base, lambda name, shape: _restored(state, name, shape, task))


def mix(state: SvdState, weights: Array) -> Params:
    """The base plus a weighted sum of all experts' truncated differences.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like `state.base`.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    return changes.add_mixture(
        state.base,
        lambda name, shape, task: _restored(state, name, shape, task),
        weights,
        state.num_tasks,
    )
