"""Offsets without a shared factor: each task's own truncated SVD, D_t ~ L_t^T R_t.

The limit of ReTeX (arXiv:2606.26902, Eq. 4) in which nothing is shared: a rank costs a task a + b numbers
instead of a + b / T, but spends them on this task's directions only. Which of the two is the cheaper at
equal error depends on how far the tasks' subspaces overlap; `budget.allocate` decides leaf by leaf. Gram
matrices, their eigenvectors and residuals are float64.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.offsets import activations
from retex_jax.offsets.coding import code, dense
from retex_jax.offsets.forms import Separate
from retex_jax.typing import Array


class SeparateSolution(NamedTuple):
    """Of one leaf.

    Attributes:
      form: what is stored.
      residual: sum over tasks of the weighted squared errors of what is stored.
      optimum: the least that is possible at these ranks without coding.
      energy: the sum of the weighted squares.
    """

    form: Separate
    residual: float
    optimum: float
    energy: float


def solve(
    offsets: jax.Array,
    ranks: tuple[int, ...],
    task_weights: np.ndarray,
    bits: int = 32,
    root: Array | None = None,
) -> SeparateSolution:
    """Solves one leaf.

    The vectors of the shorter side are coded first; those of the longer side are then the least-squares
    solution for what the first have become.

    Args:
      offsets: D_t, [T, a, b], float32.
      ranks: of each task, T numbers from 0 to min(a, b).
      task_weights: [T]; a squared error counts times the square of its weight. They change the report
        only: each task has a solution of its own.
      bits: of an entry; see `coding.code`.
      root: L, [b, b], from `activations.roots`: errors, in the solution and in the report, are then those of
        D_t L.

    Returns:
      The solution.
    """
    swapped = offsets.shape[1] > offsets.shape[2]
    narrow = offsets.swapaxes(1, 2) if swapped else offsets
    metric = partial(activations.whiten, root=root, orientation="left" if swapped else "right")
    spectra, vectors = map(np.asarray, decompose(metric(narrow)))
    stack = np.asarray(narrow)
    tasks = range(len(ranks))
    short = np.concatenate([vectors[task, : ranks[task]] for task in tasks]).astype(np.float32)
    if root is not None and swapped:
        short = np.asarray(activations.unwhiten(short, root))
    coded_short = code(short, bits, axis=-1)
    basis = np.asarray(dense(coded_short)).astype(np.float64)
    after = None if root is None else np.asarray(root, np.float64)
    if after is not None and swapped:
        # The least squares are then those of the metric.
        stack, basis, after = after.T @ stack, basis @ after, None
    bounds = np.concatenate([[0], np.cumsum(ranks)])
    rows = [basis[bounds[task] : bounds[task + 1]] for task in tasks]
    long = np.concatenate([_least_squares(rows[task], stack[task]) for task in tasks])
    coded_long = code(long.astype(np.float32), bits, axis=-1)
    fitted = np.asarray(dense(coded_long)).astype(np.float64)
    weights = np.asarray(task_weights, np.float64) ** 2
    errors = (
        stack[task] - rows[task].T @ fitted[bounds[task] : bounds[task + 1]] for task in tasks
    )
    squares = [np.sum((error if after is None else error @ after) ** 2) for error in errors]
    tails = [spectra[task, ranks[task] :].sum() for task in tasks]
    pair = (coded_long, coded_short) if swapped else (coded_short, coded_long)
    left, right = jax.tree.map(jnp.asarray, pair)
    return SeparateSolution(
        Separate(left, right, tuple(ranks)),
        float(weights @ squares),
        float(weights @ tails),
        float(weights @ spectra.sum(axis=1)),
    )


def decompose(offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared singular values and left singular vectors of each task's offset.

    Args:
      offsets: [T, a, b] with a <= b, float32.

    Returns:
      [T, a], descending, and [T, a, a], a row a vector; float64.
    """
    with jax.enable_x64(True):
        return _decompose(jnp.asarray(offsets, jnp.float64))


def spectra(offsets: jax.Array) -> jax.Array:
    """Squared singular values of each task's offset, as `decompose` without the vectors: a fraction of its time.

    Args:
      offsets: [T, a, b] with a <= b, float32.

    Returns:
      [T, a], descending, float64.
    """
    with jax.enable_x64(True):
        return _spectra(jnp.asarray(offsets, jnp.float64))


@jax.jit
def _spectra(offsets: jax.Array) -> jax.Array:
    grams = jnp.matmul(offsets, offsets.swapaxes(1, 2), precision="highest")
    return jnp.maximum(jnp.linalg.eigvalsh(grams)[:, ::-1], 0)


@jax.jit
def _decompose(offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    grams = jnp.matmul(offsets, offsets.swapaxes(1, 2), precision="highest")
    values, vectors = jnp.linalg.eigh(grams)
    return jnp.maximum(values[:, ::-1], 0), vectors.swapaxes(1, 2)[:, ::-1]


def _least_squares(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The R that minimises ||matrix - rows^T R||: [r, a] and [a, b] to [r, b], float64."""
    gram = rows @ rows.T
    # A row of zeros has no part in the solution, and must not make it singular.
    ridge = 1e-9 * np.trace(gram) / max(1, len(gram)) * np.eye(len(gram))
    return np.linalg.solve(gram + ridge, rows @ matrix)
