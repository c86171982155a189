"""Fewer embeddings than tasks: ReTeX with d_emb < T, solved by alternating (arXiv:2606.26902, 4.1 and 5.4).

G_t = sum_k e_tk W_k (+ a bias): one embedding a task, shared by all leaves, is a Tucker-2 model along the tasks
of every leaf. With U the orthonormal basis of the embeddings' columns, [T, K], the squared error is the energy
less sum_l ||(U^T D)_l S_l^T||^2. For fixed U the best S_l are the top right singular vectors of the K a x b stack
of sum_t U_tk D_t; for fixed S_l the best U are the leading eigenvectors of the sum over leaves of the T x T
Gram matrices of D_t S_l^T (higher-order orthogonal iteration, L. De Lathauwer, B. De Moor and J. Vandewalle,
On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors, 2000). The error never rises.

With a bias, as in the paper's linear layer, K = d_emb + 1 and one column of U is the constant: the other
columns are the leading eigenvectors among those orthogonal to it. Leaves are read one at a time, once a sweep.
Gram matrices, subspaces and errors are float64; what is stored is float32.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import alternating, differences, exact
from retex_jax.offsets.forms import Elementwise, Form, Product
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import FlatParams, Params, ProgressFn


def is_free(num_tasks: int, d_emb: int, bias: bool) -> bool:
    """Whether embeddings of this size leave every task factor free, so that the closed form holds."""
    return d_emb + bias >= num_tasks


def leading_columns(gram: np.ndarray, d_emb: int, bias: bool) -> np.ndarray:
    """The best orthonormal basis of the embeddings for a Gram matrix over tasks.

    Args:
      gram: [T, T], float64, positive semi-definite.
      d_emb: columns that are free.
      bias: whether the last column is the constant.

    Returns:
      [T, K], K = d_emb + 1 with a bias, which maximises trace(U^T gram U).
    """
    num_tasks = len(gram)
    if not bias:
        return np.linalg.eigh(gram)[1][:, ::-1][:, :d_emb]
    constant = np.full((num_tasks, 1), num_tasks**-0.5)
    across = np.linalg.qr(np.hstack([constant, np.eye(num_tasks)[:, 1:]]))[0][:, 1:]
    vectors = np.linalg.eigh(across.T @ gram @ across)[1][:, ::-1]
    return np.hstack([across @ vectors[:, :d_emb], constant])


@jax.jit(static_argnames=("rank", "max_gram"))
@jax.default_matmul_precision("highest")
def _project(
    offsets: jax.Array, columns: jax.Array, rank: int, max_gram: int
) -> tuple[jax.Array, jax.Array]:
    """S for fixed embeddings [r, b], and D_t S^T [T, a, r]."""
    mixed = jnp.einsum("tk,tab->kab", columns, offsets)
    shared = exact.leading_rows(mixed.reshape(-1, offsets.shape[-1]), rank, max_gram)[0]
    return shared, offsets @ shared.T


@jax.jit
@jax.default_matmul_precision("highest")
def _task_gram(vectors: jax.Array) -> jax.Array:
    flat = vectors.reshape(len(vectors), -1)
    return flat @ flat.T


def fit(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    *,
    d_emb: int,
    bias: bool = True,
    sweeps: int = alternating.SWEEPS,
    tolerance: float = alternating.TOLERANCE,
    max_gram: int = exact.MAX_GRAM,
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Solves all leaves together.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      d_emb: size of the embeddings.
      bias: whether a leaf's linear layer has a bias, as the paper's has. Where the offsets' mean over tasks
        is zero, as with weight averaging, it holds nothing, and costs as much as one more of d_emb.
      sweeps: the most sweeps.
      tolerance: a sweep that takes less than this fraction of the residual away is the last.
      max_gram: see `exact.solve_group`; not of the closed form.
      progress: called with (sweeps done, sweeps), by the closed form with (leaves done, leaves).

    Returns:
      The state, as a generator: K = d_emb, or d_emb + 1 with a bias, whose entry of an embedding is the
      constant 1. With d_emb >= T - 1 (T without a bias) the closed form, in its baked form. Leaves below two
      axes are no longer exact. `report.histories[""]` has the residuals of all leaves together; the optimum of
      a leaf is a bound from below, the larger of those of free task factors and of free shared factors.

    Raises:
      ValueError: if a setting is out of range.
    """
    alternating.check_settings(sweeps, tolerance)
    if d_emb < 1:
        raise ValueError(f"d_emb: got {d_emb!r}, expected 1 or more")
    if is_free(experts.num_tasks, d_emb, bias):
        return exact.fit(experts, merged, plans, progress=progress)
    base = tree.flatten(merged)
    with jax.enable_x64(True):
        columns, history = _alternate(
            experts, base, plans, d_emb, bias, sweeps, tolerance, max_gram, progress
        )
        offsets, report = _finish(experts, base, plans, columns, d_emb, bias, max_gram)
    embeddings = columns.copy()
    if bias:
        embeddings[:, -1] = 1
    report.histories[""] = np.array(history)
    return OffsetState(
        merged=merged,
        task_embeddings=jnp.asarray(embeddings, jnp.float32),
        offsets=dict(sorted(offsets.items())),
        report=report,
        layout=experts.layout,
    )


