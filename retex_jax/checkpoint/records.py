"""The record of a step: what its leaves and files must be, with a hash of the record itself."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
NAME = "record.json"


def inventory(folder: Path) -> dict[str, list[Any]]:
    """Returns relative path to [bytes, SHA-256] of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_hash(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record into a folder and flushes it to disk."""
    text = json.dumps({**record, "sha256": _own_hash(record)}, indent=1)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """Reads the record of a step's folder.

    Raises:
      ValueError: if the folder is missing or empty, or if the record is missing, has changed since
        it was written, or is of another schema.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint step")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder}: the folder is empty")
    path = folder / NAME
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or record.pop("sha256", None) != _own_hash(record):
        raise ValueError(f"{path} is damaged: its content hash is wrong")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema is {record['schema']!r}, expected {SCHEMA}")
    return record


def damaged_files(
    folder: Path, record: Mapping[str, Any], *, share: tuple[int, int] | None = None
) -> list[str]:
    """Lists the files that aren't as recorded, by name and by leaf.

    Args:
      folder: the step's folder.
      record: its record.
      share: (index, count) to hash every count-th file from index on; None compares sizes only.

    Returns:
      One line a file, empty if all is well.
    """
    owner = {name.replace("/", "."): name for name in record["leaves"]}
    problems = []
    for position, (name, (size, sha256)) in enumerate(record["files"].items()):
        path = folder / name
        leaf = owner.get(path.parent.name)
        label = f"leaf {leaf!r}: file {name}" if leaf else f"file {name}"
        if not path.is_file():
            problems.append(f"{label} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{label} has {path.stat().st_size} bytes, expected {size}")
        elif share and position % share[1] == share[0] and file_hash(path) != sha256:
            problems.append(f"{label} has changed since it was saved")
    return problems


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
