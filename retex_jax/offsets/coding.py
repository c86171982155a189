"""Factors stored in few bits: 16, 8, 4, 3, 2 or 1 an entry, and one scale a row or column.

At 16 bits an entry is float16 times its scale, at 8 an integer from -127 to 127 times its scale. At 4 bits
and below it is a level of the quantiser that is optimal for a normal distribution (J. Max, Quantizing for
minimum distortion, 1960, table I), times the scale that is then best in least squares. Scales are bfloat16. Codes
are packed without gaps, so that the bytes of a coded array are those of the released file. All functions take
and give NumPy's arrays or JAX's, and can be traced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from operator import or_

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.typing import Array

BITS = (1, 2, 3, 4, 8, 16, 32)
"""Bits an entry that `code` knows; 32 leaves an array as it is."""

SCALE_BYTES = 2

# The positive half of the levels, for unit variance.
_HALF_LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """An array in few bits.

    Attributes:
      codes: 16 bits: float16, [*shape]; 8: int8, [*shape]; below: packed levels, uint8, [n].
      scales: bfloat16, [*shape] with 1 for the axes that share a scale.
      bits: an entry.
      shape: of the array.
    """

    codes: Array
    scales: Array
    bits: int = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})


Stored = Array | Coded
"""A factor as it is stored."""


def levels(bits: int) -> np.ndarray:
    """The 2^bits levels for unit variance, ascending, float32."""
    half = np.array(_HALF_LEVELS[bits], np.float32)
    return np.concatenate([-half[::-1], half])


def code(array: Array, bits: int, axis: int | tuple[int, ...]) -> Stored:
    """Stores an array in few bits.

    Args:
      array: [*shape], float32, at least one axis.
      bits: one of `BITS`.
      axis: along which entries share a scale.

    Returns:
      The coded array; with 32 bits the array itself.

    Raises:
      ValueError: if `bits` is unknown.
    """
    check_bits("bits", bits)
    if bits == 32:
        return array
    xp = array.__array_namespace__()
    array = array.astype(xp.float32)
    if bits >= 8:
        limit = 1.0 if bits == 16 else 127.0
        scales = (xp.max(xp.abs(array), axis=axis, keepdims=True) / limit).astype(jnp.bfloat16)
        scaled = array / _divisor(scales)
        if bits == 16:
            return Coded(scaled.astype(xp.float16), scales, bits, array.shape)
        rounded = xp.clip(xp.round(scaled), -127, 127).astype(xp.int8)
        return Coded(rounded, scales, bits, array.shape)
    table = xp.asarray(levels(bits))
    deviation = xp.sqrt(xp.mean(array**2, axis=axis, keepdims=True))
    # All comparisons at once are compiled in half of the time of a search; NumPy has the search only.
    search = {} if xp is np else {"method": "compare_all"}
    indices = xp.searchsorted((table[1:] + table[:-1]) / 2, array / _divisor(deviation), **search)
    chosen = table[indices]
    best = xp.sum(array * chosen, axis=axis, keepdims=True)
    best = best / xp.sum(chosen**2, axis=axis, keepdims=True)
    return Coded(pack(indices, bits), best.astype(jnp.bfloat16), bits, array.shape)


def dense(stored: Stored) -> Array:
    """The array that is stored: [*shape], float32 where it is coded."""
    if not isinstance(stored, Coded):
        return stored
    if stored.bits >= 8:
        values = stored.codes.astype("float32")
    else:
        table = stored.codes.__array_namespace__().asarray(levels(stored.bits))
        values = table[unpack(stored.codes, stored.bits, prod(stored.shape))].reshape(stored.shape)
    return values * stored.scales.astype("float32")


def code_factors(offsets: jax.Array, shared: jax.Array, bits: int) -> Stored:
    """The least-squares task factors for a given shared factor, in few bits.

    Args:
      offsets: D_t, [T, a, b], float32.
      shared: S, [r, b], float32, of any rows.
      bits: of an entry.

    Returns:
      [T, a, r].
    """
    with jax.default_matmul_precision("highest"):
        gram = shared @ shared.T
        # A row of zeros has no part in the solution, and must not make it singular.
        ridge = 1e-6 * jnp.trace(gram) / max(1, len(gram))
        stack = offsets.reshape(-1, offsets.shape[-1])
        solved = jnp.linalg.solve(gram + ridge * jnp.eye(len(gram)), shared @ stack.T)
    return code(solved.T.reshape(*offsets.shape[:2], -1), bits, axis=-2)


def concatenate(parts: Sequence[Stored]) -> Stored:
    """Joins what is coded alike along the first axis.

    Args:
      parts: all but the last of a multiple of eight entries of the first axis, so that codes end on a byte.
    """
    first = parts[0]
    if not isinstance(first, Coded):
        return jnp.concatenate([jnp.asarray(part) for part in parts])
    same = [part for part in parts if isinstance(part, Coded)]
    shape = (sum(part.shape[0] for part in same), *first.shape[1:])
    codes = jnp.concatenate([part.codes for part in same])
    return Coded(codes, jnp.concatenate([part.scales for part in same]), first.bits, shape)


def take(stored: Stored, indices: np.ndarray) -> Stored:
    """Some of the entries of the first axis, as they are stored: [n, *rest] to [len(indices), *rest]."""
    if not isinstance(stored, Coded):
        return stored[indices]
    shape = (len(indices), *stored.shape[1:])
    codes = stored.codes
    if stored.bits < 8:
        values = unpack(codes, stored.bits, prod(stored.shape)).reshape(stored.shape)
        codes = pack(values[indices], stored.bits)
    else:
        codes = codes[indices]
    return Coded(codes, stored.scales[indices], stored.bits, shape)


def pack(indices: Array, bits: int) -> Array:
    """Packs integers below 2^bits without gaps, the first in the highest bits: any shape to uint8 [n]."""
    xp = indices.__array_namespace__()
    digits = indices.reshape(-1, 1) >> xp.arange(bits - 1, -1, -1)
    return xp.packbits((digits & 1).astype(xp.uint8).ravel())


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Undoes `pack`: uint8 [n] to integers [count]."""
    xp = packed.__array_namespace__()
    digits = xp.unpackbits(packed, count=count * bits).reshape(count, bits)
    # A product with powers of two takes twice as long to compile.
    parts = [digits[:, place].astype(xp.int32) << (bits - 1 - place) for place in range(bits)]
    return reduce(or_, parts)


def coded_bytes(size: int, num_scales: int, bits: int) -> int:
    """Bytes of `size` entries with `num_scales` scales."""
    check_bits("bits", bits)
    return 4 * size if bits == 32 else -(-size * bits // 8) + SCALE_BYTES * num_scales


def bits_problems(name: str, bits: int) -> list[str]:
    """What is wrong with a number of bits: nothing if it is one of `BITS`."""
    return [] if bits in BITS else [f"{name}: got {bits!r}, expected one of {list(BITS)}"]


def check_bits(name: str, bits: int) -> None:
    """Raises ValueError unless `bits` is one of `BITS`."""
    if problems := bits_problems(name, bits):
        raise ValueError(*problems)


def _divisor(scales: Array) -> Array:
    scales = scales.astype("float32")
    return scales + (scales == 0)
