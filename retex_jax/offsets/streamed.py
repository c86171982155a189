"""The closed form of one leaf of many experts, a few tasks at a time.

The Gram matrix of the stacked offsets is a sum over tasks, and so are the energy and the residual: two passes over the
experts, one for the sum and one for the task factors, need the memory of a few tasks' offsets, whatever T is. All sums
are in float64 (default), so that the optimum is known.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.buffers import aligned_empty
from retex_jax.offsets.coding import Coded, Stored, code, code_factors, concatenate, dense

_MULTIPLE = 8  # of tasks, so that codes of any bits end on a byte

Read = Callable[[Sequence[int]], jax.Array]
"""D_t of some tasks: [c, a, b], float32."""


class Streamed(NamedTuple):
    """Of one leaf.

    Attributes:
      task_factors: [T, a, r].
      shared_factor: [r, b].
      residual: of these factors, weighted.
      optimum: of factors that are not coded; NaN in float32.
      energy: weighted.
      spectrum: squared singular values, [b], descending.
    """

    task_factors: Stored
    shared_factor: Stored
    residual: float
    optimum: float
    energy: float
    spectrum: np.ndarray


def chunks(num_tasks: int, task_bytes: int, stack_bytes: int) -> list[range]:
    """Ranges of tasks whose offsets take at most so many bytes together, or of eight."""
    step = max(_MULTIPLE, stack_bytes // task_bytes // _MULTIPLE * _MULTIPLE)
    return [range(start, min(start + step, num_tasks)) for start in range(0, num_tasks, step)]


def in_memory(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 memory that is not filled."""
    return aligned_empty(shape, np.float32)


def solve(
    read: Read,
    parts: Sequence[range],
    rank: int,
    weights: np.ndarray,
    *,
    bits: int = 32,
    precision: Literal["float64", "float32"] = "float64",
    empty: Callable[[tuple[int, ...]], np.ndarray] = in_memory,
) -> Streamed:
    """Solves one leaf.

    Args:
      read: gives the offsets of some tasks; called twice for each part.
      parts: the tasks, in order, as `chunks` cuts them.
      rank: r, from 1 to min(a, b).
      weights: [T]: a task's squared error counts times the square of its weight.
      bits: of an entry of the factors; see `retex_jax.offsets.exact.fit`.
      precision: of products, sums and eigenvectors.
      empty: shape to the float32 memory that takes the task factors, where they are not coded.

    Returns:
      The optimum.
    """

    def weighted() -> Iterator[tuple[range, jax.Array, jax.Array]]:
        for part in parts:
            own = jnp.asarray(weights[part.start : part.stop], jnp.float32)
            yield part, read(part), own

    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        gram, energy = jnp.zeros((), precision), jnp.zeros((), precision)
        for _, offsets, own in weighted():
            gram, energy = _add(gram, energy, offsets, own)
        shared, spectrum = _leading(gram, rank)
        optimum = spectrum[rank:].sum() if precision == "float64" else jnp.nan
        stored: Stored = code(shared, bits, axis=-1)
        basis = jnp.asarray(dense(stored))
        residual = jnp.zeros((), precision)
        coded: list[Coded] = []
        factors = None
        for part, offsets, own in weighted():
            own_factors, residual = _project(residual, offsets, own, basis, bits)
            if isinstance(own_factors, Coded):
                coded.append(own_factors)
            else:
                if factors is None:
                    factors = empty((len(weights), *own_factors.shape[1:]))
                factors[part.start : part.stop] = own_factors
    return Streamed(
        concatenate(coded) if factors is None else factors,
        stored,
        float(residual),
        float(optimum),
        float(energy),
        np.asarray(spectrum),
    )


@jax.jit
def _add(
    gram: jax.Array, energy: jax.Array, offsets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds some tasks to the Gram matrix [b, b] and to the sum of squares."""
    wide = (offsets * weights[:, None, None]).astype(gram.dtype)
    stack = wide.reshape(-1, wide.shape[-1])
    return gram + stack.T @ stack, energy + jnp.sum(wide**2)


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
    wide, basis = offsets.astype(residual.dtype), shared.astype(residual.dtype)
    own: Stored = (
        (wide @ basis.T).astype(jnp.float32) if bits == 32 else code_factors(offsets, shared, bits)
    )
    error = wide - jnp.asarray(dense(own)).astype(wide.dtype) @ basis
    return own, residual + jnp.sum((weights[:, None, None] * error) ** 2)
