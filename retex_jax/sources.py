"""Where the leaves of one model come from: a tree in memory, or safetensors files on disk.

A `Source` tells names, shapes and dtypes without reading any data, and reads one leaf at a time. One whose
leaves lie in host memory or in mapped files can also be a `MappedSource`, of which a part of a leaf can be read.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.snapshot import Snapshot
from retex_jax.typing import Array, Params


class Source(Protocol):
    """Where the leaves of one model come from."""

    @property
    def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Leaf name to shape and dtype, without reading any data."""
        ...

    def read(self, name: str) -> Array:
        """One leaf."""
        ...


class MappedSource(Source, Protocol):
    """A source whose leaves, or some of them, can be read in parts."""

    def mapped(self, name: str) -> np.ndarray | None:
        """One leaf, flattened, without a copy: [size]; None where it is not in host memory."""
        ...


class TreeSource:
    """A nested dict of arrays in memory."""

    def __init__(self, params: Params):
        """Takes the tree as it is; no leaf is copied.

        Raises:
          ValueError: as `tree.flatten`, and for a leaf that is not an array or a number.
        """
        self._flat = tree.flatten(params)
        for name, leaf in self._flat.items():
            if type(leaf) in (bool, int, float):
                dtype = {bool: np.bool_, int: np.int32, float: np.float32}[type(leaf)]
                self._flat[name] = np.asarray(leaf, dtype)
            elif not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                raise ValueError(f"{name}: got a {type(leaf).__name__}, expected an array")
            elif not (leaf.dtype == np.bool_ or _is_real(leaf.dtype)):
                raise ValueError(f"{name}: got dtype {leaf.dtype}, expected real numbers")
        self.leaves = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self._flat.items()
        }

    def read(self, name: str) -> Array:
        """One leaf, as it was given."""
        return self._flat[name]

    def mapped(self, name: str) -> np.ndarray | None:
        """One leaf that is a contiguous NumPy array, flattened: [size]; None for others."""
        leaf = self._flat[name]
        if isinstance(leaf, np.ndarray) and leaf.flags.c_contiguous:
            return leaf.reshape(-1)
        return None


class SafetensorsSource:
    """A safetensors checkpoint, read through memory maps; names "a.b" become "a/b".

    Attributes:
      path: the file or folder.
      leaves: leaf name to shape and dtype, sorted by name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the headers only.

        Args:
          path: a file, or a folder with model.safetensors or with model.safetensors.index.json and
            the shards that it names.

        Raises:
          ValueError: if a file is missing, or for what `Snapshot` refuses; if two names differ only
            in "." and "/".
        """
        self.path = Path(path)
        try:
            self._snapshot = Snapshot(self.path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        self._keys: dict[str, str] = {}
        for key in self._snapshot.specs:
            name = key.replace(".", "/")
            if name in self._keys:
                raise ValueError(f"{self.path}: {key} and {self._keys[name]} name the same leaf")
            self._keys[name] = key
        self.leaves = {name: self._snapshot.specs[self._keys[name]] for name in sorted(self._keys)}

    @property
    def name(self) -> str:
        """The file's stem, or the folder's name."""
        return self.path.resolve().name if self.path.is_dir() else self.path.stem

    def read(self, name: str) -> np.ndarray:
        """One leaf, copied out of the memory map."""
        return np.array(self._snapshot.read(self._keys[name]))

    def mapped(self, name: str) -> np.ndarray:
        """One leaf, flattened, in the memory map: [size], read-only."""
        return self._snapshot.read(self._keys[name]).reshape(-1)


def read_safetensors(path: str | os.PathLike[str], include: str = "") -> Params:
    """Reads the leaves whose name contains the regular expression `include`, as a nested dict.

    Raises:
      ValueError: as `SafetensorsSource`.
    """
    source = SafetensorsSource(path)
    return tree.unflatten(
        {name: source.read(name) for name in source.leaves if tree.matches_any([include], name)}
    )


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or tree.is_float(dtype)


def mapped(source: Source, name: str) -> np.ndarray | None:
    """One leaf, flattened, without a copy: [size]; None where the source cannot be read in parts."""
    # Checking for a protocol with `isinstance` would take longer than reading a small leaf.
    read = getattr(source, "mapped", None)
    return read(name) if read else None


def read_part(source: Source, name: str, part: slice | None) -> Array:
    """A part of a flattened leaf, [n]; for part None the leaf, [*shape].

    Raises:
      ValueError: if there is a part, but the leaf cannot be read in parts.
    """
    if part is None:
        return source.read(name)
    flat = mapped(source, name)
    if flat is None:
        raise ValueError(f"{name}: can't be read in parts")
    return flat[part]
