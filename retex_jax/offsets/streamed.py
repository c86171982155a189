"""The closed form of one leaf of many experts, a few tasks at a time.

The Gram matrix of the stacked offsets is a sum over tasks, and so are the energy and the residual: two passes over the
experts, one for the sum and one for the task factors, need the memory of a few tasks' offsets, whatever T is. All sums
are in float64, so that the optimum is known; the products are in float32 where the result can be certified (see
`retex_jax.offsets.certified`). Where the Gram matrix is too large, power iterations take more passes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.buffers import aligned_empty
from retex_jax.offsets import certified
from retex_jax.offsets.blocks import ROWS, fold_rows
from retex_jax.offsets.certified import Weighted
from retex_jax.offsets.coding import Coded, Stored, code, code_factors, concatenate, dense

OVERSAMPLING = 16
POWER_ITERATIONS = 4
"""Of the range finder."""

# Copies of some tasks' offsets: as they are read and turned, while those before are multiplied in strips.
_HELD = 4
_MULTIPLE = 8  # of tasks, so that codes of few bits end on a byte

Read = Callable[[Sequence[int]], jax.Array]
"""D_t of some tasks: [c, a, b], float32."""


class Streamed(NamedTuple):
    """Of one leaf.

    Attributes:
      task_factors: [T, a, r].
      shared_factor: [r, b].
      residual: of these factors, weighted.
      optimum: of factors that are not coded; a lower bound where it was certified; NaN where it is unknown: in
        float32 or by the range finder.
      energy: weighted.
      spectrum: squared singular values, descending: [b], or those that are known.
    """

    task_factors: Stored
    shared_factor: Stored
    residual: float
    optimum: float
    energy: float
    spectrum: np.ndarray


def chunks(num_tasks: int, task_bytes: int, stack_bytes: int, bits: int = 32) -> list[range]:
    """Ranges of tasks that are held together: of so few that `_HELD` ranges' offsets take at most so many bytes.

    They are of one task at least, of eight below 8 bits; and all of one size, which is compiled once, where one above
    half of the largest divides T.
    """
    multiple = _MULTIPLE if bits < 8 else 1
    most = max(multiple, stack_bytes // (_HELD * task_bytes) // multiple * multiple)
    sizes = range(most, most // 2, -multiple)
    step = next((size for size in sizes if num_tasks % size == 0), most)
    return [range(start, min(start + step, num_tasks)) for start in range(0, num_tasks, step)]


def in_memory(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 memory that is not filled."""
    return aligned_empty(shape, np.float32)


def solve(
    read: Read,
    parts: Sequence[range],
    shape: tuple[int, int],
    rank: int,
    weights: np.ndarray,
    *,
    max_gram: int,
    bits: int = 32,
    precision: Literal["auto", "float64", "float32"] = "auto",
    empty: Callable[[tuple[int, ...]], np.ndarray] = in_memory,
) -> Streamed:
    """Solves one leaf.

    Args:
      read: gives the offsets of some tasks; called twice for each part, or seven times above `max_gram`.
      parts: the tasks, in order, as `chunks` cuts them.
      shape: (a, b).
      rank: r, from 1 to min(a, b).
      weights: [T]: a task's squared error counts times the square of its weight.
      max_gram: the largest side of a Gram matrix; the range finder of `retex_jax.offsets.exact` is used above it.
      bits: of an entry of the factors; see `retex_jax.offsets.exact.fit`.
      precision: of products, sums and eigenvectors; "auto" is float64, but for products of large leaves in float32
        that can be certified, if the factors are not coded.
      empty: shape to the float32 memory that takes the task factors, where they are not coded.

    Returns:
      The optimum.
    """

    def weighted() -> Iterator[tuple[range, jax.Array, np.ndarray]]:
        for part in parts:
            yield part, read(part), np.asarray(weights[part.start : part.stop], np.float32)

    factors: list[np.ndarray] = []

    def put(part: range, own: jax.Array) -> None:
        if not factors:
            factors.append(empty((len(weights), *own.shape[1:])))
        factors[0][part.start : part.stop] = own

    rows, columns = shape
    is_worth = certified.is_worth_in_parts((len(weights), rows, columns), rank)
    if precision == "auto" and bits == 32 and columns <= max_gram and is_worth:
        found = certified.solve_parts(weighted, columns, rank, put)
        if found is not None:
            return Streamed(factors[0], *found[1:])
    exactly = "float64" if precision == "auto" else precision
    with jax.enable_x64(exactly == "float64"), jax.default_matmul_precision("highest"):
        if columns <= max_gram:
            shared, spectrum, energy = _by_gram(weighted, columns, rank, exactly)
            optimum = spectrum[rank:].sum() if exactly == "float64" else jnp.nan
        else:
            shared, spectrum, energy = _by_range(weighted, columns, rank, exactly)
            optimum = jnp.nan
        stored: Stored = code(shared, bits, axis=-1)
        basis = jnp.asarray(dense(stored))
        residual = jnp.zeros((), exactly)
        coded: list[Coded] = []
        for part, offsets, own in weighted():
            own_factors, residual = _project(residual, offsets, own, basis, bits)
            if isinstance(own_factors, Coded):
                coded.append(own_factors)
            else:
                put(part, jnp.asarray(own_factors))
    return Streamed(
        factors[0] if factors else concatenate(coded),
        stored,
        float(residual),
        float(optimum),
        float(energy),
        np.asarray(spectrum),
    )


