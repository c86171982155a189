"""Writing files so that a reader sees the old content or the new one, never a part."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from retex_jax.snapshot import parse_json

_MAX_JSON = 100_000_000  # bytes


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a file to write beside `path`, which takes its place if all goes well.

    It is in a folder of its own, so that nothing stays of what its writer has beside it. What processes of this host
    that were killed have left is removed.
    """
    path = Path(path)
    _remove_leftovers(path)
    folder = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    folder.mkdir(exist_ok=True)
    try:
        yield folder / path.name
        publish(folder / path.name, path)
    finally:
        shutil.rmtree(folder)


def publish(beside: Path, path: Path) -> None:
    """Flushes a file to the disk, and gives it the name `path`."""
    _flush(beside)
    os.replace(beside, path)
    _flush(path.parent)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file, atomically; its folder must exist.

    Args:
      path: the file.
      tensors: name to contiguous array.
      metadata: strings for the file's header.
    """
    with replacing(path) as beside:
        safetensors.numpy.save_file(dict(tensors), beside, dict(metadata) if metadata else None)
        beside.chmod(0o666 & ~_umask())  # save_file leaves a file that only its owner can read


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file without trust.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not JSON, too large, nested too deeply, or an object has one key twice; with the
        file's name.
    """
    path = Path(path)
    if (size := path.stat().st_size) > _MAX_JSON:
        raise ValueError(f"{path}: {size} bytes, expected at most {_MAX_JSON} of JSON")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(path: Path) -> None:
    name = re.compile(
        rf"\.{re.escape(path.name)}\.{re.escape(socket.gethostname())}\.([0-9]+)\.tmp"
    )
    for entry in path.parent.iterdir():
        match = name.fullmatch(entry.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
