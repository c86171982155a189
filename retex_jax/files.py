"""Writing files so that a reader sees the old content or the new one, never a part."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a name beside `path`; what is written there takes its place if all goes well."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


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
