"""The forms of a leaf's offset: each generates it linearly from a task's embedding (ReTeX, Eq. 3).

Factors are arrays or, in few bits, `Coded`. With one-hot embeddings (K = T) a generator is the stack of the
tasks' own factors.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.offsets.coding import Stored, dense

Orientation = Literal["right", "left"]
"""Where the shared factor stands: G_t S (ReTeX), or S^T G_t^T (ReTeX-Alt)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Elementwise:
    """Of a leaf below two axes: a vector times a shared scalar.

    Attributes:
      generator: W, [K, *shape], float32.
      shared: the scalar, [], float32.
    """

    generator: Stored
    shared: jax.Array

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[K] to [*shape], float32."""
        return _mix(embedding, self.generator) * self.shared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """Of a matrix (a, b): task factor times shared factor.

    Attributes:
      generator: W, [K, a, r], float32; [K, b, r] where the shared factor stands on the left.
      shared: S, [r, b], float32; [r, a] where it stands on the left: the product is then transposed.
      orientation: where the shared factor stands.
    """

    generator: Stored
    shared: Stored
    orientation: Orientation = field(default="right", metadata={"static": True})

    def factors(self, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[K] to [a, r] and [r, b], whose product is the offset."""
        factor, shared = _mix(embedding, self.generator), dense(self.shared)
        return (factor, shared) if self.orientation == "right" else (shared.T, factor.T)

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[K] to [a, b], float32."""
        return jnp.matmul(*self.factors(embedding), precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Separate:
    """Of a matrix (a, b): low-rank products of which none is shared, R in all.

    Attributes:
      left: [R, a], float32, the first task's first.
      right: [R, b], float32.
      ranks: how many of the products are each task's, T numbers.
    """

    left: Stored
    right: Stored
    ranks: tuple[int, ...] = field(metadata={"static": True})

    def factors(self, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[T] to [a, R] and [R, b], whose product is the offset."""
        weights = jnp.repeat(embedding, np.array(self.ranks), total_repeat_length=sum(self.ranks))
        return (dense(self.left) * weights[:, None]).T, jnp.asarray(dense(self.right))

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[T] to [a, b], float32."""
        return jnp.matmul(*self.factors(embedding), precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Extended:
    """Of any leaf: the offset of T tasks, and that of a task that was added later.

    Attributes:
      base: of the T tasks; None where they have none.
      projection: the added task's factor for the base's shared factor, [1, a, r] as `Product` has it, or None.
      own: what the projection leaves of the added task's offset, a form of one task, or None.
    """

    base: "Form | None"
    projection: Stored | None
    own: "Form | None"

    def parts(self, embedding: jax.Array) -> list[tuple["Form", jax.Array]]:
        """[T + 1] to the forms whose offsets are added, each with its embedding."""
        earlier, later = embedding[:-1], embedding[-1:]
        parts: list[tuple[Form, jax.Array]] = []
        if self.base is not None:
            parts.append((self.base, earlier))
        if self.projection is not None:
            root = self.base
            while isinstance(root, Extended):
                root = root.base
            assert isinstance(root, Product)
            parts.append((Product(self.projection, root.shared, root.orientation), later))
        if self.own is not None:
            parts.append((self.own, later))
        return parts

    def factors(self, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[T + 1] to [a, R] and [R, b], whose product is the offset of a matrix."""
        pairs = [form.factors(part) for form, part in self.parts(embedding)]
        left, right = zip(*pairs, strict=True)
        return jnp.concatenate(left, axis=1), jnp.concatenate(right, axis=0)

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[T + 1] to [a, b] or [*shape], float32."""
        first, *others = [form.offset(part) for form, part in self.parts(embedding)]
        return sum(others, first)


Form = Elementwise | Product | Separate | Extended
"""How one leaf's offset is stored."""


def _mix(embedding: jax.Array, generator: Stored) -> jax.Array:
    return jnp.tensordot(embedding, dense(generator), axes=1, precision="highest")
