"""Where the leaves of one model come from: a tree in memory, or safetensors files on disk.

A `Source` tells names, shapes and dtypes without reading any data, and reads one leaf at a time.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from retex_jax import tree
from retex_jax.typing import Array, Params

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": jnp.float64,
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Source(Protocol):
    """Where the leaves of one model come from."""

    @property
    def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Leaf name to shape and dtype, without reading any data."""
        ...

    def read(self, name: str) -> Array:
        """One leaf."""
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


class SafetensorsSource:
    """A safetensors checkpoint, read through memory maps; names "a.b" become "a/b".

    Attributes:
      path: the file or folder.
      leaves: leaf name to shape and dtype.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the headers only.

        Args:
          path: a file, or a folder with model.safetensors or with model.safetensors.index.json and
            the shards that it names.

        Raises:
          ValueError: if a file is missing, truncated or malformed, or holds a dtype that no expert
            can have, or two names that differ only in "." and "/"; or if an index names shards
            outside its folder, or shards or tensors that are not there (all are listed).
        """
        self.path = Path(path)
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {}
        self._keys: dict[str, tuple[Any, str]] = {}
        if not self.path.is_dir():
            self._add_file(self.path)
        elif (self.path / SINGLE_FILE).is_file():
            self._add_file(self.path / SINGLE_FILE)
        elif (self.path / INDEX_FILE).is_file():
            self._add_shards(self.path / INDEX_FILE)
        else:
            raise ValueError(
                f"{self.path}: not a whole, readable safetensors file, nor a folder with "
                f"{SINGLE_FILE} or {INDEX_FILE}"
            )
        self.leaves = dict(sorted(self.leaves.items()))

    @property
    def name(self) -> str:
        """The file's stem, or the folder's name."""
        return self.path.resolve().name if self.path.is_dir() else self.path.stem

    def read(self, name: str) -> np.ndarray:
        """One leaf, copied out of the memory map."""
        file, key = self._keys[name]
        return file.get_tensor(key)

    def _add_file(self, path: Path) -> set[str]:
        """Adds the tensors of one file, and returns their keys."""
        try:
            file = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole, readable safetensors file: {error}") from error
        for key in sorted(file.keys()):
            name = key.replace(".", "/")
            header = file.get_slice(key)
            if header.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: {key} has dtype {header.get_dtype()}, "
                    f"expected one of {sorted(_DTYPES)}"
                )
            if name in self._keys:
                raise ValueError(f"{path}: {key} and {self._keys[name][1]} name the same leaf")
            self._keys[name] = file, key
            self.leaves[name] = jax.ShapeDtypeStruct(
                tuple(header.get_shape()), _DTYPES[header.get_dtype()]
            )
        return set(file.keys())

    def _add_shards(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: expected JSON with a weight_map: {error!r}") from error
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a weight_map from tensors to files")
        wrong = [key for key, shard in weight_map.items() if not isinstance(shard, str)]
        if wrong:
            raise ValueError(f"{index}: the files of {wrong} are not names")
        problems = []
        for shard in sorted(set(weight_map.values())):
            listed = {key for key, value in weight_map.items() if value == shard}
            path = index.parent / shard
            if not _stays_inside(shard):
                problems.append(f"shard {shard!r} is not a name inside the folder")
            elif not path.is_file():
                problems.append(f"shard {shard!r} is missing, with {len(listed)} tensors")
            else:
                try:
                    found = self._add_file(path)
                except ValueError as error:
                    problems.append(str(error))
                    continue
                problems += [f"{key} is missing from {shard}" for key in sorted(listed - found)]
                problems += [f"{key} of {shard} is not listed" for key in sorted(found - listed)]
        if problems:
            raise ValueError(f"{index} does not fit its shards:\n  " + "\n  ".join(problems))


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


def _stays_inside(shard: str) -> bool:
    """Whether a file name of an index stays in the folder (a link of a download cache may not)."""
    path = PurePosixPath(shard)
    return bool(shard) and "\\" not in shard and not path.is_absolute() and ".." not in path.parts
