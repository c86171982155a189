"""ReTeX-E: task factors that are themselves of low rank (arXiv:2606.26902, section 5.5).

D_t ~ A_t B_t S with A_t [a, r_g], B_t [r_g, r], r_g < r, and S [r, b] shared. For a fixed S of orthonormal
rows the best G_t = A_t B_t is the truncated SVD of D_t S^T, of rank r_g (Eckart-Young); for fixed G_t the
best S is linear least squares. The two alternate, so the squared error never rises. There is no closed form
for both at once. The report's optimum is a bound from below: the larger of the closed form's residual at rank
r, and of the sum over tasks of what each D_t alone leaves at rank r_g; where T r_g <= r it is reached. The
paper does not say what r_g does to leaves of rank r <= r_g: here these keep a free task factor. All in float64;
factors are stored in float32.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import alternating, differences, exact
from retex_jax.offsets.forms import Factorized, Form, Product
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import Params, ProgressFn

# Directions of G below this fraction of its largest squared singular value are not solved for.
_SINGULAR = 1e-13


class FactorizedSolution(NamedTuple):
    """Of one leaf.

    Attributes:
      left: A, [T, a, r_g], float32.
      right: B, [T, r_g, r], float32.
      shared_factor: S, [r, b], float32.
      residual: of the factors as stored.
      history: residual at the start and after each half sweep, [1 + 2 n].
    """

    left: jax.Array
    right: jax.Array
    shared_factor: jax.Array
    residual: float
    history: np.ndarray


def solve(
    offsets: jax.Array,
    rank: int,
    task_rank: int,
    *,
    sweeps: int = alternating.SWEEPS,
    tolerance: float = alternating.TOLERANCE,
    max_gram: int = exact.MAX_GRAM,
) -> FactorizedSolution:
    """Solves one leaf.

    Two starts are compared: the closed form's S, which is the best for r_g = r, and that of the offsets
    truncated to rank r_g each, which is the best for T r_g <= r.

    Args:
      offsets: D_t, [T, a, b], float32.
      rank: r, from 1 to min(a, b).
      task_rank: r_g, from 1 to r.
      sweeps: the most sweeps.
      tolerance: a sweep that takes less than this fraction of the residual away is the last.
      max_gram: see `exact.solve_group`.

    Returns:
      The solution; its history never rises.
    """
    with jax.enable_x64(True):
        stack = jnp.asarray(offsets, jnp.float64)
        energy = float(jnp.sum(stack**2))
        starts = _starts(stack, rank, task_rank, max_gram)
        left, right, residual, shared = min(
            ((*_truncate(stack, start, task_rank), start) for start in starts),
            key=lambda candidate: float(candidate[2]),
        )
        history = [float(residual)]
        for _ in range(sweeps):
            shared, residual = _share(stack, left, right)
            history.append(float(residual))
            left, right, residual = _truncate(stack, shared, task_rank)
            history.append(float(residual))
            if alternating.converged(history, energy, tolerance):
                break
        shared = shared.astype(jnp.float32)
        left, right, _ = _truncate(stack, shared, task_rank)
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        residual = _residual(stack, left, right, shared)
    return FactorizedSolution(left, right, shared, float(residual), np.array(history))


@jax.jit(static_argnames=("rank", "task_rank", "max_gram"))
def _starts(
    offsets: jax.Array, rank: int, task_rank: int, max_gram: int
) -> tuple[jax.Array, jax.Array]:
    rows = jax.vmap(lambda matrix: exact.leading_rows(matrix, task_rank, max_gram)[0])(offsets)
    with jax.default_matmul_precision("highest"):
        truncated = offsets @ rows.swapaxes(1, 2) @ rows
    columns = offsets.shape[-1]
    return (
        exact.leading_rows(offsets.reshape(-1, columns), rank, max_gram)[0],
        exact.leading_rows(truncated.reshape(-1, columns), rank, max_gram)[0],
    )


@jax.jit(static_argnames="task_rank")
@jax.default_matmul_precision("highest")
def _truncate(
    offsets: jax.Array, shared: jax.Array, task_rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best A_t and B_t for an S of orthonormal rows, and the residual."""
    projected = offsets @ shared.astype(offsets.dtype).T
    _, vectors = jnp.linalg.eigh(projected.swapaxes(1, 2) @ projected)
    leading = vectors[:, :, ::-1][:, :, :task_rank]
    left, right = projected @ leading, leading.swapaxes(1, 2)
    return left, right, _residual(offsets, left, right, shared)


