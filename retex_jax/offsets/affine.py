"""ReTeX's full affine rule (arXiv:2606.26902, appendix A, Eqs. 12 and 13), leaf by leaf.

theta_t ~ theta_0 + gamma_t (theta_merge - theta_0) + G_t S, with a scalar gamma_t a task and leaf. With
D_t = theta_t - theta_merge, M = theta_merge - theta_0 and s_t = gamma_t - 1 that is D_t ~ s_t M + G_t S. For a
fixed S of orthonormal rows it is linear least squares: G_t = (D_t - s_t M) S^T leaves (D_t - s_t M) P with
P = I - S^T S, so that s_t = <D_t P, M P> / ||M P||^2. For fixed s_t the best S and G_t are the closed form of
D_t - s_t M. The two alternate from gamma_t = 1, ReTeX's own solution, so the squared error never rises and ends
at ReTeX's or below. The least possible one is unknown (NaN in the report).

Leaves below two axes are recovered exactly at gamma_t = 1, and need no theta_0. theta_0 of matrix leaves has to
be stored: one more model, near enough, which is why the paper fixes gamma_t = 1 (A.2). All in float64; factors
are stored in float32.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import alternating, differences, exact
from retex_jax.offsets.forms import Affine, Form
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import FlatParams, Params, ProgressFn


class AffineSolution(NamedTuple):
    """Of one leaf.

    Attributes:
      task_factors: G_t, [T, a, r], float32.
      shared_factor: S, [r, b], float32.
      scales: gamma_t - 1, [T], float32.
      residual: of what is stored.
      energy: ||D_t||^2 summed over tasks.
      history: residual at the start (gamma_t = 1) and after each half sweep, [1 + 2 n].
      gammas: at the start and after each sweep, [1 + n, T].
    """

    task_factors: jax.Array
    shared_factor: jax.Array
    scales: jax.Array
    residual: float
    energy: float
    history: np.ndarray
    gammas: np.ndarray


def solve(
    offsets: jax.Array,
    direction: jax.Array,
    rank: int,
    *,
    sweeps: int = alternating.SWEEPS,
    tolerance: float = alternating.TOLERANCE,
    max_gram: int = exact.MAX_GRAM,
) -> AffineSolution:
    """Solves one leaf.

    Args:
      offsets: D_t, [T, a, b], float32.
      direction: M, [a, b], as it is stored.
      rank: r, from 1 to min(a, b).
      sweeps: the most sweeps.
      tolerance: a sweep that takes less than this fraction of the residual away is the last.
      max_gram: see `exact.solve_group`.

    Returns:
      The solution; its history never rises.
    """
    with jax.enable_x64(True):
        stack, line = jnp.asarray(offsets, jnp.float64), jnp.asarray(direction, jnp.float64)
        energy = float(jnp.sum(stack**2))
        scales = jnp.zeros(len(stack))
        shared, residual = _subspace(stack, line, scales, rank, max_gram)
        history, gammas = [float(residual)], [1 + np.asarray(scales)]
        for _ in range(sweeps):
            scales, first = _scales(stack, line, shared, scales)
            shared, second = _subspace(stack, line, scales, rank, max_gram)
            history += [float(first), float(second)]
            gammas.append(1 + np.asarray(scales))
            if alternating.converged(history, energy, tolerance):
                break
        scales, shared = scales.astype(jnp.float32), shared.astype(jnp.float32)
        factors, residual = _stored(stack, line, scales, shared)
    return AffineSolution(
        factors, shared, scales, float(residual), energy, np.array(history), np.array(gammas)
    )


@jax.default_matmul_precision("highest")
def _outside(matrices: jax.Array, shared: jax.Array) -> jax.Array:
    """What lies outside of the rows of S: [..., a, b]."""
    return matrices - (matrices @ shared.T) @ shared


@jax.jit(static_argnames=("rank", "max_gram"))
def _subspace(
    offsets: jax.Array, direction: jax.Array, scales: jax.Array, rank: int, max_gram: int
) -> tuple[jax.Array, jax.Array]:
    left = offsets - scales[:, None, None] * direction
    with jax.default_matmul_precision("highest"):
        shared = exact.leading_rows(left.reshape(-1, left.shape[-1]), rank, max_gram)[0]
    return shared, jnp.sum(_outside(left, shared) ** 2)


@jax.jit
def _scales(
    offsets: jax.Array, direction: jax.Array, shared: jax.Array, scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
    across, along = _outside(offsets, shared), _outside(direction, shared)
    square = jnp.sum(along**2)
    # Where S holds all of M, the scale has no part in the error, and is left as it is.
    known = square > 1e-12 * jnp.sum(direction**2)
    solved = jnp.sum(across * along, axis=(1, 2)) / jnp.where(known, square, 1)
    scales = jnp.where(known, solved, scales)
    return scales, jnp.sum((across - scales[:, None, None] * along) ** 2)


@jax.jit
@jax.default_matmul_precision("highest")
def _stored(
    offsets: jax.Array, direction: jax.Array, scales: jax.Array, shared: jax.Array
) -> tuple[jax.Array, jax.Array]:
    left = offsets - scales.astype(offsets.dtype)[:, None, None] * direction
    basis = shared.astype(offsets.dtype)
    factors = (left @ basis.T).astype(jnp.float32)
    return factors, jnp.sum((left - factors.astype(offsets.dtype) @ basis) ** 2)


def directions(
    experts: ExpertSet, base: FlatParams, name: str, plan: LeafPlan
) -> tuple[jax.Array, jax.Array]:
    """theta_merge - theta_0 of one leaf.

    Returns:
      As it is stored, [a, b], of the leaf's dtype; and as the solvers see it, float32, transposed where S
      stands on the left.
    """
    leaf = jnp.asarray(base[name])
    difference = leaf.astype(jnp.float32) - jnp.asarray(experts.pretrained(name), jnp.float32)
    stored = jnp.asarray(tree.to_matrix(difference, plan.view)).astype(leaf.dtype)
    seen = stored.astype(jnp.float32)
    return stored, seen if plan.orientation == "right" else seen.T


def fit(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    *,
    sweeps: int = alternating.SWEEPS,
    tolerance: float = alternating.TOLERANCE,
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Solves every leaf, one at a time.

    Args:
      experts: the experts, with their pretrained model.
      merged: theta_merge.
      plans: of every matrix leaf.
      sweeps: see `solve`.
      tolerance: see `solve`.
      progress: called with (leaves done, leaves).

    Returns:
      The state, in the baked form; `report.histories` has each matrix leaf's residuals, `report.gammas` its
      gamma_t.

    Raises:
      ValueError: if a setting is out of range, or the experts have no pretrained model.
    """
    alternating.check_settings(sweeps, tolerance)
    base = tree.flatten(merged)
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    differences.add_vectors(experts, base, plans, offsets, report)
    for done, (name, plan) in enumerate(plans.items(), start=1):
        stack = differences.matrices(experts, base, name, plan)
        stored, seen = directions(experts, base, name, plan)
        solution = solve(stack, seen, plan.rank, sweeps=sweeps, tolerance=tolerance)
        offsets[name] = Affine(
            solution.task_factors,
            solution.shared_factor,
            solution.scales,
            stored,
            plan.orientation,
        )
        report.residuals[name], report.optima[name] = solution.residual, float("nan")
        report.energies[name] = solution.energy
        report.histories[name], report.gammas[name] = solution.history, solution.gammas
        if progress:
            progress(done, len(plans))
    return OffsetState.baked(merged, offsets, report, experts.num_tasks, experts.layout)
