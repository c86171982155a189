"""The closed form of one leaf in the least precision whose result can be certified.

The Gram matrix, its leading eigenvectors and the projections cost half as much in float32 as in float64, and a
float32 Gram matrix C has an error F of some 1e-7 of its largest eigenvalue: harmless to the subspace where the
offsets' spectrum is anything but steep, but not known to be so. Here ||F|| is estimated from products with random
vectors in float64; what the found subspace captures is measured from the offsets themselves; and `eigen` bounds what
any other could capture. The sum of squares without that bound is a lower bound of the least residual.
It is reported as the optimum where the residual is within `TOLERANCE` of it; where it is not, the same is
tried in float64, and then all eigenvectors are computed by the caller.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.buffers import give_back_freed
from retex_jax.offsets import eigen

TOLERANCE = 5e-5
"""The most by which the residual may exceed the reported optimum, relative."""

# Below this fraction of the energy a residual is not measured well enough in the precision of the products.
_FLOOR = {"float32": 1e-2, "float64": 1e-9}
# Where an offset is of lower rank than r, its residual is rounding of the stored factors, and no bound is needed.
_ROUNDING = 1e-11
_STRIPS = 6
# Sides of a Gram matrix: below float64 costs nothing, above the matrix itself costs too much.
_LEAST_SIDE = 512
_MOST_SIDE = 8192
# The mean square of an entry whose float32 products neither vanish nor overflow.
_SQUARES = (1e-25, 1e25)


class Certified(NamedTuple):
    """Of one leaf.

    Attributes:
      task_factors: [T, a, r], float32.
      shared_factor: [r, b], float32, orthonormal rows.
      residual: of these factors.
      optimum: a lower bound of the least residual.
      energy: the sum of squares.
      spectrum: the squared singular values that are known, descending.
    """

    task_factors: jax.Array
    shared_factor: jax.Array
    residual: float
    optimum: float
    energy: float
    spectrum: np.ndarray


def is_worth(shape: tuple[int, int, int]) -> bool:
    """Whether offsets [T, a, b] are large enough to be solved here, and not too large for a Gram matrix."""
    num_tasks, rows, columns = shape
    return _LEAST_SIDE <= min(num_tasks * rows, columns) <= _MOST_SIDE


def solve(read: Callable[[], jax.Array], rank: int) -> Certified | None:
    """Solves one leaf.

    Args:
      read: gives D_t, [T, a, b], float32. They are not kept while the eigenvectors are sought, but read again.
      rank: r, from 1 to min(a, b).

    Returns:
      The solution, or None where it could not be certified.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for dtype in ("float32", "float64"):
            solution = _solve(read, rank, dtype)
            if solution is not None:
                return solution
    return None


def _solve(read: Callable[[], jax.Array], rank: int, dtype: str) -> Certified | None:
    offsets = read()
    energy = float(_energy(offsets))
    if not _SQUARES[0] < energy / offsets.size < _SQUARES[1]:
        return None
    probes = eigen.probes(min(offsets.shape[0] * offsets.shape[1], offsets.shape[2]))
    products = _products(offsets, probes, dtype)
    del offsets
    give_back_freed()
    gram, error = _gram(*products, probes)
    del products
    found = eigen.leading(gram, rank, TOLERANCE)
    if found is None:
        return None
    del gram
    give_back_freed()
    factors, shared, residual, captured, overlaps = _project(read(), found.vectors, rank)
    residual = float(residual)
    matrices = np.asarray(captured), np.asarray(overlaps)
    bound = eigen.most_captured(*matrices, found, rank, float(error))
    optimum = max(energy - bound, 0.0)
    is_rounding = dtype == "float64" and residual <= _ROUNDING * energy
    is_close = residual <= (1 + TOLERANCE) * optimum and residual >= _FLOOR[dtype] * energy
    if not (is_rounding or is_close):
        return None
    return Certified(factors, shared, residual, optimum, energy, found.spectrum)


@jax.jit
def _energy(offsets: jax.Array) -> jax.Array:
    return jnp.sum(offsets.astype(jnp.float64) ** 2)


def _parts(offsets: jax.Array) -> jax.Array:
    """The stack, or its transpose, whichever has fewer columns, in parts of its rows: [k, N / k, n]."""
    num_tasks, rows, columns = offsets.shape
    if num_tasks * rows >= columns:
        return offsets
    return offsets.reshape(-1, columns).T[None]


@partial(jax.jit, static_argnames="dtype")
def _products(
    offsets: jax.Array, probes: jax.Array, dtype: str
) -> tuple[list[jax.Array], jax.Array]:
    """What of C is on and above the diagonal, in strips of rows; and C's products with `eigen.probes`, in float64."""
    parts = _parts(offsets)
    columns = parts.shape[2]
    starts = range(0, columns, -(-columns // _STRIPS))

    def products(part: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        own, wide = part.astype(dtype), part.astype(jnp.float64)
        strips = [own[:, start : start + starts.step].T @ own[:, start:] for start in starts]
        return strips, wide.T @ (wide @ probes)

    def add(sums: tuple[list[jax.Array], jax.Array], part: jax.Array):
        return jax.tree.map(jnp.add, sums, products(part)), None

    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(products, parts[0])
    )
    return jax.lax.scan(add, nothing, parts)[0]


@jax.jit
def _gram(
    strips: list[jax.Array], exact: jax.Array, probes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """C, [n, n], and a bound of the Frobenius norm of its error."""
    rows, step = [], len(strips[0])
    for index, strip in enumerate(strips):
        height = len(strip)
        above = (
            earlier[:, (index - number) * step :][:, :height].T
            for number, earlier in enumerate(strips[:index])
        )
        symmetric = (strip[:, :height] + strip[:, :height].T) / 2
        rows.append(jnp.hstack([*above, symmetric, strip[:, height:]]))
    gram = jnp.vstack(rows)
    return gram, eigen.norm_bound(eigen.multiply(gram, probes) - exact)


@partial(jax.jit, static_argnames="rank")
def _project(
    offsets: jax.Array, vectors: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Factors, their residual, Q^T (C + F) Q and Q^T Q."""
    num_tasks, rows, columns = offsets.shape
    dtype = vectors.dtype
    projected = jax.lax.map(lambda part: part.astype(dtype) @ vectors, _parts(offsets))
    products = jax.lax.map(lambda part: (part.T @ part).astype(jnp.float64), projected)
    squares = jax.lax.map(lambda part: jnp.sum(part.astype(jnp.float64) ** 2, axis=0), projected)
    captured = jnp.fill_diagonal(products.sum(axis=0), squares.sum(axis=0), inplace=False)
    if num_tasks * rows >= columns:
        shared = vectors[:, :rank].T.astype(jnp.float32)
        factors = projected[:, :, :rank].astype(jnp.float32)
    else:
        shared = jnp.linalg.qr(projected[0, :, :rank])[0].T.astype(jnp.float32)
        factors = jax.lax.map(lambda matrix: matrix.astype(dtype) @ shared.T, offsets)
        factors = factors.astype(jnp.float32)

    def squared_error(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        matrix, factor = pair
        error = matrix - factor.astype(dtype) @ shared.astype(dtype)
        return jnp.sum(error.astype(jnp.float64) ** 2)

    residual = jnp.sum(jax.lax.map(squared_error, (offsets, factors)))
    wide = vectors.astype(jnp.float64)
    return factors, shared, residual, captured, wide.T @ wide
