"""Sums over the rows of large stacks, a block of rows at a time: what is made of a block is small."""

from collections.abc import Callable
from typing import TypeVar

import jax

_Sums = TypeVar("_Sums")

ROWS = 512
"""That are made float64 at once: they stay in the processor's cache."""


def fold_rows(
    add: Callable[..., _Sums], sums: _Sums, *stacks: jax.Array, rows: int = ROWS
) -> _Sums:
    """Adds blocks of rows to sums.

    Args:
      add: sums and a block of each stack, [k, ...], k <= rows, to new sums.
      sums: a tree of arrays.
      stacks: [n, ...].
      rows: of a block.

    Returns:
      The sums over all rows.
    """
    size = len(stacks[0])
    step = min(rows, size)
    whole = size // step * step

    def add_block(index: int, sums: _Sums) -> _Sums:
        blocks = (jax.lax.dynamic_slice_in_dim(stack, index * step, step) for stack in stacks)
        return add(sums, *blocks)

    sums = jax.lax.fori_loop(0, size // step, add_block, sums)
    return add(sums, *(stack[whole:] for stack in stacks))
