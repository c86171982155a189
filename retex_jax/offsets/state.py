"""What an offset fit leaves behind, and how an expert is recovered from it.

ReTeX (arXiv:2606.26902, Eqs. 3 and 4): theta_t = theta_merge + G_t S for every leaf seen as a matrix
(a, b), with a task factor G_t (a, r) generated linearly from the task's embedding and a shared factor
S (r, b): G_t = sum_k e_tk W_k. The exact solver's embeddings are one-hot, so that W is the stack of task
factors (the baked form, K = T); the paper's generator has K = d_emb + 1, its last embedding entry being the
constant 1 that carries the bias. `retex_jax.offsets.forms` has what a leaf may hold.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from retex_jax import tree
from retex_jax.offsets.forms import Form, Orientation, OwnForm, Tied, has_factors
from retex_jax.typing import FlatParams, Layout, Params

RankRule = Literal["paper", "clip"]

# Below this fraction of the offsets' energy a residual is float32 rounding of the stored factors.
_ROUNDING = 3e-11


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FitReport:
    """The certificate of a fit; all values are sums of squares over tasks.

    They are sums in float64, but in float32 for leaves below two axes, most coded ones, and by "adam".

    They are in the metric that was minimised: with weights of tasks or, in an activation-aware fit, of a leaf's
    inputs, D_t stands for w_t D_t C^(1/2) (see `retex_jax.offsets.activations`).

    Attributes:
      residuals: by float leaf, ||D_t - G_t S||^2 summed over tasks, with the factors as stored.
      optima: by float leaf, the least possible residual at the leaf's rank (Eckart-Young; 0 below two
        axes), or a lower bound of it that is nearer than 1e-4; NaN where the leaf was too large for it to be
        computed.
      energies: by float leaf, ||D_t||^2 summed over tasks.
      spectra: by matrix leaf, the squared singular values of the vertically stacked D_t, descending; of large
        leaves the first ones only.
    """

    residuals: dict[str, float]
    optima: dict[str, float]
    energies: dict[str, float]
    spectra: dict[str, np.ndarray]
    histories: dict[str, np.ndarray] = field(default_factory=dict)
    gammas: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def residual(self) -> float:
        """Sum over leaves."""
        return float(sum(self.residuals.values()))

    @property
    def optimum(self) -> float:
        """Sum over leaves; NaN if any leaf's optimum is unknown."""
        return float(sum(self.optima.values()))

    @property
    def energy(self) -> float:
        """Sum over leaves."""
        return float(sum(self.energies.values()))

    @property
    def ratio(self) -> float:
        """Residual / optimum, >= 1 up to rounding; 1 where both are float32 rounding."""
        if math.isnan(self.optimum):
            return self.optimum
        if max(self.residual, self.optimum) <= _ROUNDING * self.energy:
            return 1.0
        return self.residual / self.optimum if self.optimum > 0 else float("inf")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OffsetState:
    """Merged model and offsets: all that is needed to recover the experts.

    Attributes:
      merged: nested dict, the pretrained model's shapes and dtypes.
      task_embeddings: e_t, [T, K], float32; the identity (K = T) in the baked form.
      offsets: by float leaf; a leaf without one is the merged model's. A `Tied` one is stored once, with its
        owner.
      report: residual, optimum and ratio of the fit.
      layout: which axis of a kernel is the output.
    """

    merged: Params
    task_embeddings: jax.Array
    offsets: dict[str, Form]
    report: FitReport
    layout: Layout = field(metadata={"static": True})

    @classmethod
    def baked(
        cls,
        merged: Params,
        offsets: Mapping[str, Form],
        report: FitReport,
        num_tasks: int,
        layout: Layout,
    ) -> "OffsetState":
        """A state of one-hot embeddings: its generators are the stacks of the tasks' own factors."""
        embeddings = jnp.eye(num_tasks, dtype=jnp.float32)
        return cls(merged, embeddings, dict(sorted(offsets.items())), report, layout)

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.task_embeddings.shape[0]

    def form(self, name: str) -> OwnForm:
        """The form that makes a leaf's offset: its own, or its owner's."""
        form = self.offsets[name]
        if not isinstance(form, Tied):
            return form
        owned = self.offsets[form.owner]
        if isinstance(owned, Tied):
            raise ValueError(f"offsets: {name} is tied to {form.owner}, which is tied itself")
        return owned

    def factors(self, name: str, task: int) -> tuple[jax.Array, jax.Array] | None:
        """Two factors, [a, r] and [r, b], of one task's offset of a matrix; None where it has none."""
        form = self.form(name)
        return form.factors(self.task_embeddings[task]) if has_factors(form) else None