def _alternate(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    d_emb: int,
    bias: bool,
    sweeps: int,
    tolerance: float,
    max_gram: int,
    progress: ProgressFn | None,
) -> tuple[np.ndarray, list[float]]:
    """The embeddings' basis [T, K], and the residual after each half sweep."""
    num_tasks = experts.num_tasks
    vectors_gram = np.zeros((num_tasks, num_tasks))
    gram = np.zeros((num_tasks, num_tasks))
    for name in experts.float_leaves:
        part = np.asarray(_task_gram(_differences(experts, base, name)))
        gram += part
        vectors_gram += 0 if name in plans else part
    energy = float(np.trace(gram))
    columns, history = leading_columns(gram, d_emb, bias), []
    for sweep in range(1, sweeps + 1):
        gram = vectors_gram.copy()
        for name, plan in plans.items():
            stack = jnp.asarray(differences.matrices(experts, base, name, plan), dtype=jnp.float64)
            projected = _project(stack, jnp.asarray(columns), plan.rank, max_gram)[1]
            gram += np.asarray(_task_gram(projected))
        history.append(energy - float(np.trace(columns.T @ gram @ columns)))
        columns = leading_columns(gram, d_emb, bias)
        history.append(energy - float(np.trace(columns.T @ gram @ columns)))
        if progress:
            progress(sweep, sweeps)
        if sweep > 1 and alternating.converged(history, energy, tolerance):
            break
    return columns, history


def _differences(experts: ExpertSet, base: FlatParams, name: str) -> jax.Array:
    return jnp.asarray(differences.vectors(experts, base, name), dtype=jnp.float64)


def _finish(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    columns: np.ndarray,
    d_emb: int,
    bias: bool,
    max_gram: int,
) -> tuple[dict[str, Form], FitReport]:
    """The shared factors and generators of a basis, and the certificate of what is stored."""
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    # A basis column is an embedding's column times 1, the constant's times T^(-1/2).
    embeddings, weights = columns.copy(), columns.copy()
    if bias:
        embeddings[:, -1] = 1
        weights[:, -1] = 1 / experts.num_tasks
    stored_embeddings = embeddings.astype(np.float32).astype(np.float64)
    for name in experts.float_leaves:
        vectors = np.asarray(_differences(experts, base, name))
        gram = np.asarray(_task_gram(jnp.asarray(vectors)))
        best = leading_columns(gram, d_emb, bias)
        bound = max(0.0, float(np.trace(gram) - np.trace(best.T @ gram @ best)))
        report.energies[name] = float(np.trace(gram))
        if name not in plans:
            generator = jnp.asarray(np.tensordot(weights, vectors, (0, 0)), jnp.float32)
            offsets[name] = Elementwise(generator, jnp.ones((), jnp.float32))
            found = np.tensordot(stored_embeddings, np.asarray(generator, np.float64), 1)
            report.residuals[name] = float(np.sum((vectors - found) ** 2))
            report.optima[name] = bound
            continue
        plan = plans[name]
        stack = differences.matrices(experts, base, name, plan)
        exact.add_to_report(report, [name], exact.solve_group(stack[None], plan.rank))
        stack = jnp.asarray(stack, dtype=jnp.float64)
        shared = _project(stack, jnp.asarray(columns), plan.rank, max_gram)[0].astype(jnp.float32)
        generator, residual = _generate(
            stack, jnp.asarray(weights), jnp.asarray(stored_embeddings), shared
        )
        offsets[name] = Product(generator, shared, plan.orientation)
        report.residuals[name] = float(residual)
        report.optima[name] = float(np.fmax(bound, report.optima[name]))
    return offsets, report


@jax.jit
@jax.default_matmul_precision("highest")
def _generate(
    offsets: jax.Array, weights: jax.Array, embeddings: jax.Array, shared: jax.Array
) -> tuple[jax.Array, jax.Array]:
    basis = shared.astype(offsets.dtype)
    generator = jnp.einsum("tk,tar->kar", weights, offsets @ basis.T).astype(jnp.float32)
    factors = jnp.einsum("tk,kar->tar", embeddings, generator.astype(offsets.dtype))
    return generator, jnp.sum((offsets - factors @ basis) ** 2)
