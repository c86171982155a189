"""Where the leaves of a tree lie on a mesh of devices, by first-match rules.

A rule is a regular expression of leaf names and mesh axes for a leaf's own axes. Axes that the mesh lacks are left out,
and so is one whose size does not divide the leaf's: that axis is then whole on every device. An axis of the mesh that
no rule names holds copies.
"""

from collections.abc import Collection, Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retex_jax import tree

DATA, LAYER, MODEL, TASK = "data", "layer", "model", "task"

Rules = Sequence[tuple[str, P | str | tuple[str, ...]]]
"""(pattern, axes): a `PartitionSpec`, of which leaves of fewer axes take the first ones; or mesh axes alone, which
split a leaf's longest axis of those that they divide."""

MODEL_RULES: Rules = (("", MODEL),)
"""Of a model's parameters, or of anything that has their shapes."""

BATCH_RULES: Rules = (("", P(DATA)),)
"""Of the arrays of a batch."""


def check_axes(mesh: Mesh, known: Collection[str]) -> None:
    """Makes sure that a mesh has only axes that something is split over.

    Raises:
      ValueError: if it has others.
    """
    if set(mesh.shape) - set(known):
        raise ValueError(f"mesh: got axes {dict(mesh.shape)}, expected some of {sorted(known)}")


def shardings(leaves: Any, mesh: Mesh, rules: Rules) -> Any:
    """Where each leaf of a pytree lies.

    Args:
      leaves: arrays or `ShapeDtypeStruct`s; a leaf's name is its path, joined with "/".
      mesh: of Auto axes.
      rules: in the order that they are tried in.

    Returns:
      The same pytree of `NamedSharding`s.

    Raises:
      ValueError: if no rule matches a leaf.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(tree.first_match(rules, name), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, leaves)


def place(leaves: Any, mesh: Mesh | None, rules: Rules) -> Any:
    """Puts the leaves of a pytree where they lie; without a mesh they stay."""
    return leaves if mesh is None else jax.device_put(leaves, shardings(leaves, mesh, rules))


def constrain(leaves: Any, mesh: Mesh | None, rules: Rules) -> Any:
    """As `place`, under `jax.jit`."""
    if mesh is None:
        return leaves
    return jax.lax.with_sharding_constraint(leaves, shardings(leaves, mesh, rules))


def mesh_of(leaves: Any) -> Mesh | None:
    """The mesh that a pytree's arrays lie on; None where they lie on none."""
    for leaf in jax.tree.leaves(leaves):
        if isinstance(found := getattr(leaf, "sharding", None), NamedSharding):
            return found.mesh if isinstance(found.mesh, Mesh) else None
    return None


def device_bytes(leaves: Any) -> int:
    """Bytes that a device holds of a pytree of arrays, or of `ShapeDtypeStruct`s; whole ones where they lie nowhere."""
    total = 0
    for leaf in jax.tree.leaves(leaves):
        there = getattr(leaf, "sharding", None)
        shape = leaf.shape if there is None else there.shard_shape(leaf.shape)
        total += prod(shape) * leaf.dtype.itemsize
    return total


def _spec(rule: P | str | tuple[str, ...], shape: Sequence[int], mesh: Mesh) -> P:
    sizes = dict(mesh.shape)
    if not isinstance(rule, P):
        axes = tuple(axis for axis in _names(rule) if axis in sizes)
        divided = [size for size in shape if size % prod(sizes[axis] for axis in axes) == 0]
        place = shape.index(max(divided)) if axes and divided else len(shape)
        return P(*[axes if each == place else None for each in range(len(shape))])
    found: list[tuple[str, ...] | None] = []
    for size, names in zip(shape, rule, strict=False):
        axes = tuple(axis for axis in _names(names) if axis in sizes)
        found.append(axes if axes and size % prod(sizes[axis] for axis in axes) == 0 else None)
    return P(*found)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