@dataclass(frozen=True)
class LeafPlan:
    """How one matrix leaf is solved.

    Attributes:
      view: how the leaf is seen as a matrix.
      shape: (a, b), as the view has it.
      rank: r; with 0 the leaf gets no offset.
      orientation: where the shared factor stands.
      task_ranks: T numbers, of which `rank` is the largest, where the tasks share no factor; else None.
    """

    view: tree.MatrixView
    shape: tuple[int, int]
    rank: int
    orientation: Orientation = "right"
    task_ranks: tuple[int, ...] | None = None

    @property
    def solved_shape(self) -> tuple[int, int]:
        """Sides of the task factor and of the shared factor: (a, b), or (b, a) when S is on the left."""
        rows, columns = self.shape
        return (rows, columns) if self.orientation == "right" else (columns, rows)


def plan_leaves(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    layout: Layout,
    rank: int,
    rank_rule: RankRule = "paper",
    orientation: Orientation | Literal["auto"] = "right",
) -> dict[str, LeafPlan]:
    """Plans the rank of every float leaf of two or more axes.

    Args:
      leaves: leaf name to shape and dtype.
      layout: which axis of a kernel is the output.
      rank: target rank r.
      rank_rule: what is done with a leaf of min(a, b) <= r. "paper" (appendix B.1): the rank becomes
        floor(min(a, b) / 2), at least 1. "clip": it becomes min(a, b). Recovery is then
        exact where b <= a; a leaf of a < b has a stack of rank up to min(T a, b), and keeps a residual.
      orientation: where the shared factor stands; "auto" gives the longer side to it, so that a task's
        own factor has the shorter one: a token embedding must not have a 50k x r factor a task.

    Returns:
      Leaf name to plan.

    Raises:
      ValueError: if `rank` is not an integer from 1 to the largest min(a, b) of any leaf, or
        `rank_rule` or `orientation` is unknown.
    """
    if rank_rule not in ("paper", "clip"):
        raise ValueError(f"rank_rule: got {rank_rule!r}, expected 'paper' or 'clip'")
    if orientation not in ("right", "left", "auto"):
        raise ValueError(f"orientation: got {orientation!r}, expected 'right', 'left' or 'auto'")
    matrices = {}
    for name, spec in leaves.items():
        view = tree.matrix_view(name, spec.shape, layout)
        if view is not None and tree.is_float(spec.dtype):
            matrices[name] = (view, tree.matrix_shape(spec.shape, view))
    largest = max((min(shape) for _, shape in matrices.values()), default=None)
    is_integer = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if not is_integer or rank < 1 or (largest and rank > largest):
        limit = f"1 to {largest}, the largest min(a, b) of any leaf" if largest else "1 or more"
        raise ValueError(f"rank: got {rank!r}, expected an integer from {limit}")
    return {
        name: LeafPlan(view, shape, _leaf_rank(rank, shape, rank_rule), _orient(shape, orientation))
        for name, (view, shape) in matrices.items()
    }


