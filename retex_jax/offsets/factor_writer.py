"""Offsets in a file instead of memory, as they are solved.

At the paper's rank the factors of eight tasks take more than two models. Here each is written as soon as it is
solved, and the state's arrays are mapped from the file: the system reads their pages when they are used, and
may drop them again. The file is written beside and renamed; `retex_jax.offsets.factor_file` says how it looks.

A fit with an identity keeps a journal of the leaves that are finished, so that it goes on from there when it was
killed.
"""

import base64
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from retex_jax import files, tree
from retex_jax.offsets import serialization
from retex_jax.offsets.factor_header import REPORTED, SEAL, alias, content_hash, describe, seal
from retex_jax.offsets.forms import Form
from retex_jax.offsets.journal import Journal
from retex_jax.offsets.state import FitReport, OffsetState
from retex_jax.snapshot import DTYPES
from retex_jax.typing import Array, Params

# Bytes: JAX takes over host memory at multiples of it, without a copy.
_ALIGNMENT = 64
# Of a fit's header, for each leaf: eight entries, their hashes and a report at most, in which its name stands often.
_HEADER_A_LEAF = 2816
_NAMES_A_LEAF = 14
_HEADER_A_RANK = 12
# Where no tensor starts, and no header's number is longer.
_FAR = 10**18


