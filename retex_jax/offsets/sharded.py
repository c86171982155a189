"""The closed form over many devices: a mesh solves one problem, and each host reads only its own experts.

The tasks lie along the mesh axis "task" and the leaves of one shape along "layer". A device averages and multiplies its
own experts' leaves; what crosses the task axis is the sum of a leaf (for the average), its Gram matrix and three
numbers. The eigenvectors are computed along the layer axis side by side, by all devices of the task axis alike, and the
task factors stay where their experts were read. Of the finished state each device keeps a part (`RULES`). The answer is
that of one device up to the rounding of sums, which are in float64 (default).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retex_jax import sharding, tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets.exact import MAX_GRAM
from retex_jax.offsets.forms import Elementwise, Form, Orientation, Product
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState, RankRule, plan_leaves
from retex_jax.typing import Params, ProgressFn

TASK, LAYER = sharding.TASK, sharding.LAYER

RULES: sharding.Rules = (
    (r"^(residual|optimum|energy|spectrum)$", P()),
    (r"^factors$", P(TASK, LAYER)),
    (r"^(merged|shared)$", (TASK, LAYER)),
)
"""Of the parts of one leaf's `Solved`."""


class Solved(NamedTuple):
    """Of G leaves of one shape; S and G_t only of matrices.

    Attributes:
      merged: [G, *shape], float32, rounded to the leaves' dtype.
      factors: [G, T, a, r]; the differences themselves, [G, T, *shape], of leaves below two axes.
      shared: [G, r, b], or [G, 0].
      residual: [G], as are `optimum` and `energy`.
      spectrum: [G, b], or [G, 0].
    """

    merged: jax.Array
    factors: jax.Array
    shared: jax.Array
    residual: jax.Array
    optimum: jax.Array
    energy: jax.Array
    spectrum: jax.Array


def fit_sharded(
    experts: ExpertSet,
    mesh: Mesh,
    *,
    rank: int = 64,
    rank_rule: RankRule = "paper",
    orientation: Orientation | Literal["auto"] = "right",
    base: Literal["weight_average"] | Params = "weight_average",
    precision: Literal["float64", "float32"] = "float64",
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Fits ReTeX's offsets (arXiv:2606.26902, Eq. 5) in closed form on a mesh; see `offsets.fit`.

    Every process of a multi-process run makes the same call, with an `ExpertSet` of all experts, of which it reads
    those that its devices hold.

    Args:
      experts: the experts; their number is a multiple of the mesh's axis "task".
      mesh: with an axis "task" and, if there is one, "layer".
      rank: target rank r of the matrix leaves.
      rank_rule: as `offsets.fit` has it.
      orientation: as `offsets.fit` has it; the side of no Gram matrix may be above `exact.MAX_GRAM`.
      base: "weight_average", or a merged model, the same in every process.
      precision: of sums, Gram matrices and eigenvectors; float64 certifies the optimum.
      progress: called with (leaves done, leaves).

    Returns:
      The state: task factors along "task", merged model and shared factors split over all devices.

    Raises:
      ValueError: if the mesh has other axes, T is no multiple of its axis "task", a leaf's Gram matrix is too
        large, or `base` does not fit the experts; all problems are listed.
    """
    plans = plan_leaves(experts.leaves, experts.layout, rank, rank_rule, orientation)
    problems = _problems(experts, mesh, plans, base)
    if problems:
        raise ValueError("\n".join(problems))
    given = None if isinstance(base, str) else tree.flatten(base)
    layers = dict(mesh.shape).get(LAYER, 1)
    names = experts.float_leaves
    keys = {
        name: (experts.leaves[name].shape, experts.leaves[name].dtype, plans.get(name))
        for name in names
    }
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    merged = {name: experts.pretrained(name) for name in experts.leaves if name not in keys}
    with jax.enable_x64(precision == "float64"):
        for group in tree.groups(keys, lambda _: layers):
            plan = plans.get(group[0])
            dtype = jax.dtypes.canonicalize_dtype(experts.leaves[group[0]].dtype)
            solve = program(mesh, plan, experts.num_tasks, precision, given is not None, dtype)
            solved = solve(*_placed(experts, given, group, mesh))
            for index, name in enumerate(group):
                own = _take(mesh, solved, index)
                merged[name] = own.merged.astype(dtype)
                offsets[name] = _form(own, plan)
                _report(report, name, own)
            if progress:
                progress(len(offsets), len(names))
    params = tree.unflatten({name: merged[name] for name in experts.leaves})
    return OffsetState.baked(params, offsets, report, experts.num_tasks, experts.layout)


def gather(state: OffsetState) -> OffsetState:
    """The same state in every process' host memory (NumPy), from wherever its arrays lie."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    merged, embeddings, offsets = jax.tree.map(
        whole, (state.merged, state.task_embeddings, state.offsets)
    )
    return OffsetState(merged, embeddings, offsets, state.report, state.layout)


