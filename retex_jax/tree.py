"""Parameter trees: leaf names, first-match rules, matrix views and shape groups.

A leaf is named by its path, joined with "/": `blocks_0/mlp/fc1/kernel`. The papers see a leaf as a
matrix (a, b) = (output, input), which is PyTorch's order; a Flax kernel is (input, output). Which axes
are which is declared here by first-match rules, one table a layout, never guessed from sizes.
"""

import difflib
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.typing import Array, FlatParams, Layout, Params

_Value = TypeVar("_Value")
_Key = TypeVar("_Key", bound=Hashable)


def flatten(params: Params) -> FlatParams:
    """Names the leaves of a nested dict.

    Args:
      params: nested dict with string keys; anything that is not a mapping is a leaf.

    Returns:
      Leaf name to leaf, sorted by name.

    Raises:
      ValueError: if a key is not a string, is empty or contains "/", or if an inner dict is empty.
    """
    flat: FlatParams = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            flat["/".join(path)] = node
            return
        if not node and path:
            raise ValueError(f"params: {'/'.join(path)!r} is an empty dict, expected leaves")
        for key, child in node.items():
            if not isinstance(key, str) or not key or "/" in key:
                raise ValueError(
                    f"params: key {key!r} under {'/'.join(path)!r}, "
                    "expected a non-empty string without '/'"
                )
            visit(child, (*path, key))

    if not isinstance(params, Mapping):
        raise ValueError(f"params: got a {type(params).__name__}, expected a nested dict of arrays")
    visit(params, ())
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuilds the nested dict that `flatten` took apart.

    Raises:
      ValueError: if one name is a prefix of another ("a" and "a/b").
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"flat: {name!r} lies below a leaf")
        if last in node:
            raise ValueError(f"flat: {name!r} is both a leaf and a folder of leaves")
        node[last] = leaf
    return tree


def first_match(rules: Sequence[tuple[str, _Value]], name: str) -> _Value:
    """Returns the value of the first rule whose regular expression is found in `name`.

    Raises:
      ValueError: if no rule matches.
    """
    for pattern, value in rules:
        if re.search(pattern, name):
            return value
    raise ValueError(
        f"no rule matches leaf {name!r}; rules tried in order: {[pattern for pattern, _ in rules]}"
    )


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the regular expressions is found in `name`."""
    return any(re.search(pattern, name) for pattern in patterns)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error: the known name nearest to `name`, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def as_integer(name: str, value: Any) -> int:
    """A Python, NumPy or JAX integer as a Python integer; raises ValueError, with its name, for all else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, expected an integer") from None


def param_bytes(params: Any) -> int:
    """Bytes of all array leaves of a pytree (arrays or `ShapeDtypeStruct`s)."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params)
    )


def is_float(dtype: Any) -> bool:
    """Whether leaves of this dtype are merged (integer and bool buffers are copied)."""
    return jnp.issubdtype(dtype, jnp.floating)


class MatrixView(NamedTuple):
    """The axes of a leaf that are outputs (rows, a) and inputs (columns, b), in matrix order."""

    output_axes: tuple[int, ...]
    input_axes: tuple[int, ...]


# (name pattern, number of axes, view). A Flax convolution kernel is (k_h, k_w, c_in, c_out) and its
# matrix is (c_out, c_in * k_h * k_w), as the paper reshapes PyTorch's (c_out, c_in, k_h, k_w).
# An embedding table is (entries, features) in both layouts.
_VIEWS: dict[Layout, tuple[tuple[str, int, MatrixView], ...]] = {
    "flax": (
        (r"(^|/)embedding$", 2, MatrixView((0,), (1,))),
        (r"(^|/)(query|key|value)/kernel$", 3, MatrixView((1, 2), (0,))),
        (r"(^|/)out/kernel$", 3, MatrixView((2,), (0, 1))),
        (r"", 2, MatrixView((1,), (0,))),
        (r"", 3, MatrixView((2,), (1, 0))),
        (r"", 4, MatrixView((3,), (2, 0, 1))),
    ),
    "torch": (
        (r"", 2, MatrixView((0,), (1,))),
        (r"", 3, MatrixView((0,), (1, 2))),
        (r"", 4, MatrixView((0,), (1, 2, 3))),
    ),
}


def matrix_view(name: str, shape: Sequence[int], layout: Layout = "flax") -> MatrixView | None:
    """Declares how a leaf is seen as a matrix (a, b) = (output, input).

    Args:
      name: the leaf's name.
      shape: the leaf's shape.
      layout: "flax" or "torch".

    Returns:
      The view, or None for a 0-D or 1-D leaf, which has none.

    Raises:
      ValueError: if the layout is unknown or the leaf has more than four axes.
    """
    if layout not in _VIEWS:
        raise ValueError(f"layout: got {layout!r}, expected one of {sorted(_VIEWS)}")
    if len(shape) < 2:
        return None
    for pattern, ndim, view in _VIEWS[layout]:
        if ndim == len(shape) and re.search(pattern, name):
            return view
    raise ValueError(f"{name}: no matrix view is declared for {len(shape)} axes (shape {shape})")


def matrix_shape(shape: Sequence[int], view: MatrixView) -> tuple[int, int]:
    """(a, b) of a leaf of this shape."""
    rows = int(np.prod([shape[axis] for axis in view.output_axes]))
    columns = int(np.prod([shape[axis] for axis in view.input_axes]))
    return rows, columns


def to_matrix(leaf: Array, view: MatrixView) -> Array:
    """Sees a leaf (with any leading batch axes) as matrices.

    Args:
      leaf: [*batch, *shape], where the view's axes count from the first axis of `shape`.
      view: of `shape`.

    Returns:
      [*batch, a, b], dtype unchanged.
    """
    ndim = len(view.output_axes) + len(view.input_axes)
    batch = leaf.ndim - ndim
    order = [*range(batch), *(batch + axis for axis in view.output_axes + view.input_axes)]
    rows, columns = matrix_shape(leaf.shape[batch:], view)
    return leaf.transpose(order).reshape(*leaf.shape[:batch], rows, columns)


def from_matrix(matrix: Array, view: MatrixView, shape: Sequence[int]) -> Array:
    """Undoes `to_matrix`: [*batch, a, b] to [*batch, *shape]."""
    batch = matrix.ndim - 2
    permuted = [shape[axis] for axis in view.output_axes + view.input_axes]
    inverse = np.argsort(view.output_axes + view.input_axes)
    order = [*range(batch), *(batch + int(axis) for axis in inverse)]
    return matrix.reshape(*matrix.shape[:batch], *permuted).transpose(order)


def groups(keys: Mapping[str, _Key], max_size: Callable[[_Key], int]) -> list[list[str]]:
    """Groups leaves that can be stacked and run under one vmap.

    Args:
      keys: by leaf, what the leaves of one group have in common (shape, dtype, rank, ...).
      max_size: the most leaves in one group of this key, >= 1.

    Returns:
      Lists of names; the order of first appearance is kept.
    """
    members: dict[_Key, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    return [
        names[start : start + max_size(key)]
        for key, names in members.items()
        for start in range(0, len(names), max_size(key))
    ]
