"""Offsets in a file instead of memory, as they are solved.

At the paper's rank the factors of eight tasks take more than two models. Here each is written as soon as it is
solved, and the state's arrays are mapped from the file: the system reads their pages when they are used, and
may drop them again. The file is safetensors, with the names that a released one has; what is no tensor is in
its header's metadata. It is written beside and renamed.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from retex_jax import files, tree
from retex_jax.offsets import serialization
from retex_jax.offsets.forms import Form
from retex_jax.offsets.state import FitReport, OffsetState
from retex_jax.snapshot import DTYPES, SafetensorsFile
from retex_jax.typing import Array, Params

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes: JAX takes over host memory at multiples of it, without a copy.
_ALIGNMENT = 64
# Of a header, for each leaf: six entries and a report at most, in which its name stands up to ten times.
_HEADER_A_LEAF = 2048


class FactorFile:
    """A safetensors file that grows by one tensor at a time.

    Attributes:
      offsets: leaf name to form; what is set is written, and is mapped from the file when it is got.
    """

    def __init__(self, path: Path, leaves: Mapping[str, object]):
        """Opens it.

        Args:
          path: of the file, which is overwritten.
          leaves: by name; all leaves that will be put, so that the header has its room.
        """
        names = sum(10 * len(json.dumps(name)) + _HEADER_A_LEAF for name in leaves)
        self._path = path
        self._file = path.open("wb")
        self._start = -(-(4096 + names) // _ALIGNMENT) * _ALIGNMENT
        self._entries: dict[str, dict[str, object]] = {}
        self._size = 0
        self._last: dict[str, np.ndarray] = {}
        self._room: dict[int, int] = {}
        self._facts: dict[str, object] = {}
        self.offsets: dict[str, Form] = _Offsets(self)
        self._file.seek(self._start)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Room for a float32 tensor that is filled bit by bit and then put, before anything else is.

        It lies in the file, or in memory where `put` would keep it there.
        """
        size = 4 * prod(shape)
        if size % _ALIGNMENT or not size:
            return np.empty(shape, np.float32)
        start, self._size = self._size, self._size + size
        self._file.seek(self._start + self._size)
        self._file.truncate()
        room = np.memmap(self._path, np.float32, "r+", self._start + start, shape)
        self._room = {id(room): start}
        return room

    def put(self, name: str, array: Array) -> Array:
        """Writes a tensor, and gives the same mapped from the file.

        One whose bytes would put the next out of alignment is written last, and stays in memory.
        """
        values = np.asarray(array)
        if id(array) in self._room:
            start = self._room.pop(id(array))
            self._enter(name, values, start)
            return self._mapped(values, start)
        if values.nbytes % _ALIGNMENT or not values.nbytes:
            self._last[name] = values
            return array
        start = self._write(name, values)
        self._file.flush()
        return self._mapped(values, start)

    def put_form(self, name: str, form: Form) -> Form:
        """Writes a leaf's offset, and gives the same mapped from the file."""
        tensors, facts = serialization.to_tensors({name: form})
        self._facts |= facts
        mapped = {key: self.put(f"offsets/{key}", value) for key, value in tensors.items()}
        return serialization.from_tensors(mapped, facts)[name]

    def put_merged(self, merged: Params) -> Params:
        """Writes the merged model, and gives the same mapped from the file."""
        flat = tree.flatten(merged)
        return tree.unflatten({name: self.put(f"merged/{name}", x) for name, x in flat.items()})

    def finish(self, state: OffsetState) -> None:
        """Writes what is left, and the header."""
        self.put("task_embeddings", state.task_embeddings)
        for name, values in self._last.items():
            self._write(name, values)
        report = state.report
        facts = {
            "layout": state.layout,
            "forms": self._facts,
            "report": {
                "residuals": report.residuals,
                "optima": report.optima,
                "energies": report.energies,
            },
        }
        metadata = {name: json.dumps(value) for name, value in facts.items()}
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        length = self._start - 8
        assert len(header) <= length
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length))
        self.close()

    def close(self) -> None:
        """Closes the file; what was mapped from it stays."""
        self._file.close()

    def _write(self, name: str, values: np.ndarray) -> int:
        start, self._size = self._size, self._size + values.nbytes
        self._enter(name, values, start)
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return start

    def _enter(self, name: str, values: np.ndarray, start: int) -> None:
        self._entries[name] = {
            "dtype": _DTYPE_NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [start, start + values.nbytes],
        }

    def _mapped(self, values: np.ndarray, start: int) -> Array:
        own = np.memmap(self._path, values.dtype, "r", self._start + start, values.shape)
        return _alias(own)


class _Offsets(dict[str, Form]):
    def __init__(self, file: FactorFile):
        super().__init__()
        self._file = file

    def __setitem__(self, name: str, form: Form) -> None:
        super().__setitem__(name, self._file.put_form(name, form))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], leaves: Mapping[str, object]) -> Iterator[FactorFile]:
    """Opens a file beside `path`, which takes its place if all goes well; see `FactorFile`."""
    with files.replacing(path) as beside:
        file = FactorFile(beside, leaves)
        try:
            yield file
        finally:
            file.close()


def save(path: str | os.PathLike[str], state: OffsetState) -> None:
    """Writes a state that is in memory, atomically; `load` opens it. Spectra are not part of it.

    Args:
      path: of the file; its folder must exist.
      state: of addressable arrays; see `offsets.gather`.
    """
    with writing(path, tree.flatten(state.merged)) as file:
        file.put_merged(state.merged)
        for name, form in state.offsets.items():
            file.offsets[name] = form
        file.finish(state)


def load(path: str | os.PathLike[str]) -> OffsetState:
    """Opens a file that `fit` or `save` wrote.

    Args:
      path: of the file.

    Returns:
      The state, its arrays mapped from the file. Spectra are not part of it.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a whole safetensors file, or not one of a fit.
    """
    opened = SafetensorsFile(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    if missing := {"layout", "forms", "report"} - metadata.keys():
        raise ValueError(f"{path}: its header lacks {sorted(missing)}: not the file of a fit")
    facts = {name: json.loads(text) for name, text in metadata.items()}
    parts: dict[str, dict[str, Array]] = {"merged": {}, "offsets": {}, "task_embeddings": {}}
    for name in opened.specs:
        folder, _, rest = name.partition("/")
        parts[folder][rest] = _alias(opened.read(name))
    return OffsetState(
        tree.unflatten(parts["merged"]),
        jnp.asarray(parts["task_embeddings"][""]),
        serialization.from_tensors(parts["offsets"], facts["forms"]),
        FitReport(**facts["report"], spectra={}),
        facts["layout"],
    )


def _alias(values: np.ndarray) -> Array:
    """The same as JAX's, without a copy where it lies at a multiple of 64 bytes."""
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        return values
    return jax.device_put(np.asarray(values), may_alias=True)
