"""Offsets as chains of factors that act on the inputs of a layer, those of all tasks side by side.

With a leaf seen as [in, out], the offset of a task is a sum of terms, and a term a chain of factors: x is
multiplied by the first, the result by the second, and so on (METHODS, "G_t (S x)"). A factor is a matrix
[in, out] that all tasks share, a matrix a task [T, in, out], or a number a task [T]. What is stored in few
bits is made dense here, once. All sums are float32, as those of `offsets.recover`.
"""

from collections.abc import Iterator
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.offsets import OffsetState
from retex_jax.offsets.coding import Stored, dense
from retex_jax.offsets.forms import (
    Affine,
    Extended,
    Factorized,
    Orientation,
    OwnForm,
    Product,
    Separate,
)

Term = tuple[jax.Array, ...]
"""The factors of a chain, in the order in which they are applied."""


def leaf_terms(state: OffsetState, name: str, shape: tuple[int, ...]) -> tuple[Term, ...] | None:
    """The offsets of all tasks of one leaf as terms.

    Args:
      state: from `offsets.fit`.
      name: of a leaf that has an offset.
      shape: of the leaf.

    Returns:
      The terms, for the leaf seen as [in, out] (a convolution's input is (k_h, k_w, c_in), the leaf's own
      order; a table's input is its rows). None where the leaf is no such matrix: below two axes, or with
      outputs that are neither its first nor its last axis.
    """
    view = tree.matrix_view(name, shape, state.layout)
    if view is None:
        return None
    is_kernel = view.output_axes == (len(shape) - 1,)
    if not is_kernel and (len(shape) != 2 or view.output_axes != (0,)):
        return None

    def outward(right: jax.Array) -> jax.Array:
        """[*tasks, r, b] to [*tasks, b, r], the columns in the order of the leaf's own axes."""
        inner = (*shape[:-1], right.shape[-2])
        leaves = jnp.asarray(tree.from_matrix(right, view, inner))
        return leaves.reshape(*right.shape[:-2], prod(inner[:-1]), inner[-1])

    form = state.form(name)
    terms: list[Term] = [
        (outward(right), jnp.swapaxes(left, -2, -1)) if is_kernel else (left, right)
        for left, right in _products(form, state.task_embeddings)
    ]
    for direction, scales in _directions(form, state.task_embeddings):
        terms.append((outward(direction) if is_kernel else direction, scales))
    return tuple(terms)


def _products(form: OwnForm, embeddings: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The low-rank parts of a matrix's offsets: left [*T, a, r] and right [*T, r, b].

    Products that share one factor are one part, and so are the low-rank products that are the tasks' own.
    """
    shared: dict[int, tuple[Stored, Orientation, jax.Array]] = {}
    own: list[tuple[Separate, jax.Array]] = []
    for part, weights in _flat(form, embeddings.T):
        if isinstance(part, Separate):
            own.append((part, weights))
            continue
        assert isinstance(part, Product | Factorized | Affine)
        factors = _task_factors(part, weights)
        if id(part.shared) in shared:
            factors = factors + shared[id(part.shared)][2]
        shared[id(part.shared)] = (part.shared, part.orientation, factors)
    for stored, orientation, factors in shared.values():
        common = jnp.asarray(dense(stored), jnp.float32)
        if orientation == "right":
            yield factors, common
        else:
            yield common.T, jnp.swapaxes(factors, 1, 2)
    if own:
        yield _own_products(own, embeddings.shape[0])


def _directions(form: OwnForm, embeddings: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The affine parts: a direction [a, b] and its scale a task [T]."""
    for part, weights in _flat(form, embeddings.T):
        if isinstance(part, Affine):
            scales = jnp.matmul(weights.T, part.scales, precision="highest")
            yield jnp.asarray(part.direction, jnp.float32), scales


def _flat(form: OwnForm, weights: jax.Array) -> Iterator[tuple[OwnForm, jax.Array]]:
    """The forms whose offsets are added, each with the weights [K, T] of its own embeddings."""
    if not isinstance(form, Extended):
        yield form, weights
        return
    for part, some in form.parts(weights):
        yield from _flat(part, some)


def _task_factors(form: Product | Factorized | Affine, weights: jax.Array) -> jax.Array:
    """What multiplies the shared factor: [T, a, r], or [T, b, r] where that stands on the left."""
    if isinstance(form, Factorized):
        equation, stored = "kt,kac,kcr->tar", (form.left, form.right)
    else:
        equation, stored = "kt,kar->tar", (form.generator,)
    return jnp.einsum(equation, weights, *(dense(factor) for factor in stored), precision="highest")


def _own_products(
    own: list[tuple[Separate, jax.Array]], num_tasks: int
) -> tuple[jax.Array, jax.Array]:
    """[T, a, R] and [T, R, b], with zeros past a task's own rank."""
    lefts, rights = [], []
    for task in range(num_tasks):
        left, right = [], []
        for form, weights in own:
            scales = np.repeat(np.asarray(weights)[:, task], form.ranks)
            used = np.flatnonzero(scales)
            left.append(np.asarray(dense(form.left))[used] * scales[used, None])
            right.append(np.asarray(dense(form.right))[used])
        lefts.append(np.concatenate(left))
        rights.append(np.concatenate(right))
    rank = max(1, *(len(left) for left in lefts))

    def padded(factors: list[np.ndarray]) -> jax.Array:
        return jnp.asarray(np.stack([np.pad(x, ((0, rank - len(x)), (0, 0))) for x in factors]))

    return jnp.swapaxes(padded(lefts), 1, 2), padded(rights)