def _problems(
    experts: ExpertSet, mesh: Mesh, plans: Mapping[str, LeafPlan], base: str | Params
) -> list[str]:
    problems = []
    sizes = dict(mesh.shape)
    if TASK not in sizes or set(sizes) - {TASK, LAYER}:
        problems.append(
            f"mesh: got axes {sizes}, expected {TASK!r} and, if there are others, {LAYER!r}"
        )
    elif experts.num_tasks % sizes[TASK]:
        problems.append(
            f"mesh: got {sizes[TASK]} devices along {TASK!r}, expected a divisor of the "
            f"{experts.num_tasks} experts"
        )
    large = [name for name, plan in plans.items() if plan.solved_shape[1] > MAX_GRAM]
    if large:
        problems.append(
            f"orientation: the Gram matrices of {large} have sides above {MAX_GRAM}; expected the other side"
        )
    if isinstance(base, str):
        if base != "weight_average":
            problems.append(f"base: got {base!r}, expected 'weight_average' or a merged model")
    else:
        shapes = {name: leaf.shape for name, leaf in tree.flatten(base).items()}
        wanted = {name: leaf.shape for name, leaf in experts.leaves.items()}
        if wrong := sorted(name for name, _ in shapes.items() ^ wanted.items()):
            problems.append(f"base: leaves {sorted(set(wrong))} do not fit the experts")
    return problems


