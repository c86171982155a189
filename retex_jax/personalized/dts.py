"""DTS: decomposition, thresholding, scaling.

"Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging", sections 3.2 and 3.3,
appendix A. Each matrix of the task vectors (DTS-T) or of the differences from a merged model (DTS-D) is replaced by a
truncated SVD whose U and V hold four values each, by sign and own-sign median (see `thresholding`, which
has the equations' errata); singular values are exact. A leaf of one axis is thresholded directly (section 3.2).
DTS* chooses the rank ratio by bytes. Needs no data.

What the paper leaves open, and what is done here:

- Embeddings and convolutions: through their matrix view. The paper's RoBERTa AMR of 3.81% fits only a
  decomposed embedding (3.80% by `paper_amr`; 2.9% without the embedding, 5.8% if it is thresholded directly).
  Its 2.95% for ViT-L/14 and 5.24% for GPT-2 at the same r fit neither.
- A leaf of no axes is stored as it is.
- theta_merge of DTS-D: "such as Ties-Merging" (section 3.1), or Weight Averaging where theta_0 is not at hand
  (appendix D.5). TIES is the default.
- Groups of a whole U or V (appendix A: eight magnitudes a matrix), or of each singular vector (the words of
  section 3.2): `grouping`.
- The sign of a singular pair: groups of a singular vector swap with it and the product stays the same, but for
  entries that are 0; groups of a whole matrix change. `low_rank.truncated_svd` chooses one sign.
- Singular values of 0, which a leaf has that was not trained or is of low rank: their arbitrary vectors take
  no part in the groups.
- Unseen tasks (Eq. 8) are built on theta_merge, with DTS-T "by substituting" its task vectors. On
  theta_merge these would count twice; `mix` adds them to the base they were taken from, theta_0. Negative
  cosines are not mentioned: `unseen.similarity_weights` takes them as 0.

Without the pretrained model: DTS-D over "weight_average" reads no float value of it. An `ExpertSet` needs one for
shapes, dtypes and integer buffers: give any of the experts in its place.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets.state import LeafPlan
from retex_jax.personalized import changes, low_rank
from retex_jax.personalized.thresholding import (
    Groups,
    Levels,
    Scale,
    pack,
    restore,
    threshold,
)
from retex_jax.typing import Array, FlatParams, Layout, Params, ProgressFn

Variant = Literal["task", "difference"]
Grouping = Literal["matrix", "vector"]

DEFAULT_RANK_RATIO = 0.3
_GROUPS_BYTES = 16  # four float32 magnitudes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DtsState:
    """A base model and the thresholded differences of T experts from it.

    Attributes:
      base: theta_0 or theta_merge; nested dict, the pretrained model's shapes and dtypes.
      left: U^T [k, a] of every matrix leaf, grouped.
      right: V^T [k, b] of every matrix leaf, grouped.
      singular_values: by matrix leaf, [T, k], float32.
      vectors: leaves of one axis, grouped; without decomposition all leaves.
      scalars: differences of leaves of no axes, [T], float32.
      layout: which axis of a kernel is the output.
    """

    base: Params
    left: dict[str, Groups]
    right: dict[str, Groups]
    singular_values: FlatParams
    vectors: dict[str, Groups]
    scalars: FlatParams
    layout: Layout = field(metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        stored = (self.singular_values, self.vectors, self.scalars)
        return jax.tree.leaves(stored)[0].shape[0]


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    variant: Variant = "task",
    base: str | None = None,
    base_options: Mapping[str, Any] | None = None,
    rank_ratio: float | None = None,
    bytes_per_task: float | None = None,
    amr: float | None = None,
    scale: Scale = "rms",
    levels: Levels = 2,
    grouping: Grouping = "matrix",
    decompose: bool = True,
    group_bytes: int = 1 << 26,
    progress: ProgressFn | None = None,
) -> DtsState:
    """Approximates every expert's difference from a base.

    At most one of the three sizes is given; `rank_ratio` is 0.3 when none is.

    Args:
      experts: the experts.
      key: typed PRNG key for the base merger.
      variant: "task" (DTS-T: differences from the pretrained model) or "difference" (DTS-D).
      base: name of the merger of DTS-D; "ties" when not given.
      base_options: keywords of that merger.
      rank_ratio: r; keeps rank floor(r * min(a, b)), at least 1.
      bytes_per_task: DTS*: takes the largest r that stores no more bytes a task than this.
      amr: DTS*: the same, as a fraction of the model's bytes; the paper's is 0.01.
      scale: see `thresholding.threshold`.
      levels: see `thresholding.threshold`.
      grouping: four groups in each whole U and V ("matrix"), or in each of their vectors ("vector").
      decompose: whether matrices are decomposed; without, their values are thresholded as those of leaves of one
        axis, which takes no size (table 11).
      group_bytes: see `low_rank.decompose`.
      progress: see `low_rank.decompose`.

    Returns:
      The state.

    Raises:
      ValueError: if an option is unknown, a size is out of range, too small or one of several, or the base
        is unknown or does not go with the variant.
    """
    low_rank.check_sizes(rank_ratio=rank_ratio, bytes_per_task=bytes_per_task, amr=amr)
    sizes = {"rank_ratio": rank_ratio, "bytes_per_task": bytes_per_task, "amr": amr}
    _check_options(variant, base, scale, levels, grouping, {} if decompose else sizes)
    budget = low_rank.byte_budget(experts, bytes_per_task, amr)
    if budget is not None:
        rank_ratio = _budget_ratio(experts, budget, grouping, levels)
    ratio = DEFAULT_RANK_RATIO if rank_ratio is None else rank_ratio
    plans = low_rank.matrix_plans(experts, lambda shape: low_rank.leaf_rank(shape, ratio))
    plans = plans if decompose else {}
    name_of_base = (base or "ties") if variant == "difference" else None
    merged = low_rank.base_model(experts, name_of_base, base_options, key)
    flat = tree.flatten(merged)
    left, right, values = _fit_matrices(
        experts,
        flat,
        plans,
        partial(threshold, scale=scale, levels=levels),
        grouping,
        group_bytes,
        progress,
    )
    vectors, scalars = {}, {}
    for name in experts.float_leaves:
        if name not in plans:
            differences = (
                low_rank.difference(experts, flat, name, task) for task in range(experts.num_tasks)
            )
            if experts.leaves[name].shape:
                rows = (difference.reshape(1, -1) for difference in differences)
                vectors[name] = _stack([pack(*threshold(row, scale, levels)) for row in rows])
            else:
                scalars[name] = jnp.asarray(np.stack(list(differences)), jnp.float32)
    return DtsState(merged, left, right, values, vectors, scalars, experts.layout)


def _check_options(
    variant: str,
    base: str | None,
    scale: str,
    levels: int,
    grouping: str,
    sizes: Mapping[str, float | None],
) -> None:
    problems = [
        f"{name}: got {value!r}, expected {' or '.join(map(repr, known))}"
        for name, value, known in (
            ("variant", variant, ("task", "difference")),
            ("scale", scale, ("rms", "mean", "none")),
            ("levels", levels, (1, 2)),
            ("grouping", grouping, ("matrix", "vector")),
        )
        if value not in known
    ]
    problems += [
        f"{name}: got {size!r}, expected none without decomposition"
        for name, size in sizes.items()
        if size is not None
    ]
    if variant == "task" and base is not None:
        problems.append(
            f"base: got {base!r}, expected none for variant 'task', whose base is the pretrained model"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _budget_ratio(experts: ExpertSet, budget: float, grouping: Grouping, levels: Levels) -> float:
    shapes = {name: plan.shape for name, plan in low_rank.matrix_plans(experts, min).items()}

    def matrix_bytes(shape: tuple[int, int], rank: int) -> int:
        rows = rank if grouping == "vector" else 1
        factors = sum(levels * math.ceil(rank * side / 8) + rows * _GROUPS_BYTES for side in shape)
        return factors + 4 * rank

    small = 0
    for name in experts.float_leaves:
        shape = experts.leaves[name].shape
        if not shape:
            small += 4
        elif name not in shapes:
            small += levels * math.ceil(shape[0] / 8) + _GROUPS_BYTES
    return low_rank.largest_ratio(shapes.values(), matrix_bytes, budget - small)


def _fit_matrices(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    thresholded: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    grouping: Grouping,
    group_bytes: int,
    progress: ProgressFn | None,
) -> tuple[dict[str, Groups], dict[str, Groups], FlatParams]:
    parts: dict[str, list[tuple[Groups, Groups, jax.Array]]] = {name: [] for name in sorted(plans)}
    for name, part in low_rank.decompose(experts, base, plans, group_bytes, progress):
        rank = int(np.count_nonzero(part.values))
        left, right = (
            _group_factor(factor, rank, thresholded, grouping) for factor in (part.left, part.right)
        )
        parts[name].append((left, right, jnp.asarray(part.values, jnp.float32)))
    left, right, values = {}, {}, {}
    for name, tasks in parts.items():
        left[name], right[name], values[name] = _stack(tasks)
    return left, right, values


def _stack(tasks: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def _group_factor(
    factor: np.ndarray,
    rank: int,
    thresholded: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    grouping: Grouping,
) -> Groups:
    """Groups the first `rank` rows of [k, n]; the others, of singular value 0, hold no group."""
    used = factor[:rank] if grouping == "vector" else factor[:rank].reshape(1, -1)
    bits, magnitudes = thresholded(used)
    all_bits = np.zeros((len(bits), *factor.shape), bool)
    all_bits[:, :rank] = bits.reshape(len(bits), rank, factor.shape[1])
    rows = len(factor) if grouping == "vector" else 1
    return pack(all_bits, np.pad(magnitudes, ((0, rows - len(magnitudes)), (0, 0))))


def extra_bytes(state: DtsState) -> int:
    """Bytes stored beside the base, for all tasks."""
    stored = (state.left, state.right, state.singular_values, state.vectors, state.scalars)
    return tree.param_bytes(stored)


def paper_amr(state: DtsState, bits_per_element: int = 3) -> float:
    """AMR by the paper's accounting, which is of a float32 model.

    Section 3.2 counts three one-bit masks an element (9.37% = 3/32 without decomposition, Table 11), and
    appendix A the magnitudes and singular values, here of 32 bits each.

    Args:
      state: from `fit`.
      bits_per_element: 3 as in the paper; 2 as it is stored here.

    Returns:
      Extra bits a task / bits of the model's float leaves, a fraction.
    """
    elements = singles = parameters = 0
    for name, leaf in tree.flatten(state.base).items():
        if not tree.is_float(leaf.dtype):
            continue
        parameters += math.prod(leaf.shape)
        if name in state.scalars:
            singles += 1
        elif name in state.vectors:
            elements += math.prod(leaf.shape)
            singles += state.vectors[name].magnitudes[0].size
        else:
            rank = state.singular_values[name].shape[1]
            elements += rank * sum(_matrix(state, name, leaf.shape)[1])
            magnitudes = (state.left[name].magnitudes, state.right[name].magnitudes)
            singles += rank + sum(array[0].size for array in magnitudes)
    return (bits_per_element * elements + 32 * singles) / (32 * parameters)


def _matrix(
    state: DtsState, name: str, shape: tuple[int, ...]
) -> tuple[tree.MatrixView, tuple[int, int]]:
    view = tree.matrix_view(name, shape, state.layout)
    if view is None:
        raise ValueError(f"{name}: got shape {shape}, expected two axes or more")
    return view, tree.matrix_shape(shape, view)


@jax.jit(static_argnames=("view", "shape"))
def _product(
    left: Groups,
    values: jax.Array,
    right: Groups,
    task: int | jax.Array,
    view: tree.MatrixView,
    shape: tuple[int, ...],
) -> jax.Array:
    """U Sigma V^T of one task (Eqs. 7 and 14), as a leaf."""
    rank = values.shape[1]
    sides = tree.matrix_shape(shape, view)
    factors = []
    for groups, side in zip((left, right), sides, strict=True):
        rows = groups.magnitudes.shape[1]
        factors.append(restore(groups, task, rank * side // rows).reshape(rank, side))
    scaled = factors[0].T * values[task]
    product = jnp.matmul(scaled, factors[1], precision="highest")
    return jnp.asarray(tree.from_matrix(product, view, shape))


_restore_vector = jax.jit(restore, static_argnames="size")


def _restored(
    state: DtsState, name: str, shape: tuple[int, ...], task: int | jax.Array
) -> jax.Array:
    if name in state.scalars:
        return jnp.asarray(state.scalars[name])[task]
    if name in state.vectors:
        size = math.prod(shape)
        return _restore_vector(state.vectors[name], task, size=size)[0].reshape(shape)
    view, _ = _matrix(state, name, shape)
    values = jnp.asarray(state.singular_values[name])
    return _product(state.left[name], values, state.right[name], task, view, shape)


def recover(state: DtsState, task: int | jax.Array) -> Params:
    """Recovers one expert (Eqs. 7 and 14).

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like `state.base`; sums are float32, then cast to each leaf's dtype.

    Raises:
      ValueError: if `task` is out of range.
    """
    changes.check_task(task, state.num_tasks)
    return changes.add_changes(state.base, lambda name, shape: _restored(state, name, shape, task))


def mix(state: DtsState, weights: Array) -> Params:
    """The base plus a weighted sum of all experts' approximated differences (Eq. 8).

    Args:
      state: from `fit`.
      weights: gamma over tasks, [T], float32.

    Returns:
      Nested dict like `state.base`; sums are float32, then cast to each leaf's dtype.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    return changes.add_mixture(
        state.base,
        lambda name, shape, task: _restored(state, name, shape, task),
        weights,
        state.num_tasks,
    )
