"""The closed form of one leaf in the least precision whose result can be certified.

The Gram matrix, its leading eigenvectors and the projections cost half as much in float32 as in float64, and a
float32 Gram matrix C has an error F of some 1e-7 of its largest eigenvalue: harmless to the subspace where the
offsets' spectrum is anything but steep, but not known to be so. Here ||F|| is estimated from products with random
vectors in float64; what the found subspace captures is measured from the offsets themselves; and `eigen` bounds what
any other could capture. The sum of squares without that bound is a lower bound of the least residual.
It is reported as the optimum where the residual is within `TOLERANCE` of it; where it is not, the same is
tried in float64, and then all eigenvectors are computed by the caller.

`solve_parts` does the same with a few tasks at a time: float32 products of some tasks, whose sums are in float64.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.buffers import give_back_freed
from retex_jax.offsets import eigen
from retex_jax.offsets.blocks import fold_rows

TOLERANCE = 5e-5
"""The most by which the residual may exceed the reported optimum, relative."""

# Below this fraction of the energy a residual is not measured well enough in the precision of the products.
_FLOOR = {"float32": 1e-2, "float64": 1e-9}
# Where an offset is of lower rank than r, its residual is rounding of the stored factors, and no bound is needed.
_ROUNDING = 1e-11
# In a row of a Gram matrix: with more, less is computed below the diagonal, but in products too small to be fast.
_BLOCKS = 4
# Sides of a Gram matrix: below float64 costs nothing, above the matrix itself costs too much.
_LEAST_SIDE = 512
_MOST_SIDE = 8192
# Products of a Gram matrix of parts below which float64 costs nothing.
_LEAST_PRODUCTS = 1 << 32
# The mean square of an entry whose float32 products neither vanish nor overflow.
_SQUARES = (1e-25, 1e25)

Weighted = Callable[[], Iterator[tuple[range, jax.Array, np.ndarray]]]
"""A pass over the tasks: some of them, their offsets [c, a, b] and their weights [c], float32."""


class Certified(NamedTuple):
    """Of one leaf.

    Attributes:
      task_factors: [T, a, r], float32; by `solve_parts` [0, a, r], as they were put elsewhere.
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


def is_worth_in_parts(shape: tuple[int, int, int], rank: int) -> bool:
    """As `is_worth`, of offsets [T, a, b] that are read a few tasks at a time."""
    num_tasks, rows, columns = shape
    is_large = num_tasks * rows * columns**2 >= _LEAST_PRODUCTS
    return is_large and rank <= columns <= min(_MOST_SIDE, num_tasks * rows)


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
    size, probes = (
        offsets.size,
        eigen.probes(min(offsets.shape[0] * offsets.shape[1], offsets.shape[2])),
    )
    # Awaited, so that what they took is free before the next is taken.
    sums = jax.block_until_ready(_products(offsets, probes, dtype))
    del offsets
    give_back_freed()
    energy = float(sums.energy)
    if not _SQUARES[0] < energy / size < _SQUARES[1]:
        return None
    gram, error = jax.block_until_ready(_gram(sums.blocks, sums.exact, probes))
    del sums
    give_back_freed()
    found = eigen.leading(gram, rank, TOLERANCE)
    if found is None:
        return None
    del gram
    give_back_freed()
    own = read()
    is_tall = own.shape[0] * own.shape[1] >= own.shape[2]
    factors, shared, measured = _project(own, found.vectors, rank, is_tall)
    return _certify(factors, shared, measured, found, energy, float(error), dtype)


