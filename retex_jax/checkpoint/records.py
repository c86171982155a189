"""The record of a step: what its leaves and files must be, with a hash of the record itself."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from retex_jax import files

SCHEMA = 1
NAME = "record.json"
_LEAF = {"shape", "dtype", "impl", "sha256"}
_JSON = re.compile(r"\.zarray|_.*|process_\d+")


def inventory(folder: Path) -> dict[str, list[Any]]:
    """Returns relative path to [bytes, SHA-256] of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, files.file_hash(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record into a folder and flushes it to disk."""
    text = json.dumps({**record, "sha256": files.json_hash(record)}, indent=1)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """Reads the record of a step's folder.

    Raises:
      ValueError: if the folder is missing or empty, or if the record is missing, has changed since
        it was written, or is of another schema or another step.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint step")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder}: the folder is empty")
    path = folder / NAME
    try:
        record = files.read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    if not isinstance(record, dict) or record.pop("sha256", None) != files.json_hash(record):
        raise ValueError(f"{path} is damaged: its content hash is wrong")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {record.get('schema')!r}, expected {SCHEMA}")
    if str(record.get("step")) != folder.name:
        raise ValueError(f"{path}: the record is of step {record.get('step')!r}")
    if not _is_whole(record):
        raise ValueError(f"{path}: expected metadata, and what leaves and files are")
    return record


def _is_whole(record: Mapping[str, Any]) -> bool:
    parts = [record.get(name) for name in ("metadata", "leaves", "files")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    leaves, described = record["leaves"].values(), record["files"]
    return (
        all(isinstance(leaf, dict) and leaf.keys() == _LEAF for leaf in leaves)
        and all(isinstance(leaf["shape"], list) for leaf in leaves)
        and all(isinstance(file, list) and len(file) == 2 for file in described.values())
        and not any(_is_outside(name) for name in described)
    )


def _is_outside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


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
        elif share and position % share[1] == share[0] and files.file_hash(path) != sha256:
            problems.append(f"{label} has changed since it was saved")
    return problems


def hostile_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Lists the JSON files that Orbax must not see: its parser overflows the stack where they are nested deeply.

    Args:
      folder: the step's folder.
      record: its record.

    Returns:
      One line a file, empty if all is well.
    """
    problems = []
    for name in record["files"]:
        path = folder / name
        if _JSON.fullmatch(path.name):
            try:
                files.read_json(path)
            except ValueError as error:
                problems.append(str(error))
    return problems


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
