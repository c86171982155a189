"""Leading eigenvectors of a large Gram matrix, and a bound on how much any others could capture.

Subspace iteration with a Chebyshev filter (Y. Zhou, Y. Saad, M. Tiago and J. Chelikowsky, Self-consistent-field
calculations using Chebyshev-filtered subspace iteration, 2006) needs a few products of the matrix with a block of
vectors where an eigendecomposition of all n needs some 10 n^3 operations, most of them bound by memory. A few steps
of Lanczos from random vectors tell beforehand about where the filter has to end, so that one round is enough where
the spectrum is not steep. The block is wider than what is kept of it, because its last vectors converge last. What it
finds proves nothing by itself: eigenvectors may be missing from the block. The proof is dual. For every sigma and
every P >= 0 with P + sigma I >= C, the r largest eigenvalues of C have a sum of at most r sigma + tr P; beside the
found subspace C has to be below some beta < sigma, which a Cholesky factorisation of beta I - C + z Q Q^T shows.
Where the proof fails, as it must with more equal eigenvalues than the block holds, callers compute all eigenvectors.

Products are in the matrix' own precision. What they are wrong by is not assumed but estimated, from their products
with random vectors in float64; an estimate is below the truth with a probability of 2e-6.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.offsets.blocks import ROWS, fold_rows

MOST_DIRECT = 1024
"""The largest side of a matrix whose eigenvectors are all computed: iteration is not faster below."""

PROBES = 16
"""Random vectors by which an error is estimated."""

# The mean of 16 squares of a Gaussian vector's product is below 1/10 of the squared norm with that probability.
_UNDERESTIMATE = 10.0

# Of the rank: vectors that are kept beyond it, and those that are iterated beyond these. Both blocks are rounded up, so
# that leaves of almost equal ranks share their compiled programs.
_KEPT, _ITERATED = 0.1875, 0.3125
_LEAST_KEPT, _LEAST_ITERATED, _MULTIPLE = 16, 8, 16
_DEGREE = 12
_MAX_ROUNDS = 12
# By how much a filter may enlarge the first eigenvector over the last: what it leaves is to be above rounding.
_GROWTH = {"float32": 1e7, "float64": 1e12}
_LANCZOS = 12  # steps


class Leading(NamedTuple):
    """A subspace that holds the leading eigenvectors of C, [n, n], nearly.

    Attributes:
      vectors: Ritz vectors Q, [n, m], C's dtype, of eigenvalues that descend; r <= m <= n. They are orthonormal up
        to rounding.
      defects: E^T E of E = C Q - Q diag(Ritz values), [m, m], float64.
      error: a bound of the Frobenius norm of the error of E.
      beyond: no x that is orthogonal to Q has x^T C x > beyond x^T x.
      spectrum: eigenvalues that are known, descending, float64: all n of them, or m Ritz values.
    """

    vectors: jax.Array
    defects: np.ndarray
    error: float
    beyond: float
    spectrum: np.ndarray


def leading(gram: jax.Array, rank: int, tolerance: float) -> Leading | None:
    """Finds the leading eigenvectors of a Gram matrix.

    Args:
      gram: C, [n, n], symmetric, positive semidefinite up to rounding, float32 or float64; its memory may be taken.
      rank: r, from 1 to n.
      tolerance: iteration ends when the bound of `most_captured` exceeds the sum of the first r Ritz values by
        a quarter of this at most, relative to what these leave of C's trace.

    Returns:
      The subspace, or None where it was not found.
    """
    kept = min(len(gram), _rounded(rank + max(_LEAST_KEPT, round(_KEPT * rank))))
    width = min(len(gram), _rounded(kept + max(_LEAST_ITERATED, round(_ITERATED * rank))))
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        if len(gram) <= max(MOST_DIRECT, 2 * width):
            return _direct(gram, kept)
        return _iterate(gram, rank, kept, width, tolerance)


def most_captured(
    captured: np.ndarray, overlaps: np.ndarray, found: Leading, rank: int, error: float
) -> float:
    """An upper bound of the sum of the r largest eigenvalues of C + F, of which F is the error of C.

    In an orthonormal basis that begins with Q's span the matrix is [[A, E^T], [E, B]], B <= beta I. For
    sigma > beta, P = (A - sigma I + E^T E / (sigma - beta))_+ on Q makes P + sigma I - C - F positive semidefinite
    (Schur's complement), so that the sum is at most r sigma + tr P.

    Args:
      captured: Q^T (C + F) Q, [m, m], float64, m >= r.
      overlaps: Q^T Q, [m, m], float64.
      found: of C.
      rank: r.
      error: a bound of the Frobenius norm of F.

    Returns:
      The bound.
    """
    inverse = np.linalg.inv(np.linalg.cholesky(overlaps)).T
    captured = inverse.T @ captured @ inverse
    # (E + F Q)^T (E + F Q) <= (1 + x) E^T E + (1 + 1 / x) (F Q)^T F Q for any x > 0.
    errors = (error + found.error) ** 2
    squares = np.trace(found.defects) / len(captured)
    x = np.clip(np.sqrt(errors / squares), 1e-3, 1.0) if squares > 0 else 1.0
    both = (1 + x) * found.defects + (1 + 1 / x) * errors * np.eye(len(captured))
    defects = inverse.T @ both @ inverse
    beta = found.beyond + error
    sigma = _sigma(np.diag(captured), np.diag(defects), beta, rank)
    eigenvalues = np.linalg.eigvalsh(
        captured - sigma * np.eye(len(captured)) + defects / (sigma - beta)
    )
    return float(rank * sigma + np.maximum(eigenvalues, 0).sum())


def norm_bound(errors: jax.Array) -> jax.Array:
    """A bound of a matrix' Frobenius norm by its products with Gaussian vectors, [n, PROBES], float64."""
    return jnp.sqrt(_UNDERESTIMATE / PROBES) * jnp.linalg.norm(errors)


def probes(size: int) -> np.ndarray:
    """Gaussian vectors, [size, PROBES], float64."""
    return np.random.default_rng(1).standard_normal((size, PROBES))


def multiply(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """In float64, without a float64 copy of the matrix: [n, k], [k, m] to [n, m]."""
    return jax.lax.map(lambda row: row.astype(jnp.float64) @ vectors, matrix, batch_size=ROWS)


def _multiply_transposed(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """A^T V in float64, without a transposed copy of A: [n, n], [n, k] to [n, k]."""

    def add(products: jax.Array, rows: jax.Array, beside: jax.Array) -> jax.Array:
        return products + rows.astype(jnp.float64).T @ beside

    return fold_rows(add, jnp.zeros(vectors.shape, jnp.float64), matrix, vectors)


def _bounds(values: np.ndarray, excess: np.ndarray, beta: float, rank: int) -> np.ndarray:
    """Of diagonal matrices, for many sigmas: [k, 2], sigma and bound; values descend."""
    gaps = max(values[0], np.finfo(float).tiny) * np.geomspace(1e-9, 1, 200)
    # Without errors the best sigmas lie between the r-th and the next value, which may be closer than these.
    between = values[rank - 1 : rank + 1].mean() - beta
    gaps = np.append(gaps, max(between, gaps[0]))
    sigmas = beta + gaps
    positive = values - sigmas[:, None] + excess / gaps[:, None]
    return np.stack([sigmas, rank * sigmas + np.maximum(positive, 0).sum(axis=1)], axis=1)


def _sigma(values: np.ndarray, excess: np.ndarray, beta: float, rank: int) -> float:
    bounds = _bounds(values, excess, beta, rank)
    return float(bounds[np.argmin(bounds[:, 1]), 0])


@partial(jax.jit, static_argnames="width")
def _decompose(gram: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    eigenvalues, vectors = jnp.linalg.eigh(gram.astype(jnp.float64))
    return eigenvalues[::-1], vectors[:, ::-1][:, :width].astype(gram.dtype)


def _rounded(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _direct(gram: jax.Array, width: int) -> Leading:
    eigenvalues, vectors = _decompose(gram, width)
    spectrum = np.asarray(eigenvalues)
    largest = abs(spectrum[0])
    rounding = len(gram) * np.finfo(float).eps * largest
    beyond = (spectrum[width] if width < len(gram) else 0.0) + rounding
    # Eigenvectors are rounded to C's dtype.
    error = 2 * largest * np.sqrt(width) * np.finfo(gram.dtype).eps + np.sqrt(width) * rounding
    nothing = np.zeros((width, width))
    return Leading(vectors, nothing, float(error), float(beyond), np.maximum(spectrum, 0))


def _iterate(gram: jax.Array, rank: int, kept: int, width: int, tolerance: float) -> Leading | None:
    trace = float(jnp.diagonal(gram).astype(jnp.float64).sum())
    if not trace > 0:
        return None
    rounding = np.finfo(gram.dtype).eps
    drawn = np.random.default_rng(0).standard_normal((len(gram), width), np.float32)
    basis = jnp.asarray(drawn, gram.dtype)
    top, edge = _estimated_edge(gram, basis[:, :PROBES], width / len(gram))
    image = gram @ basis
    for turn in range(_MAX_ROUNDS + 1):
        edge = max(edge, float(rounding) * top)
        growth = np.arccosh(max(2 * top / edge - 1, 1 + 1e-6))
        degree = int(np.clip(np.arccosh(_GROWTH[gram.dtype.name]) / growth, 2, _DEGREE))
        basis, image = _filter(gram, basis, image, top, edge, degree)
        basis, image, values, excess = _rotate(basis, image)
        ritz = np.asarray(values, np.float64)
        beyond = _beyond(ritz[:kept], rank)
        left = trace - ritz[:rank].sum()
        bounds = _bounds(ritz[:kept], np.asarray(excess[:kept], np.float64), beyond, rank)[:, 1]
        is_found = bounds.min() - ritz[:rank].sum() <= tolerance / 4 * left
        if is_found or turn == _MAX_ROUNDS or not left > rounding * trace:
            break
        top, edge = float(ritz[0]), float(ritz[(kept + width) // 2 - 1])
    basis, image, values = basis[:, :kept], image[:, :kept], values[:kept]
    defects, error, above, is_below = _prove(gram, basis, image, values, beyond, 2 * ritz[0])
    if not bool(is_below):
        return None
    beyond += float(above)
    return Leading(basis, np.asarray(defects), float(error), beyond, np.maximum(ritz[:kept], 0))


def _beyond(ritz: np.ndarray, rank: int) -> float:
    """What is tried as the bound beyond the block."""
    return max((ritz[-1] + ritz[rank - 1]) / 2, ritz[-1] + 1e-6 * ritz[rank - 1], 1e-12 * ritz[0])


def _estimated_edge(gram: jax.Array, vectors: jax.Array, share: float) -> tuple[float, float]:
    """About the largest eigenvalue, and the one above which this share of all lie: by Lanczos quadrature."""
    diagonals, besides = (np.asarray(x, np.float64) for x in _tridiagonals(gram, vectors))
    order = np.arange(len(diagonals))
    matrices = np.zeros((vectors.shape[1], len(order), len(order)))
    matrices[:, order, order] = diagonals.T
    matrices[:, order[1:], order[:-1]] = besides[:-1].T  # eigh reads the lower triangle
    nodes, turns = np.linalg.eigh(matrices)
    descending = np.argsort(-nodes, axis=None)
    above = np.cumsum((turns[:, 0] ** 2).reshape(-1)[descending]) / vectors.shape[1]
    nodes = nodes.reshape(-1)[descending]
    return float(nodes[0]), float(nodes[min(np.searchsorted(above, share), nodes.size - 1)])


@jax.jit
def _tridiagonals(gram: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lanczos from k vectors, each on its own: the diagonals, and what is beside them, [steps, k]."""

    def step(carry: tuple[jax.Array, ...], _: None):
        before, now, scale = carry
        image = gram @ now - scale * before
        diagonal = jnp.sum(image * now, axis=0)
        image -= diagonal * now
        scale = jnp.linalg.norm(image, axis=0)
        return (now, image / jnp.maximum(scale, jnp.finfo(gram.dtype).tiny), scale), (
            diagonal,
            scale,
        )

    start = vectors / jnp.linalg.norm(vectors, axis=0)
    nothing = jnp.zeros_like(start)
    return jax.lax.scan(step, (nothing, start, nothing[0]), length=_LANCZOS)[1]


@jax.jit
def _rotate(
    basis: jax.Array, image: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ritz vectors, their images and values, descending, and the squared norms of their defects."""
    values, turn = jnp.linalg.eigh((basis.T @ image).astype(jnp.float64))
    values, turn = values[::-1].astype(basis.dtype), turn[:, ::-1].astype(basis.dtype)
    basis, image = basis @ turn, image @ turn
    return basis, image, values, jnp.sum((image - basis * values) ** 2, axis=0)


@jax.jit
def _filter(
    gram: jax.Array, basis: jax.Array, image: jax.Array, top: float, edge: float, degree: int
) -> tuple[jax.Array, jax.Array]:
    """Applies the Chebyshev polynomial that is small from 0 to `edge` and 1 at `top`."""
    half = jnp.asarray(edge / 2, gram.dtype)
    ratio = jnp.asarray(half / (top - half), gram.dtype)

    def step(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        before, now, scale = carry
        following = 1 / (2 / ratio - scale)
        after = (gram @ now - half * now) * (2 * following / half) - scale * following * before
        return now, after, following

    first = (image - half * basis) * (ratio / half)
    filtered = jax.lax.fori_loop(1, degree, step, (basis, first, ratio))[1]
    basis = jnp.linalg.qr(filtered)[0]
    return basis, gram @ basis


def _prove(
    gram: jax.Array,
    basis: jax.Array,
    image: jax.Array,
    values: jax.Array,
    beyond: float,
    lift: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """E^T E and the error of E; and of beta I - C + z Q Q^T = L L^T the error, and whether there is an L.

    C's memory is taken: no more than two matrices of its size are held.
    """
    probe = probes(len(gram))
    defects, error, wanted = _defects(gram, basis, image, values, beyond, lift, probe)
    deflated = jax.block_until_ready(_deflated(gram, basis, beyond, lift))
    del gram
    lower = jax.block_until_ready(_cholesky(deflated))
    return defects, error, *_checked(lower, probe, wanted)


@jax.jit
def _defects(
    gram: jax.Array,
    basis: jax.Array,
    image: jax.Array,
    values: jax.Array,
    beyond: float,
    lift: float,
    probe: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """E^T E, a bound of the error of E, and the deflated matrix' products with random vectors."""
    wide = basis.astype(jnp.float64)
    defect = image.astype(jnp.float64) - wide * values.astype(jnp.float64)
    turned = probe[: basis.shape[1]]
    both = multiply(gram, jnp.hstack([wide @ turned, probe]))
    error = norm_bound(both[:, :PROBES] - image.astype(jnp.float64) @ turned)
    wanted = beyond * probe - both[:, PROBES:] + lift * (wide @ (wide.T @ probe))
    return defect.T @ defect, error, wanted


@partial(jax.jit, donate_argnames="gram")
def _deflated(gram: jax.Array, basis: jax.Array, beyond: float, lift: float) -> jax.Array:
    """C without the block, to be factorised: beta I - C + z Q Q^T."""
    lifted = basis * jnp.asarray(lift, gram.dtype)
    return lifted @ basis.T - gram + jnp.diag(jnp.full(len(gram), beyond, gram.dtype))


@partial(jax.jit, donate_argnames="matrix")
def _cholesky(matrix: jax.Array) -> jax.Array:
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@jax.jit
def _checked(lower: jax.Array, probe: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A bound of the error of L L^T, and whether there is an L."""
    error = norm_bound(multiply(lower, _multiply_transposed(lower, probe)) - wanted)
    return error, jnp.all(jnp.isfinite(jnp.diagonal(lower)))