def _by_gram(
    weighted: Weighted, columns: int, rank: int, precision: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The shared factor, all squared singular values and the energy, in one pass."""
    gram, energy = (jnp.zeros(shape, precision) for shape in [(columns, columns), ()])
    for _, offsets, own in weighted():
        jax.block_until_ready(gram)  # of the tasks before: no more are held than are read meanwhile
        gram, energy = _add(gram, energy, offsets, own)
    return *_leading(gram, rank), energy


def _by_range(
    weighted: Weighted, columns: int, rank: int, precision: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The shared factor, the first squared singular values and the energy, by power iterations."""
    width = min(rank + OVERSAMPLING, columns)
    basis = jax.random.normal(jax.random.key(0), (columns, width), precision)
    for turn in range(POWER_ITERATIONS + 2):
        shapes = [(columns, width), (width, width), ()]
        image, gram, energy = (jnp.zeros(shape, precision) for shape in shapes)
        for _, offsets, own in weighted():
            jax.block_until_ready(image)
            image, gram, energy = _add_image(image, gram, energy, offsets, own, basis)
        if turn <= POWER_ITERATIONS:
            basis = jnp.linalg.qr(image)[0]
    turned, spectrum = _leading(gram, rank)
    shared = jnp.matmul(turned.astype(precision), basis.T).astype(jnp.float32)
    return shared, spectrum[:rank], energy


def _rows(offsets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stack of some tasks, [c a, b], and its rows' weights, [c a, 1]."""
    num_tasks, rows, columns = offsets.shape
    return offsets.reshape(num_tasks * rows, columns), jnp.repeat(weights, rows)[:, None]


@jax.jit
def _add_image(
    image: jax.Array,
    gram: jax.Array,
    energy: jax.Array,
    offsets: jax.Array,
    weights: jax.Array,
    basis: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds some tasks to C Q, [b, w], to Q^T C Q, [w, w], and to the sum of squares."""

    def add(sums: tuple[jax.Array, ...], rows: jax.Array, scales: jax.Array):
        wide = (rows * scales).astype(basis.dtype)
        projected = wide @ basis
        products = wide.T @ projected, projected.T @ projected, jnp.sum(wide**2)
        return jax.tree.map(jnp.add, sums, products)

    return fold_rows(add, (image, gram, energy), *_rows(offsets, weights))


@jax.jit
def _add(
    gram: jax.Array, energy: jax.Array, offsets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds some tasks to the Gram matrix [b, b] and to the sum of squares."""

    def add(sums: tuple[jax.Array, jax.Array], rows: jax.Array, scales: jax.Array):
        wide = (rows * scales).astype(gram.dtype)
        return sums[0] + wide.T @ wide, sums[1] + jnp.sum(wide**2)

    columns = offsets.shape[-1]
    return fold_rows(add, (gram, energy), *_rows(offsets, weights), rows=max(ROWS, columns))


@partial(jax.jit, static_argnames="rank")
def _leading(gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    eigenvalues, vectors = jnp.linalg.eigh(gram)
    shared = vectors[:, ::-1][:, :rank].T.astype(jnp.float32)
    return shared, jnp.maximum(eigenvalues[::-1], 0)


@partial(jax.jit, static_argnames="bits")
def _project(
    residual: jax.Array, offsets: jax.Array, weights: jax.Array, shared: jax.Array, bits: int
) -> tuple[Stored, jax.Array]:
    """Factors of some tasks; their weighted squared error is added to the residual."""
    basis = shared.astype(residual.dtype)
    stack, scales = _rows(offsets, weights)
    if bits == 32:
        factors = jax.lax.map(lambda row: row.astype(basis.dtype) @ basis.T, stack, batch_size=ROWS)
        own: Stored = factors.astype(jnp.float32).reshape(*offsets.shape[:2], len(basis))
    else:
        own = code_factors(offsets, shared, bits)

    def add(total: jax.Array, rows: jax.Array, scales: jax.Array, factors: jax.Array) -> jax.Array:
        error = rows.astype(basis.dtype) - factors.astype(basis.dtype) @ basis
        return total + jnp.sum((scales * error) ** 2)

    factors = jnp.asarray(dense(own)).reshape(len(stack), -1)
    return own, fold_rows(add, residual, stack, scales, factors)