@jax.jit
@jax.default_matmul_precision("highest")
def _share(offsets: jax.Array, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best S for given A_t and B_t, its rows made orthonormal; and the residual."""
    factor = (left @ right).reshape(-1, right.shape[-1])
    stack = offsets.reshape(len(factor), -1)
    values, vectors = jnp.linalg.eigh(factor.T @ factor)
    inverse = jnp.where(values > _SINGULAR * values[-1], 1 / jnp.where(values > 0, values, 1), 0)
    solved = (vectors * inverse) @ (vectors.T @ (factor.T @ stack))
    # G S = (G R^T) Q^T: the next truncation is for orthonormal rows, and finds a G R^T itself.
    return jnp.linalg.qr(solved.T)[0].T, jnp.sum((stack - factor @ solved) ** 2)


@jax.jit
@jax.default_matmul_precision("highest")
def _residual(
    offsets: jax.Array, left: jax.Array, right: jax.Array, shared: jax.Array
) -> jax.Array:
    left, right, shared = (x.astype(offsets.dtype) for x in (left, right, shared))
    return jnp.sum((offsets - left @ (right @ shared)) ** 2)


@jax.jit(static_argnames="task_rank")
def _task_tails(offsets: jax.Array, task_rank: int) -> jax.Array:
    """The sum over tasks of the squared singular values of D_t past r_g."""
    narrow = offsets if offsets.shape[1] <= offsets.shape[2] else offsets.swapaxes(1, 2)
    grams = jnp.matmul(narrow, narrow.swapaxes(1, 2), precision="highest")
    values = jnp.maximum(jnp.linalg.eigvalsh(grams), 0)
    return values[:, : max(0, values.shape[1] - task_rank)].sum()


def lower_bound(offsets: jax.Array, task_rank: int, optimum: float) -> float:
    """What no ReTeX-E form of one leaf can go below.

    Args:
      offsets: D_t, [T, a, b], float32.
      task_rank: r_g.
      optimum: the residual of the closed form at rank r; NaN where unknown.

    Returns:
      The larger of `optimum` and the error of each task's own best approximation of rank r_g.
    """
    with jax.enable_x64(True):
        tails = float(_task_tails(jnp.asarray(offsets, jnp.float64), task_rank))
    return tails if np.isnan(optimum) else max(tails, optimum)


def fit(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    *,
    task_rank: int,
    sweeps: int = alternating.SWEEPS,
    tolerance: float = alternating.TOLERANCE,
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Solves every leaf, one at a time.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      task_rank: r_g, 1 or more; leaves of a rank up to it keep a free task factor (`Product`).
      sweeps: see `solve`.
      tolerance: see `solve`.
      progress: called with (leaves done, leaves).

    Returns:
      The state, in the baked form. `report.histories` has each leaf's residuals.

    Raises:
      ValueError: if a setting is out of range.
    """
    alternating.check_settings(sweeps, tolerance)
    base = tree.flatten(merged)
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    differences.add_vectors(experts, base, plans, offsets, report)
    for done, (name, plan) in enumerate(plans.items(), start=1):
        stack = differences.matrices(experts, base, name, plan)
        free = exact.solve_group(stack[None], plan.rank)
        exact.add_to_report(report, [name], free)
        if plan.rank <= task_rank:
            offsets[name] = Product(free.task_factors[0], free.shared_factor[0], plan.orientation)
        else:
            solution = solve(stack, plan.rank, task_rank, sweeps=sweeps, tolerance=tolerance)
            offsets[name] = Factorized(
                solution.left, solution.right, solution.shared_factor, plan.orientation
            )
            report.residuals[name] = solution.residual
            report.optima[name] = lower_bound(stack, task_rank, report.optima[name])
            report.histories[name] = solution.history
        if progress:
            progress(done, len(plans))
    return OffsetState.baked(merged, offsets, report, experts.num_tasks, experts.layout)