def _placed(
    experts: ExpertSet, given: Mapping[str, Any] | None, group: Sequence[str], mesh: Mesh
) -> tuple[jax.Array, ...]:
    """Leaves of a group, [G, T, *shape], and their base, [G, *shape], read where they will lie.

    G is the size of the mesh's axis "layer"; the leaves that a group lacks are zero.
    """
    sizes = dict(mesh.shape)
    layers = sizes.get(LAYER, 1)
    shape = experts.leaves[group[0]].shape

    def stack(index: tuple[slice, ...]) -> np.ndarray:
        leaves, tasks = (
            range(n)[i] for n, i in zip((layers, experts.num_tasks), index[:2], strict=True)
        )
        found = np.zeros((len(leaves), len(tasks), *shape), np.float32)
        for row, leaf in enumerate(leaves):
            if leaf < len(group):
                for column, task in enumerate(tasks):
                    found[row, column] = experts.expert(group[leaf], task)
        return found

    def base(index: tuple[slice, ...]) -> np.ndarray:
        assert given is not None
        found = np.zeros((layers, *shape), np.float32)
        for row, name in enumerate(group):
            found[row] = given[name]
        return found[index]

    def place(shape: tuple[int, ...], spec: P, read: Callable[..., np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)

    layer = LAYER if LAYER in sizes else None
    placed = (place((layers, experts.num_tasks, *shape), P(layer, TASK), stack),)
    return placed if given is None else (*placed, place((layers, *shape), P(layer), base))


@lru_cache(maxsize=64)
def program(
    mesh: Mesh,
    plan: LeafPlan | None,
    num_tasks: int,
    precision: str,
    has_base: bool,
    dtype: np.dtype,
) -> Callable[..., Solved]:
    """What solves a group of leaves of one plan, compiled: the arguments of `_solve` of all devices to `Solved`.

    Args:
      mesh: as for `fit_sharded`.
      plan: of the leaves; None below two axes.
      num_tasks: T.
      precision: as for `fit_sharded`.
      has_base: whether the base is given beside the stack.
      dtype: of the leaves, to which the base is rounded.
    """
    layer = LAYER if LAYER in mesh.shape else None
    by_task, by_layer = P(layer, TASK), P(layer)
    return jax.jit(
        jax.shard_map(
            partial(_solve, plan=plan, num_tasks=num_tasks, precision=precision, dtype=dtype),
            mesh=mesh,
            in_specs=(by_task, by_layer) if has_base else (by_task,),
            out_specs=Solved._make([by_layer, by_task, *[by_layer] * 5]),
            check_vma=False,
        )
    )


def _solve(
    stack: jax.Array,
    base: jax.Array | None = None,
    *,
    plan: LeafPlan | None,
    num_tasks: int,
    precision: str,
    dtype: np.dtype,
) -> Solved:
    """The part of one device: [g, t, *shape] and [g, *shape]."""

    def over_tasks(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, TASK)

    with jax.default_matmul_precision("highest"):
        if base is None:
            total = over_tasks(jnp.sum(stack.astype(precision), axis=1))
            base = (total / num_tasks).astype(jnp.float32)
        # As it is stored; XLA may drop a cast to fewer bits and back.
        base = jnp.asarray(jax.lax.optimization_barrier(base.astype(dtype)), jnp.float32)
        own = stack - base[:, None]
        if plan is None:
            energy = over_tasks(_squares(own.astype(precision)))
            none = jnp.zeros((len(stack), 0), jnp.float32)
            zero = jnp.zeros_like(energy)
            return Solved(base, own, none, zero, zero, energy, none)
        seen = jnp.asarray(tree.to_matrix(own, plan.view))
        wide = (seen if plan.orientation == "right" else seen.swapaxes(-1, -2)).astype(precision)
        rows = wide.reshape(len(wide), -1, wide.shape[-1])
        gram = over_tasks(jnp.einsum("gnb,gnc->gbc", rows, rows))
        eigenvalues, vectors = jnp.linalg.eigh(gram)
        spectrum = jnp.maximum(eigenvalues[:, ::-1], 0)
        shared = vectors[:, :, ::-1][:, :, : plan.rank].swapaxes(1, 2).astype(jnp.float32)
        basis = shared.astype(precision)
        factors = jnp.einsum("gtab,grb->gtar", wide, basis).astype(jnp.float32)
        error = wide - jnp.einsum("gtar,grb->gtab", factors.astype(precision), basis)
        optimum = spectrum[:, plan.rank :].sum(axis=1)
        if precision == "float32":
            optimum = jnp.full_like(optimum, jnp.nan)
        return Solved(
            base,
            factors,
            shared,
            over_tasks(_squares(error)),
            optimum,
            over_tasks(_squares(wide)),
            spectrum,
        )


def _squares(x: jax.Array) -> jax.Array:
    """[g, ...] to [g]."""
    return jnp.sum(x.reshape(len(x), prod(x.shape[1:])) ** 2, axis=1)


@partial(jax.jit, static_argnums=0)
def _take(mesh: Mesh, solved: Solved, index: int) -> Solved:
    """One leaf of a group, where it is kept."""
    own = jax.tree.map(lambda part: part[index], solved)
    return sharding.constrain(own, mesh, RULES)


def _form(own: Solved, plan: LeafPlan | None) -> Form:
    if plan is None:
        return Elementwise(own.factors, jnp.ones((), jnp.float32))
    return Product(own.factors, own.shared, plan.orientation)


def _report(report: FitReport, name: str, own: Solved) -> None:
    report.residuals[name] = float(own.residual)
    report.optima[name] = float(own.optimum)
    report.energies[name] = float(own.energy)
    if own.spectrum.size:
        report.spectra[name] = np.asarray(own.spectrum)