def _leaf_rank(rank: int, shape: tuple[int, int], rank_rule: RankRule) -> int:
    if rank < min(shape):
        return int(rank)
    return min(shape) if rank_rule == "clip" else max(1, min(shape) // 2)


def _orient(shape: tuple[int, int], orientation: Orientation | Literal["auto"]) -> Orientation:
    if orientation != "auto":
        return orientation
    return "right" if shape[0] <= shape[1] else "left"


def offset_bytes(state: OffsetState) -> int:
    """Bytes stored beside the merged model, for all tasks: embeddings and all factors.

    What leaves share counts once, and an affine form's theta_0 counts.
    """
    return tree.param_bytes((state.task_embeddings, state.offsets))


def check_fits(state: OffsetState, where: str) -> None:
    """Makes sure that offsets which come from outside fit their merged model; nothing is computed.

    Args:
      state: of arrays of any shapes.
      where: what it was read from, for the message.

    Raises:
      ValueError: if embeddings, or offsets of any leaf, have other shapes than the merged model needs; all such
        leaves are listed.
    """
    shapes = {name: jnp.shape(leaf) for name, leaf in tree.flatten(state.merged).items()}
    if jnp.ndim(state.task_embeddings) != 2:
        shape = jnp.shape(state.task_embeddings)
        raise ValueError(f"{where}: task_embeddings have shape {shape}, expected [T, K]")
    embedding = jax.ShapeDtypeStruct(state.task_embeddings.shape[1:], jnp.float32)
    made: dict[Any, tuple[int, ...]] = {}
    problems = []
    for name in state.offsets:
        try:
            form, shape = state.form(name), shapes[name]
            view = tree.matrix_view(name, shape, state.layout)
            expected = shape if view is None else tree.matrix_shape(shape, view)
            leaves, structure = jax.tree.flatten(form)
            key = (structure, *((jnp.shape(leaf), str(leaf.dtype)) for leaf in leaves))
            if key not in made:
                made[key] = jax.eval_shape(type(form).offset, form, embedding).shape
        except Exception as error:  # whatever it is, this form cannot be what was written
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if made[key] != tuple(expected):
            problems.append(f"{name}: the offset has shape {made[key]}, expected {expected}")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{where}: offsets do not fit the merged model:\n  {listed}")


def generate(state: OffsetState, embedding: jax.Array) -> FlatParams:
    """Generates the offset of every float leaf (Eq. 3).

    Args:
      state: from `fit`.
      embedding: [K], float32: a row of `task_embeddings`, or a mixture of rows.

    Returns:
      Leaf name to offset, [*shape], float32.
    """
    merged = tree.flatten(state.merged)
    result = {}
    owned: dict[str, jax.Array] = {}
    for name, form in state.offsets.items():
        owner = form.owner if isinstance(form, Tied) else name
        if owner not in owned:
            owned[owner] = state.form(name).offset(embedding)
        offset = owned[owner]
        view = tree.matrix_view(name, merged[name].shape, state.layout)
        result[name] = (
            offset if view is None else tree.from_matrix(offset, view, merged[name].shape)
        )
    return result


@jax.jit
def _add_offsets(state: OffsetState, embedding: jax.Array) -> FlatParams:
    flat = tree.flatten(state.merged)
    return {
        name: (flat[name].astype(jnp.float32) + offset).astype(flat[name].dtype)
        for name, offset in generate(state, embedding).items()
    }


def apply_embedding(state: OffsetState, embedding: jax.Array) -> Params:
    """theta_merge plus the offset of an embedding (Eq. 4).

    Args:
      state: from `fit`.
      embedding: [K], float32.

    Returns:
      Nested dict like `state.merged`; sums are float32, then cast to each leaf's dtype.
    """
    flat = tree.flatten(state.merged)
    floats = tree.unflatten({name: flat[name] for name in state.offsets})
    state = replace(state, merged=floats, report=FitReport({}, {}, {}, {}))
    # Buffers stay outside the jit, which would narrow 64-bit integers.
    return tree.unflatten(flat | _add_offsets(state, embedding))


def recover(state: OffsetState, task: int | jax.Array) -> Params:
    """Recovers one expert.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like `state.merged`.

    Raises:
      ValueError: if `task` is no integer or out of range.
    """
    if not isinstance(task, Tracer) and not 0 <= tree.as_integer("task", task) < state.num_tasks:
        raise ValueError(f"task: got {task}, expected 0 to {state.num_tasks - 1}")
    return apply_embedding(state, state.task_embeddings[task])


def mix(state: OffsetState, weights: jax.Array) -> Params:
    """Recovers a mixture of experts by interpolating their embeddings, and so their offsets.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like `state.merged`.
    """
    weights = jnp.asarray(weights)
    if weights.shape != (state.num_tasks,):
        raise ValueError(f"weights: got shape {weights.shape}, expected ({state.num_tasks},)")
    return apply_embedding(state, jnp.matmul(weights, state.task_embeddings, precision="highest"))
