"""The exact solver: ReTeX's training problem in closed form.

With free task factors, Eq. 5 of arXiv:2606.26902 for one leaf is min over S, G_t of
sum_t ||D_t - G_t S||^2, the best rank-r approximation of the vertically stacked offsets [D_1; ...; D_T]
(Eckart-Young). S is the stack's top r right singular vectors and G_t = D_t S^T. The singular vectors
come from the eigenvectors of the smaller of the two Gram matrices, in float64 (default): a float32 Gram
is right to 1e-7 of the largest eigenvalue, too little to certify a small residual. Where even the smaller
Gram matrix is large, a randomised range finder with power iterations (arXiv:0909.4061, algorithm 4.4)
takes its place, and the optimum is unknown. `fit` solves large leaves as `retex_jax.offsets.certified` does, whose
optimum is a lower bound. The residual is always computed from the stored factors.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from math import prod
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.buffers import give_back_freed
from retex_jax.experts import ExpertSet
from retex_jax.offsets import activations, certified, differences, streamed
from retex_jax.offsets.coding import Stored, bits_problems, code, code_factors, dense
from retex_jax.offsets.factor_writer import FactorFile
from retex_jax.offsets.forms import Form, Orientation, Product
from retex_jax.offsets.separate import solve as solve_separate
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import Array, FlatParams, Params, ProgressFn

Precision = Literal["auto", "float64", "float32"]

MAX_GRAM = 8192


class Solution(NamedTuple):
    """Of a group of leaves: leading axis G.

    Attributes:
      task_factors: [G, T, a, r], float32.
      shared_factor: [G, r, b], float32, orthonormal rows.
      residual: [G].
      optimum: [G]; a lower bound by `certified.solve`, NaN where unknown.
      energy: [G].
      spectrum: squared singular values, [G, k], descending; k = min(T a, b), or r where the range
        finder was used, or those that `certified.solve` found.
    """

    task_factors: Array
    shared_factor: Array
    residual: Array
    optimum: Array
    energy: Array
    spectrum: Array


def solve_group(
    offsets: jax.Array,
    rank: int,
    *,
    precision: Literal["float64", "float32"] = "float64",
    max_gram: int = MAX_GRAM,
) -> Solution:
    """Solves leaves of one matrix shape.

    Args:
      offsets: D_t of G leaves, [G, T, a, b], float32.
      rank: r, from 1 to min(a, b).
      precision: of the Gram matrix, its eigenvectors and the residual.
      max_gram: the largest side of a Gram matrix; the range finder is used above it.

    Returns:
      The optimum of each leaf.
    """
    with jax.enable_x64(precision == "float64"):
        return _solve_group(jnp.asarray(offsets, dtype=precision), rank, max_gram)


@jax.jit(static_argnames=("rank", "max_gram"))
def _solve_group(offsets: jax.Array, rank: int, max_gram: int) -> Solution:
    return jax.vmap(lambda leaf: _solve_leaf(leaf, rank, max_gram))(offsets)


def _solve_leaf(offsets: jax.Array, rank: int, max_gram: int) -> Solution:
    num_tasks, rows, columns = offsets.shape
    stack = offsets.reshape(num_tasks * rows, columns)
    with jax.default_matmul_precision("highest"):
        shared, spectrum = leading_rows(stack, rank, max_gram)
        # A range finder has no tail, and that of a float32 spectrum is rounding: it certifies nothing.
        known = min(stack.shape) <= max_gram and stack.dtype == jnp.float64
        optimum = spectrum[rank:].sum() if known else jnp.full((), jnp.nan, stack.dtype)
        shared = shared.astype(jnp.float32)
        task_factors = (offsets @ shared.T).astype(jnp.float32)
        residual = jnp.sum((offsets - task_factors @ shared.astype(offsets.dtype)) ** 2)
    return Solution(task_factors, shared, residual, optimum, jnp.sum(offsets**2), spectrum)


def leading_rows(
    stack: jax.Array, rank: int, max_gram: int = MAX_GRAM
) -> tuple[jax.Array, jax.Array]:
    """The top right singular vectors of a stack, and its squared singular values.

    Args:
      stack: [n, b].
      rank: r, from 1 to min(n, b).
      max_gram: the largest side of a Gram matrix; the range finder is used above it.

    Returns:
      [r, b], orthonormal rows; and [min(n, b)], descending, or the first r by the range finder.
    """
    with jax.default_matmul_precision("highest"):
        if min(stack.shape) > max_gram:
            return _range_finder(stack, rank)
        is_tall = stack.shape[1] <= stack.shape[0]
        return (_right_gram if is_tall else _left_gram)(stack, rank)


def _right_gram(stack: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    eigenvalues, vectors = jnp.linalg.eigh(stack.T @ stack)
    return vectors[:, ::-1][:, :rank].T, jnp.maximum(eigenvalues[::-1], 0)


def _left_gram(stack: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    eigenvalues, vectors = jnp.linalg.eigh(stack @ stack.T)
    # Orthonormalised anew: dividing by singular values would lose directions of almost no energy.
    shared = jnp.linalg.qr(stack.T @ vectors[:, ::-1][:, :rank])[0].T
    return shared, jnp.maximum(eigenvalues[::-1], 0)


def _range_finder(stack: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    width = min(rank + streamed.OVERSAMPLING, *stack.shape)
    probe = jax.random.normal(jax.random.key(0), (stack.shape[0], width), stack.dtype)
    basis = jnp.linalg.qr(stack.T @ probe)[0]
    for _ in range(streamed.POWER_ITERATIONS):
        basis = jnp.linalg.qr(stack.T @ jnp.linalg.qr(stack @ basis)[0])[0]
    eigenvalues, vectors = jnp.linalg.eigh((stack @ basis).T @ (stack @ basis))
    shared = (basis @ vectors[:, ::-1][:, :rank]).T
    return shared, jnp.maximum(eigenvalues[::-1][:rank], 0)


def check_settings(*, precision: str = "auto", bits: int = 32, vector_bits: int = 32) -> None:
    """Checks the settings of `fit` without its data.

    Raises:
      ValueError: listing all that are unknown.
    """
    problems = []
    if precision not in get_args(Precision):
        problems.append(f"precision: got {precision!r}, expected one of {get_args(Precision)}")
    problems += bits_problems("bits", bits) + bits_problems("vector_bits", vector_bits)
    if problems:
        raise ValueError("\n".join(problems))


def fit(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    *,
    bits: int = 32,
    vector_bits: int = 32,
    task_weights: Array | None = None,
    roots: Mapping[str, Array] | None = None,
    precision: Precision = "auto",
    group_bytes: int = 1 << 24,
    stack_bytes: int = 1 << 31,
    file: FactorFile | None = None,
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Solves every leaf, a group of equal matrix shape at a time.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      bits: of an entry of a matrix leaf's factors, one of `coding.BITS`. Below 32 the shared factor is
        coded first, and the task factors are fitted to what it has become.
      vector_bits: of an entry of the offsets below two axes.
      task_weights: [T]: a task's squared error counts times the square of its weight, in the solution and in
        the report; 1 when not given.
      roots: L by leaf, [b, b], from `activations.roots`: the leaf's errors, in the solution and in the report,
        are those of D_t L. Leaves without one, or all when not given, are solved in plain L2.
      precision: see `solve_group`; "auto" solves large leaves in the least precision whose result is certified
        (see `retex_jax.offsets.certified`).
      group_bytes: the most float32 bytes of offsets in one group; one leaf's stack at least.
      stack_bytes: the most float32 bytes of one leaf's offsets that are held: those of more are read twice, a few
        tasks at a time (see `retex_jax.offsets.streamed`). Not where tasks do not share a factor or the
        leaf has a root; nor where `offsets.fit` chooses ranks by a budget, before.
      file: takes the offsets as they are solved, which are then mapped from it.
      progress: called with (leaves done, leaves).

    Returns:
      The state, in the baked form. The report's optimum is that of factors that are not coded.

    Raises:
      ValueError: if `precision` or a number of bits is unknown.
    """
    check_settings(precision=precision, bits=bits, vector_bits=vector_bits)
    base = tree.flatten(merged)
    weights = np.ones(experts.num_tasks) if task_weights is None else np.asarray(task_weights)
    weights = jnp.asarray(weights, jnp.float32)
    roots = {} if roots is None else roots
    offsets: dict[str, Form] = {} if file is None else file.offsets
    report = FitReport({}, {}, {}, {})
    differences.add_vectors(experts, base, plans, offsets, report, weights, vector_bits)
    if file is not None and not file.finished:
        file.commit(list(report.residuals), report)
    separate = {name: plan for name, plan in plans.items() if plan.task_ranks is not None}
    shared = {name: plan for name, plan in plans.items() if name not in separate}
    large = [
        name
        for name, plan in shared.items()
        if 4 * experts.num_tasks * prod(plan.solved_shape) > stack_bytes
        and plan.rank
        and name not in roots
    ]
    keys = {
        name: (plan.solved_shape, plan.rank, plan.orientation, name in roots)
        for name, plan in shared.items()
        if name not in large
    }
    entry_bytes = 4 * experts.num_tasks
    groups = tree.groups(keys, lambda key: max(1, group_bytes // (entry_bytes * prod(key[0]))))

    done = 0
    finished = frozenset() if file is None else frozenset(file.finished)
    everything = [*groups, *([name] for name in (*large, *separate))]
    for group, following in zip_longest(everything, everything[1:], fillvalue=[]):
        # Not those of many experts, which might not fit the page cache.
        experts.read_ahead(set(following) - set(large) - finished)
        is_finished = finished.issuperset(group)
        readers = [
            partial(differences.matrices, experts, base, name, plans[name]) for name in group
        ]
        if file is not None and is_finished:
            file.report_on(group, report)
        elif group[0] in large:
            (name,) = group
            plan = plans[name]
            leaf = _stream(experts, base, name, plan, weights, bits, precision, stack_bytes, file)
            offsets[name] = Product(leaf.task_factors, leaf.shared_factor, plan.orientation)
            report.residuals[name], report.optima[name] = leaf.residual, leaf.optimum
            report.energies[name], report.spectra[name] = leaf.energy, leaf.spectrum
        elif group[0] in shared:
            root = activations.stack_roots(roots, group)
            products, solution = _fit_group(
                readers, plans[group[0]], weights, root, bits, precision
            )
            for index, name in enumerate(group):
                if plans[name].rank:
                    offsets[name] = jax.tree.map(partial(_take, index), products)
            add_to_report(report, group, solution)
        else:
            (name,) = group
            ranks = separate[name].task_ranks or ()
            own = solve_separate(readers[0](), ranks, np.asarray(weights), bits, roots.get(name))
            if plans[name].rank:
                offsets[name] = own.form
            report.residuals[name], report.optima[name] = own.residual, own.optimum
            report.energies[name] = own.energy
        if file is not None and not is_finished:
            file.commit(group, report)
        give_back_freed()
        done += len(group)
        if progress:
            progress(done, len(plans))
    return OffsetState.baked(merged, offsets, report, experts.num_tasks, experts.layout)


def _stream(
    experts: ExpertSet,
    base: FlatParams,
    name: str,
    plan: LeafPlan,
    weights: jax.Array,
    bits: int,
    precision: Precision,
    stack_bytes: int,
    file: FactorFile | None,
) -> streamed.Streamed:
    """Solves a leaf a few tasks at a time, in the metric of the tasks' weights."""

    def read(tasks: Sequence[int]) -> jax.Array:
        return differences.matrices(experts.take(tasks), base, name, plan)

    return streamed.solve(
        read,
        streamed.chunks(experts.num_tasks, 4 * prod(plan.solved_shape), stack_bytes, bits),
        plan.solved_shape,
        plan.rank,
        np.asarray(weights),
        max_gram=MAX_GRAM,
        bits=bits,
        precision=precision,
        empty=streamed.in_memory if file is None else file.empty,
    )


def _fit_group(
    readers: Sequence[Callable[[], jax.Array]],
    plan: LeafPlan,
    weights: jax.Array,
    root: jax.Array | None,
    bits: int,
    precision: Precision,
) -> tuple[Product, Solution]:
    """Solves a group of leaves of one plan, each [T, a, b], in the metric of the tasks' weights and of L."""
    orientation = plan.orientation

    def metric(index: int) -> jax.Array:
        own = None if root is None else root[index]
        offsets = activations.whiten(readers[index](), own, orientation)
        return offsets * weights[:, None, None] if np.any(weights != 1) else offsets

    in_metric = [partial(metric, index) for index in range(len(readers))]
    solution = _solve(in_metric, plan, len(weights), precision)
    generators: Stored = solution.task_factors
    if np.any(weights != 1):
        generators = generators / weights[:, None, None]
    shared: Stored = solution.shared_factor
    if root is None and bits == 32:
        return Product(generators, shared, orientation), solution
    stack = jnp.stack([read() for read in readers])
    if root is not None and orientation == "right":
        shared = activations.unwhiten(shared, root)
    elif root is not None:
        transposed = shared.swapaxes(-1, -2)[:, None]
        generators = jnp.matmul(stack, transposed, precision="highest")
    if bits < 32:
        generators, shared, residual = code_group(stack, shared, weights, bits, root, orientation)
    else:
        assert root is not None
        residual = activations.residuals(stack, generators, shared, root, orientation, weights)
    return Product(generators, shared, orientation), solution._replace(residual=residual)


def _solve(
    readers: Sequence[Callable[[], jax.Array]], plan: LeafPlan, num_tasks: int, precision: Precision
) -> Solution:
    """Solves a group of leaves of one plan, each [T, a, b], in plain L2."""
    is_worth = certified.is_worth((num_tasks, *plan.solved_shape))
    if precision == "auto" and len(readers) == 1 and plan.rank and is_worth:
        solution = certified.solve(readers[0], plan.rank)
        if solution is not None:
            return Solution(*(np.asarray(part)[None] for part in solution))
    exactly = "float64" if precision == "auto" else precision
    return solve_group(jnp.stack([read() for read in readers]), plan.rank, precision=exactly)


def _take(index: int, stacked: Array) -> jax.Array:
    """One leaf's part; of a NumPy array without a copy."""
    return jax.device_put(stacked[index], may_alias=True)


@jax.jit(static_argnames=("bits", "orientation"))
def code_group(
    offsets: jax.Array,
    shared_factors: jax.Array,
    task_weights: jax.Array,
    bits: int,
    roots: jax.Array | None = None,
    orientation: Orientation = "right",
) -> tuple[Stored, Stored, jax.Array]:
    """Stores the factors of leaves of one shape in few bits.

    The shared factor is coded first; the task factors are then the least-squares solution for what it has
    become, so that they make up for a part of its error.

    Args:
      offsets: D_t of G leaves, [G, T, a, b], float32.
      shared_factors: S, [G, r, b], float32.
      task_weights: [T], float32.
      bits: of an entry.
      roots: L, [G, b, b], of the metric of an activation-aware fit; None for plain L2.
      orientation: as `activations.whiten` takes it; without roots it does not matter.

    Returns:
      Task factors [G, T, a, r], shared factors [G, r, b], and weighted residuals [G], in the metric.
    """

    def code_leaf(
        stack: jax.Array, shared: jax.Array, root: jax.Array | None
    ) -> tuple[Stored, Stored, jax.Array]:
        coded = code(shared, bits, axis=-1)
        basis = jnp.asarray(dense(coded))
        if root is not None and orientation == "right":
            stack, basis, root = activations.whiten(stack, root, orientation), basis @ root, None
        generator = code_factors(stack, basis, bits)
        error = activations.whiten(stack - dense(generator) @ basis, root, orientation)
        return generator, coded, jnp.sum((task_weights[:, None, None] * error) ** 2)

    with jax.default_matmul_precision("highest"):
        return jax.vmap(code_leaf)(offsets, shared_factors, roots)


def add_to_report(report: FitReport, group: Sequence[str], solution: Solution) -> None:
    """Enters the certificate of a group of leaves into `report`."""
    residual, optimum, energy, spectrum = jax.device_get(
        (solution.residual, solution.optimum, solution.energy, solution.spectrum)
    )
    for index, name in enumerate(group):
        report.residuals[name] = float(residual[index])
        report.optima[name] = float(optimum[index])
        report.energies[name] = float(energy[index])
        report.spectra[name] = spectrum[index]