def solve_parts(
    weighted: Weighted, columns: int, rank: int, put: Callable[[range, jax.Array], None]
) -> Certified | None:
    """Solves one leaf of which a few tasks are held at a time, with products in float32.

    Args:
      weighted: gives the offsets, float32, in the same parts at both calls; there are at least b rows of all tasks. A
        task's squared error counts times the square of its weight, which is positive.
      columns: b.
      rank: r, from 1 to b.
      put: takes some tasks' factors, [c, a, r]. What it took is of no use where None is returned.

    Returns:
      The solution, weighted, or None where it could not be certified.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        probes = eigen.probes(columns)
        sums, size = _sum_parts(weighted, columns, probes)
        energy = float(sums.energy)
        if not _SQUARES[0] < energy / size < _SQUARES[1]:
            return None
        blocks = jax.tree.map(lambda block: block.astype(jnp.float32), sums.blocks)
        gram, error = _gram(blocks, sums.exact, probes)
        del sums
        found = eigen.leading(jax.block_until_ready(gram), rank, TOLERANCE)
        if found is None:
            return None
        del gram
        give_back_freed()
        shared, factors = jnp.zeros(()), jnp.zeros(())
        measured = _Measured(*(jnp.zeros((), jnp.float64) for _ in _Measured._fields))
        for part, offsets, own in weighted():
            scaled = _scale(offsets, own)
            factors, shared, here = _project(scaled, found.vectors, rank, is_tall=True)
            put(part, _scale(factors, 1 / own))
            del offsets, scaled  # What is put has been computed from them.
            measured = _Measured(
                measured.residual + here.residual,
                measured.captured + here.captured,
                here.overlaps,
            )
        return _certify(factors[:0], shared, measured, found, energy, float(error), "float32")


def _sum_parts(weighted: Weighted, columns: int, probes: np.ndarray) -> tuple["_Sums", int]:
    """One pass: sums over all tasks, and how many entries they have."""
    sums, size = _no_sums(columns), 0
    for _, offsets, own in weighted():
        size += offsets.size
        # Of the tasks before: no more are held than are read meanwhile.
        jax.block_until_ready(sums)
        sums = _add_products(sums, _scale(offsets, own), probes)
    return sums, size


class _Measured(NamedTuple):
    """Of a subspace Q, from the offsets themselves; float64.

    Attributes:
      residual: of the factors.
      captured: Q^T (C + F) Q, [m, m].
      overlaps: Q^T Q, [m, m].
    """

    residual: jax.Array
    captured: jax.Array
    overlaps: jax.Array


def _certify(
    factors: jax.Array,
    shared: jax.Array,
    measured: _Measured,
    found: eigen.Leading,
    energy: float,
    error: float,
    dtype: str,
) -> Certified | None:
    """The solution, if its residual is close enough to what any other could have."""
    residual = float(measured.residual)
    matrices = np.asarray(measured.captured), np.asarray(measured.overlaps)
    bound = eigen.most_captured(*matrices, found, len(shared), error)
    # What Q captures is a sum over rounded products.
    bound += float(np.finfo(dtype).eps * np.trace(matrices[0]))
    optimum = max(energy - bound, 0.0)
    is_rounding = dtype == "float64" and residual <= _ROUNDING * energy
    is_close = residual <= (1 + TOLERANCE) * optimum and residual >= _FLOOR[dtype] * energy
    if not (is_rounding or is_close):
        return None
    return Certified(factors, shared, residual, optimum, energy, found.spectrum)


def _parts(offsets: jax.Array) -> jax.Array:
    """The stack, or its transpose, whichever has fewer columns, in parts of its rows: [k, N / k, n]."""
    num_tasks, rows, columns = offsets.shape
    if num_tasks * rows >= columns:
        return offsets
    return offsets.reshape(-1, columns).T[None]


_Blocks = list[list[jax.Array]]
"""Of a Gram matrix: row i has those from the diagonal on, i, i + 1, ..."""


class _Sums(NamedTuple):
    """Over tasks.

    Attributes:
      blocks: of C, those on and above the diagonal.
      exact: C's products with `eigen.probes`, [n, k], float64.
      energy: the sum of squares, float64.
    """

    blocks: _Blocks
    exact: jax.Array
    energy: jax.Array


def _no_sums(columns: int) -> _Sums:
    return _Sums(_no_blocks(columns, "float64"), jnp.zeros((columns, eigen.PROBES)), jnp.zeros(()))


def _cuts(columns: int) -> list[slice]:
    """Of the columns, into blocks."""
    height = -(-columns // _BLOCKS)
    return [slice(i, min(i + height, columns)) for i in range(0, columns, height)]


def _no_blocks(columns: int, dtype: str) -> _Blocks:
    sizes = [cut.stop - cut.start for cut in _cuts(columns)]
    return [
        [jnp.zeros((size, other), dtype) for other in sizes[row:]] for row, size in enumerate(sizes)
    ]


def _blocks(parts: jax.Array, dtype: str) -> _Blocks:
    """The sum of the Gram matrices of some parts, [k, N / k, n]."""
    cuts = _cuts(parts.shape[2])

    def row(first: int, nothing: list[jax.Array]) -> list[jax.Array]:
        def add(index: int, sums: list[jax.Array]) -> list[jax.Array]:
            own = [parts[index, :, cut].astype(dtype) for cut in cuts[first:]]
            return [total + own[0].T @ right for total, right in zip(sums, own, strict=True)]

        return jax.lax.fori_loop(0, len(parts), add, nothing)

    return [row(first, own) for first, own in enumerate(_no_blocks(parts.shape[2], dtype))]


@partial(jax.jit, donate_argnames="sums")
def _add_products(sums: _Sums, offsets: jax.Array, probes: jax.Array) -> _Sums:
    """Adds some tasks' float32 products, and products with `eigen.probes` and squares in float64."""
    blocks = jax.tree.map(jnp.add, sums.blocks, _blocks(offsets, "float32"))
    stack = offsets.reshape(-1, offsets.shape[-1])
    return _Sums(blocks, *_add_exact((sums.exact, sums.energy), stack, probes))