class FactorFile:
    """A safetensors file that grows by one tensor at a time.

    Attributes:
      offsets: leaf name to form; what is set is written, and is mapped from the file when it is got.
      finished: the leaves that an earlier fit of the same identity has solved; they are in `offsets`.
      notes: what `note` has kept, by the earlier fit too.
    """

    def __init__(self, path: Path, room: int, journal: Journal | None = None):
        """Opens it.

        Args:
          path: of the file, which is overwritten from where the journal ends.
          room: bytes for the header, see `room_for_fit` and `room_for_state`.
          journal: of what is finished, for `commit`.
        """
        self._path = path
        self._start = -(-(8 + room) // _ALIGNMENT) * _ALIGNMENT
        self._size = 0
        # By name: dtype, shape, sha256, and where it starts; None of those in `_last`, which are written last.
        self._tensors: dict[str, dict[str, Any]] = {}
        self._last: dict[str, np.ndarray] = {}
        self._room: dict[int, int] = {}
        self._facts: dict[str, object] = {}
        self._uncommitted: list[str] = []
        self._journal = journal
        self._reports = FitReport({}, {}, {}, {})
        self.offsets: dict[str, Form] = _Offsets(self)
        self.finished: set[str] = set()
        self.notes: dict[str, Any] = {}
        self._file = path.open("r+b" if journal is not None and path.exists() else "w+b")
        if journal is not None:
            self._resume(journal)
        self._file.truncate(self._start + self._size)
        self._file.seek(self._start + self._size)

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

        Raises:
          ValueError: if an earlier fit of the same identity has put another one.
        """
        values = np.asarray(array)
        described = {**describe(values), "sha256": content_hash(values)}
        if name in self._tensors:
            known = self._tensors[name]
            if described != {part: known[part] for part in described}:
                raise ValueError(
                    f"{self._path} is of an unfinished fit of the same identity whose {name} differs: "
                    "remove it, or give another identity"
                )
        else:
            self._tensors[name] = {**described, "start": self._place(name, array, values)}
            self._uncommitted.append(name)
        return array if name in self._last else self._mapped(name)

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

    def note(self, name: str, value: Any) -> None:
        """Keeps a JSON value for a later fit of the same identity."""
        self.notes[name] = value
        if self._journal is not None:
            self._journal.append({"tensors": {}, "forms": {}, "report": {}, "notes": {name: value}})

    def commit(self, leaves: Sequence[str], report: FitReport) -> None:
        """Enters leaves that are finished into the journal, if there is one, when what was put is on the disk."""
        if self._journal is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        tensors = {name: dict(self._tensors[name]) for name in self._uncommitted}
        for name in tensors.keys() & self._last.keys():
            tensors[name]["data"] = _encode(self._last[name])
        known: dict[str, Any] = {
            part: {name: getattr(report, part)[name] for name in leaves} for part in REPORTED
        }
        known["spectra"] = {
            name: {**describe(spectrum), "data": _encode(spectrum)}
            for name in leaves
            if (spectrum := report.spectra.get(name)) is not None
        }
        forms = {name: self._facts[name] for name in leaves if name in self._facts}
        self._journal.append({"tensors": tensors, "forms": forms, "report": known, "notes": {}})
        self._uncommitted = []

    def report_on(self, leaves: Sequence[str], report: FitReport) -> None:
        """Enters what the earlier fit has reported on leaves that are `finished`."""
        for part in (*REPORTED, "spectra"):
            known = getattr(self._reports, part)
            getattr(report, part).update({name: known[name] for name in leaves if name in known})

    def finish(self, state: OffsetState, identity: str | None = None) -> None:
        """Writes what is left, and the header.

        Raises:
          ValueError: if the header is larger than its room.
        """
        self.put("task_embeddings", state.task_embeddings)
        for name, spectrum in state.report.spectra.items():
            self.put(f"spectra/{name}", spectrum)
        for name, values in self._last.items():
            self._tensors[name]["start"] = self._write(values)
        header = _header(self._tensors, state, self._facts, identity)
        length = self._start - 8
        if len(header) > length:
            raise ValueError(
                f"{self._path}: its header takes {len(header)} bytes, and has room for {length}"
            )
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length))
        self.close()

    def close(self) -> None:
        """Closes the file; what was mapped from it stays."""
        self._file.close()

    def _place(self, name: str, array: Array, values: np.ndarray) -> int | None:
        """Where a new tensor starts; None where it is kept in memory."""
        if id(array) in self._room:
            return self._room.pop(id(array))
        if values.nbytes % _ALIGNMENT or not values.nbytes:
            self._last[name] = values
            return None
        start = self._write(values)
        self._file.flush()
        return start

    def _write(self, values: np.ndarray) -> int:
        start, self._size = self._size, self._size + values.nbytes
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return start

    def _mapped(self, name: str) -> Array:
        return alias(self._view(self._tensors[name]))

    def _view(self, known: Mapping[str, Any]) -> np.ndarray:
        start, shape = self._start + known["start"], tuple(known["shape"])
        return np.memmap(self._path, DTYPES[known["dtype"]], "r", start, shape)

    def _resume(self, journal: Journal) -> None:
        """Takes over what the earlier fit has finished, up to the first damage."""
        for number, entry in enumerate(journal.entries):
            if not self._take_over(entry):
                journal.keep(number)
                return

    def _take_over(self, entry: dict[str, Any]) -> bool:
        """Takes what the earlier fit has put, if it is as it was then."""
        kept: dict[str, np.ndarray] = {}
        end = self._file.seek(0, os.SEEK_END) - self._start
        for name, known in entry["tensors"].items():
            if "data" not in known and _stop(known) > end:
                return False
            kept[name] = _decode(known) if "data" in known else self._view(known)
            if content_hash(kept[name]) != known["sha256"]:
                return False
        for name, known in entry["tensors"].items():
            self._tensors[name] = {part: x for part, x in known.items() if part != "data"}
            if "data" in known:
                self._last[name] = kept[name]
            else:
                self._size = _stop(known)
        tensors = {
            name.removeprefix("offsets/"): alias(values)
            for name, values in kept.items()
            if name.startswith("offsets/")
        }
        self.offsets.update(serialization.from_tensors(tensors, entry["forms"]))
        self._facts |= entry["forms"]
        for part, values in entry["report"].items():
            values = {name: _decode(x) if part == "spectra" else x for name, x in values.items()}
            getattr(self._reports, part).update(values)
        self.finished |= entry["report"].get("residuals", {}).keys()
        self.notes |= entry["notes"]
        return True


class _Offsets(dict[str, Form]):
    """Writes what is set by key; `update` only takes over what is in the file."""

    def __init__(self, file: FactorFile):
        super().__init__()
        self._file = file

    def __setitem__(self, name: str, form: Form) -> None:
        super().__setitem__(name, self._file.put_form(name, form))


def room_for_fit(leaves: Iterable[str], num_ranks: int) -> int:
    """Bytes that the header of a fit takes at most.

    Args:
      leaves: names of all leaves that will be put.
      num_ranks: numbers a leaf: T where tasks may not share a factor, else 0.
    """
    a_leaf = _HEADER_A_LEAF + _HEADER_A_RANK * num_ranks
    return 4096 + sum(_NAMES_A_LEAF * len(json.dumps(name)) + a_leaf for name in leaves)


def room_for_state(state: OffsetState) -> int:
    """Bytes that the header of a state takes at most, without an identity."""
    offsets, forms = serialization.to_tensors(state.offsets)
    arrays = {"task_embeddings": state.task_embeddings}
    folders = (
        ("merged", tree.flatten(state.merged)),
        ("offsets", offsets),
        ("spectra", state.report.spectra),
    )
    for folder, named in folders:
        arrays |= {f"{folder}/{name}": array for name, array in named.items()}
    unwritten = {"sha256": content_hash(np.zeros(0)), "start": _FAR}
    tensors = {name: {**describe(array), **unwritten} for name, array in arrays.items()}
    return len(_header(tensors, state, forms, None))


def _header(
    tensors: Mapping[str, Mapping[str, Any]],
    state: OffsetState,
    forms: Mapping[str, object],
    identity: str | None,
) -> bytes:
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1]["start"]))
    described = {
        name: {"dtype": known["dtype"], "shape": known["shape"]} for name, known in tensors.items()
    }
    facts = {
        "layout": state.layout,
        "forms": forms,
        "report": {part: getattr(state.report, part) for part in REPORTED},
        "identity": identity,
        "sha256": [known["sha256"] for known in tensors.values()],
    }
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    metadata[SEAL] = seal(metadata, described)
    entries = {
        name: {**described[name], "data_offsets": [known["start"], _stop(known)]}
        for name, known in tensors.items()
    }
    return json.dumps({"__metadata__": metadata, **entries}).encode()


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], room: int, identity: str | None = None
) -> Iterator[FactorFile]:
    """Opens a file beside `path`, which takes its place if all goes well; see `FactorFile`.

    With an identity it stays if anything goes wrong, and the next fit of that identity goes on from it.

    Raises:
      RuntimeError: if another fit of this identity is at work on it.
    """
    path = Path(path)
    if identity is None:
        with (
            files.replacing(path) as beside,
            contextlib.closing(FactorFile(beside, room)) as file,
        ):
            yield file
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    with contextlib.closing(Journal(journal_path(path), identity)) as journal:
        with contextlib.closing(FactorFile(unfinished, room, journal)) as file:
            yield file
        files.publish(unfinished, path)
        journal.remove()


def journal_path(path: Path) -> Path:
    """Where the journal of an unfinished fit lies."""
    return path.with_name(f".{path.name}.journal")


def _stop(known: Mapping[str, Any]) -> int:
    """Where a tensor ends, in bytes from the start of the data."""
    return known["start"] + prod(known["shape"]) * DTYPES[known["dtype"]].itemsize


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _decode(known: Mapping[str, Any]) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(known["data"]), DTYPES[known["dtype"]])
    return data.reshape(known["shape"])
