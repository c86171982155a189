"""The forms of a leaf's offset: each generates it linearly from a task's embedding (ReTeX, Eq. 3).

Factors are arrays or, in few bits, `Coded`. With one-hot embeddings (K = T) a generator is the stack of the
tasks' own factors.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeGuard

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
        factor, shared = _mix(embedding, self.generator), jnp.asarray(dense(self.shared))
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
        left = jnp.asarray(dense(self.left)) * weights[:, None]
        return left.T, jnp.asarray(dense(self.right))

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[T] to [a, b], float32."""
        return jnp.matmul(*self.factors(embedding), precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factorized:
    """Of a matrix (a, b): ReTeX-E (5.5), whose task factor is itself a product, G_t = A_t B_t.

    The offset is sum_k e_k A_k B_k S. With one-hot embeddings, the only ones that are stored, entry k of an
    embedding is the weight of task k, and a mixture of embeddings is the mixture of the tasks' offsets. It is
    not the product of mixed factors (sum_k e_k A_k)(sum_k e_k B_k) S, which the paper's generator, linear in
    e for A and for B, would make of a mixed embedding.

    Attributes:
      left: A, [K, a, r_g], float32; [K, b, r_g] where the shared factor stands on the left.
      right: B, [K, r_g, r], float32.
      shared: S, [r, b], float32; [r, a] where it stands on the left: the product is then transposed.
      orientation: where the shared factor stands.
    """

    left: Stored
    right: Stored
    shared: Stored
    orientation: Orientation = field(default="right", metadata={"static": True})

    def factors(self, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[K] to [a, r] and [r, b], whose product is the offset."""
        weighted = dense(self.left) * embedding[:, None, None]
        factor = jnp.einsum("kac,kcr->ar", weighted, dense(self.right), precision="highest")
        shared = jnp.asarray(dense(self.shared))
        return (factor, shared) if self.orientation == "right" else (shared.T, factor.T)

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[K] to [a, b], float32."""
        return jnp.matmul(*self.factors(embedding), precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """Of a matrix (a, b): theta_0 + gamma_t (theta_merge - theta_0) + G_t S (A.2, Eq. 13).

    Beside theta_merge that is the offset (gamma_t - 1) (theta_merge - theta_0) + G_t S, which is linear in
    the embedding as gamma_t is. It has no factors: (theta_merge - theta_0) is of any rank.

    Attributes:
      generator: W, [K, a, r], float32; [K, b, r] where the shared factor stands on the left.
      shared: S, [r, b], float32; [r, a] where it stands on the left.
      scales: gamma - 1, [K], float32.
      direction: theta_merge - theta_0, [a, b], of the model's dtype: the bytes of theta_0, which has to be
        stored.
      orientation: where the shared factor stands.
    """

    generator: Stored
    shared: Stored
    scales: jax.Array
    direction: jax.Array
    orientation: Orientation = field(default="right", metadata={"static": True})

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[K] to [a, b], float32."""
        scale = jnp.matmul(embedding, self.scales, precision="highest")
        shift = Product(self.generator, self.shared, self.orientation).offset(embedding)
        return scale * jnp.asarray(self.direction, jnp.float32) + shift


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tied:
    """Of a leaf whose offset is that of another leaf of its shape, which stores it (ReTeX-S, C.6).

    Attributes:
      owner: name of that leaf.
    """

    owner: str = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Extended:
    """Of any leaf: the offset of T tasks, and that of a task that was added later.

    Attributes:
      base: of the T tasks; None where they have none.
      projection: the added task's factor for the base's shared factor, [1, a, r] as `Product` has it, or None.
      own: what the projection leaves of the added task's offset, a form of one task, or None.
    """

    base: "OwnForm | None"
    projection: Stored | None
    own: "OwnForm | None"

    def parts(self, embedding: jax.Array) -> list[tuple["OwnForm", jax.Array]]:
        """[T + 1] to the forms whose offsets are added, each with its embedding."""
        earlier, later = embedding[:-1], embedding[-1:]
        parts: list[tuple[OwnForm, jax.Array]] = []
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
        pairs = []
        for form, part in self.parts(embedding):
            assert has_factors(form)
            pairs.append(form.factors(part))
        left, right = zip(*pairs, strict=True)
        return jnp.concatenate(left, axis=1), jnp.concatenate(right, axis=0)

    def offset(self, embedding: jax.Array) -> jax.Array:
        """[T + 1] to [a, b] or [*shape], float32."""
        first, *others = [form.offset(part) for form, part in self.parts(embedding)]
        return sum(others, first)


OwnForm = Elementwise | Product | Separate | Factorized | Affine | Extended
"""How one leaf's offset is stored."""

Form = OwnForm | Tied
"""What a leaf may hold: an offset of its own, or another leaf's."""


def has_factors(form: OwnForm) -> TypeGuard[Product | Separate | Factorized | Extended]:
    """Whether the offset is a product of two factors, which `form.factors` gives."""
    if isinstance(form, Extended):
        return all(has_factors(part) for part in (form.base, form.own) if part is not None)
    return isinstance(form, Product | Separate | Factorized)


def _mix(embedding: jax.Array, generator: Stored) -> jax.Array:
    return jnp.tensordot(embedding, dense(generator), axes=1, precision="highest")
