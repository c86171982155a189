"""Spends a number of bytes on the ranks of all leaves, where they reduce the squared error most.

The error that a further rank of a leaf removes is its squared singular value, so gains fall with the rank,
and for one price of a byte the best ranks are those whose gain is worth their bytes (the Lagrangian of the
problem; every such choice is optimal for the bytes that it spends). The price is found by bisection. At one
price a leaf may have the tasks share a factor or not, whichever leaves more. What coding loses is not counted: it
takes the same part of every gain.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.offsets import exact, separate
from retex_jax.offsets.coding import SCALE_BYTES, check_bits, coded_bytes
from retex_jax.offsets.state import LeafPlan

Sharing = Literal["shared", "separate", "auto"]
"""Whether the tasks share a factor: always, never, or where it is worth its bytes."""

_BISECTIONS = 60

# The highest rank of a shared factor where a leaf is too large for its whole spectrum.
_MOST_SHARED = 512


class Spectra(NamedTuple):
    """Of one leaf; what one price is compared with.

    Attributes:
      num_tasks: T.
      shared: squared singular values of the stack of all tasks, descending, [k]; empty if nothing may be
        shared.
      separate: of each task's own offset, [T, k']; empty if all must be shared.
    """

    num_tasks: int
    shared: np.ndarray
    separate: np.ndarray


class _Choice(NamedTuple):
    gain: float
    bytes: float
    ranks: int | tuple[int, ...]


@jax.jit
def _stack_spectrum(offsets: jax.Array) -> jax.Array:
    stack = offsets.reshape(-1, offsets.shape[-1])
    if min(stack.shape) > exact.MAX_GRAM:
        return exact.leading_rows(stack, min(_MOST_SHARED, *offsets.shape[1:]), exact.MAX_GRAM)[1]
    tall = stack if stack.shape[0] >= stack.shape[1] else stack.T
    gram = jnp.matmul(tall.T, tall, precision="highest")
    return jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1], 0)


def spectra(offsets: jax.Array, task_weights: np.ndarray, sharing: Sharing = "auto") -> Spectra:
    """Measures one leaf.

    Args:
      offsets: D_t, [T, a, b], float32; whitened ones (`activations.whiten`) for the gains of their metric.
      task_weights: [T].
      sharing: decides which of the spectra are needed.

    Returns:
      Its spectra, of weighted offsets.
    """
    weighted = offsets * jnp.asarray(task_weights, jnp.float32)[:, None, None]
    narrow = weighted if weighted.shape[1] <= weighted.shape[2] else weighted.swapaxes(1, 2)
    none = np.zeros((len(weighted), 0))
    return Spectra(
        len(weighted),
        none[0] if sharing == "separate" else np.asarray(_stack_spectrum(weighted)),
        none if sharing == "shared" else np.asarray(separate.spectra(narrow)),
    )


def fixed_bytes(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    plans: Mapping[str, LeafPlan],
    num_tasks: int,
    vector_bits: int,
) -> int:
    """What offsets of a budget take whatever the ranks, of all tasks; a budget must be more.

    Args:
      leaves: leaf name to shape and dtype.
      plans: of every matrix leaf.
      num_tasks: T.
      vector_bits: of an entry of the offsets below two axes.
    """
    vectors = [
        spec.shape
        for name, spec in leaves.items()
        if name not in plans and tree.is_float(spec.dtype)
    ]
    # Embeddings, offsets and shared scalars of vectors, the last byte of codes.
    fixed = 4 * num_tasks**2 + 4 * len(vectors) + 2 * len(plans)
    return fixed + sum(
        coded_bytes(num_tasks * prod(shape), num_tasks, vector_bits if shape else 32)
        for shape in vectors
    )


def allocate(
    plans: Mapping[str, LeafPlan],
    measured: Mapping[str, Spectra],
    budget: float,
    *,
    bits: int = 32,
    sharing: Sharing = "shared",
) -> dict[str, LeafPlan]:
    """Chooses every matrix leaf's rank.

    Args:
      plans: of the matrix leaves; their ranks are not looked at.
      measured: of the same leaves.
      budget: bytes for the factors of all tasks and leaves.
      bits: of an entry of a factor.
      sharing: whether tasks share a factor.

    Returns:
      The plans with ranks: `rank` where a factor is shared, else `task_ranks`. Their bytes are at most the
      budget.

    Raises:
      ValueError: if `bits` is unknown.
    """
    check_bits("bits", bits)
    options = {
        name: [
            choose
            for form, choose in (("shared", _shared), ("separate", _separate))
            if sharing in (form, "auto")
        ]
        for name in plans
    }

    def at_price(price: float) -> dict[str, _Choice]:
        return {
            name: max(
                (
                    choose(plans[name].solved_shape, measured[name], bits, price)
                    for choose in options[name]
                ),
                key=lambda choice: choice.gain - price * choice.bytes,
            )
            for name in plans
        }

    top = max(
        (
            float(spectrum.max())
            for leaf in measured.values()
            for spectrum in (leaf.shared, leaf.separate)
            if spectrum.size
        ),
        default=0.0,
    )
    low, high = top * 1e-18, top
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if sum(choice.bytes for choice in at_price(middle).values()) > budget:
            low = middle
        else:
            high = middle
    return {
        name: replace(plans[name], rank=choice.ranks, task_ranks=None)
        if isinstance(choice.ranks, int)
        else replace(
            plans[name], rank=max(choice.ranks), task_ranks=choice.ranks, orientation="right"
        )
        for name, choice in at_price(high).items()
    }


def _shared(shape: tuple[int, int], leaf: Spectra, bits: int, price: float) -> _Choice:
    task_side, shared_side = shape
    cost = leaf.num_tasks * _vector_bytes(task_side, bits) + _vector_bytes(shared_side, bits)
    gains = leaf.shared[: min(shape)]
    rank = int(np.sum(gains > price * cost))
    return _Choice(float(gains[:rank].sum()), rank * cost, rank)


def _separate(shape: tuple[int, int], leaf: Spectra, bits: int, price: float) -> _Choice:
    cost = _vector_bytes(shape[0], bits) + _vector_bytes(shape[1], bits)
    gains = leaf.separate
    worth = gains > price * cost
    return _Choice(
        float(gains[worth].sum()), float(worth.sum() * cost), tuple(map(int, worth.sum(axis=1)))
    )


def _vector_bytes(length: int, bits: int) -> float:
    return 4 * length if bits == 32 else length * bits / 8 + SCALE_BYTES