def _scale(values: jax.Array, weights: np.ndarray) -> jax.Array:
    """Multiplies each task's values by its weight."""
    return values * weights[:, None, None] if np.any(weights != 1) else values


@partial(jax.jit, static_argnames="dtype")
def _products(offsets: jax.Array, probes: jax.Array, dtype: str) -> _Sums:
    """The sums of all tasks; blocks of this dtype."""
    parts = _parts(offsets)
    nothing = jnp.zeros(probes.shape), jnp.zeros(())
    exact = _add_exact(nothing, parts.reshape(-1, parts.shape[2]), probes)
    return _Sums(_blocks(parts, dtype), *exact)


def _add_exact(
    sums: tuple[jax.Array, jax.Array], stack: jax.Array, probes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds products with `eigen.probes`, and squares, in float64."""

    def add(sums: tuple[jax.Array, jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = rows.astype(jnp.float64)
        return sums[0] + wide.T @ (wide @ probes), sums[1] + jnp.sum(wide**2)

    return fold_rows(add, sums, stack)


@jax.jit
def _gram(blocks: _Blocks, exact: jax.Array, probes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """C, [n, n], and a bound of the Frobenius norm of its error."""
    cuts = _cuts(len(exact))
    gram = jnp.zeros((len(exact), len(exact)), blocks[0][0].dtype)
    for row, own in enumerate(blocks):  # each written in its place: no second matrix is held
        for column, block in enumerate(own, row):
            if column == row:
                block = (block + block.T) / 2
            gram = gram.at[cuts[row], cuts[column]].set(block)
            gram = gram.at[cuts[column], cuts[row]].set(block.T)
    return gram, eigen.norm_bound(eigen.multiply(gram, probes) - exact)


@partial(jax.jit, static_argnames=("rank", "is_tall"))
def _project(
    offsets: jax.Array, vectors: jax.Array, rank: int, is_tall: bool
) -> tuple[jax.Array, jax.Array, _Measured]:
    """Task factors [c, a, r], shared factor [r, b] and what the subspace captures.

    Args:
      offsets: [c, a, b].
      vectors: Q, [n, m].
      rank: r.
      is_tall: whether Q is of the columns; else of the rows of all tasks, which are then here.
    """
    dtype = vectors.dtype
    parts = offsets if is_tall else _parts(offsets)
    projected = jax.lax.map(lambda part: part.astype(dtype) @ vectors, parts)
    products = jax.lax.map(lambda part: (part.T @ part).astype(jnp.float64), projected)
    squares = jax.lax.map(lambda part: jnp.sum(part.astype(jnp.float64) ** 2, axis=0), projected)
    captured = jnp.fill_diagonal(products.sum(axis=0), squares.sum(axis=0), inplace=False)
    if is_tall:
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
    return factors, shared, _Measured(residual, captured, wide.T @ wide)
