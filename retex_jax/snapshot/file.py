"""One safetensors content, trusted in nothing: its header is checked whole, its data read later.

The format: eight bytes with the header's length (little endian), the header (JSON: name -> dtype,
shape and byte range), and the data, which the ranges must cover without overlap or gap.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""NumPy's dtypes by their names in a safetensors header."""

_MAX_HEADER = 100_000_000  # bytes; what other readers of the format accept as well
_MAX_AXES = 32
_MAX_DEPTH = 64  # levels of JSON, so that nothing that walks them recurses too deeply
_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 20  # problems a message lists


class SafetensorsFile:
    """A safetensors content whose header is sound; tensors are views into it.

    Attributes:
      specs: name -> `jax.ShapeDtypeStruct`, in the order of the data.
      metadata: texts of the header.
    """

    specs: dict[str, jax.ShapeDtypeStruct]
    metadata: dict[str, str]

    def __init__(self, source: bytes | bytearray | memoryview | str | os.PathLike[str]):
        """Maps a file into memory, or takes its content, and checks the header.

        Args:
          source: the content, or the path of a file.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is not a regular file or not a whole safetensors content; all problems
            of the header are listed.
        """
        if isinstance(source, bytes | bytearray | memoryview):
            where, self._data = "safetensors data", np.frombuffer(source, np.uint8)
        else:
            path = Path(source)
            where, self._data = str(path), _map(path)
        try:
            self._entries, self._start, self.metadata = _parse(self._data)
        except ValueError as error:
            raise ValueError(f"{where}: not a whole safetensors file: {error}") from None
        self.specs = {
            name: jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            for name, entry in self._entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a read-only view; its bytes are read from the disk when they are used."""
        entry = self._entries[name]
        data = self._data[self._start + entry.start : self._start + entry.stop]
        array = data.view(entry.dtype).reshape(entry.shape)
        array.flags.writeable = False
        return array


class Entry(NamedTuple):
    """What a header says of one tensor; the range is in bytes from the start of the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _map(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if not path.stat().st_size:
        return np.zeros(0, np.uint8)  # which cannot be mapped
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def parse_json(text: bytes | str) -> Any:
    """Parses JSON that comes from outside.

    Args:
      text: the JSON.

    Returns:
      The value.

    Raises:
      ValueError: if it is not JSON, is nested too deeply, or an object has one key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, child in pairs:
            if key in value:
                raise ValueError(f"key {key!r} is there twice")
            value[key] = child
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if isinstance(value, dict | list):
        _check_depth(value)
    return value


def _check_depth(value: dict[str, Any] | list[Any]) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        nodes = [node.values() if isinstance(node, dict) else node for node in level]
        level = [child for node in nodes for child in node if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError("JSON nested too deeply")


def _parse(data: np.ndarray) -> tuple[dict[str, Entry], int, dict[str, str]]:
    size = data.size
    if size < 8:
        raise ValueError(f"{size} bytes, expected at least 8")
    if data[: len(_LFS_POINTER)].tobytes() == _LFS_POINTER:
        raise ValueError(
            "it is a Git LFS pointer: the file itself was not downloaded (git lfs pull)"
        )
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > _MAX_HEADER or 8 + length > size:
        raise ValueError(
            f"its header claims {length} bytes, expected at most {min(_MAX_HEADER, size - 8)}"
        )
    try:
        header = parse_json(data[8 : 8 + length].tobytes())
    except ValueError as error:
        raise ValueError(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its __metadata__ is not a JSON object of texts")
    entries, problems = {}, []
    for name, fields in header.items():
        try:
            entries[name] = parse_entry(fields)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    problems = problems or _range_problems(entries, size - 8 - length)
    if problems:
        shown = problems[:_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError("\n  ".join([f"{len(problems)} problem(s)", *shown]))
    order = sorted(entries, key=lambda name: entries[name].start)
    return {name: entries[name] for name in order}, 8 + length, metadata


def parse_entry(fields: Any) -> Entry:
    """Checks what a header says of one tensor.

    Args:
      fields: parsed from JSON; expected to be an object with dtype, shape and data_offsets.

    Returns:
      The same, in types that can be relied on; the range has the size of the tensor.

    Raises:
      ValueError: if it is anything else.
    """
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected an object with dtype, shape and data_offsets")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"dtype {fields['dtype']!r}, expected one of {', '.join(DTYPES)}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"shape {_short(shape)}, expected at most {_MAX_AXES} whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {_short(offsets)}, expected two whole numbers")
    # Whole numbers of Python do not overflow. An axis of size 0 must not hide absurd ones.
    if math.prod(max(side, 1) for side in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"shape {_short(shape)} is larger than any memory")
    needed, held = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != held:
        raise ValueError(
            f"{dtype} of shape {shape} takes {needed} bytes, but data_offsets {offsets} hold {held}"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _range_problems(entries: dict[str, Entry], size: int) -> list[str]:
    problems, end, previous = [], 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            problems.append(f"{name}: ends at byte {entry.stop} of {size} bytes of data")
        elif entry.start < end:
            problems.append(f"{name}: overlaps {previous}")
        elif entry.start > end:
            problems.append(f"{name}: {entry.start - end} bytes before it belong to no tensor")
        if entry.stop > end:
            end, previous = entry.stop, name
    if not problems and end < size:
        problems.append(f"the last {size - end} bytes belong to no tensor")
    return problems
