"""The released file: artifact.safetensors, and a manifest.json that vouches for it.

The manifest (schema 1) holds shape, dtype and SHA-256 of every tensor, size and SHA-256 of the
whole file, and the metadata; a hash of all that closes it. It is written last, so files that do not
belong together are refused. All writers here write beside and rename: a reader sees the old file or
the new one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from retex_jax import files

SCHEMA = 1
TENSORS = "artifact.safetensors"
MANIFEST = "manifest.json"

# The dtypes that safetensors' NumPy reader and writer both have.
_DTYPES = {"bool", "bfloat16", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


class Artifact(NamedTuple):
    """What `load` returns."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]


def save(
    directory: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, Any]
) -> int:
    """Writes an artifact, replacing the one that may be there.

    Args:
      directory: created if missing.
      tensors: name to array (jax or NumPy) of any shape, as `save_safetensors` takes them.
      metadata: JSON-serialisable facts.

    Returns:
      Bytes of both files.

    Raises:
      ValueError: as `save_safetensors`; or if metadata isn't finite JSON.
    """
    directory = Path(directory)
    arrays = _as_arrays(tensors)
    body = {"schema": SCHEMA, "metadata": _as_json("metadata", dict(metadata))}
    directory.mkdir(parents=True, exist_ok=True)
    size = save_safetensors(directory / TENSORS, arrays)
    body["file"] = {"name": TENSORS, "bytes": size, "sha256": _file_hash(directory / TENSORS)}
    body["tensors"] = {name: _describe(array) for name, array in arrays.items()}
    return size + write_json(directory / MANIFEST, {**body, "sha256": _manifest_hash(body)})


def load(directory: str | os.PathLike[str]) -> Artifact:
    """Reads an artifact and checks every hash.

    Args:
      directory: where `save` wrote.

    Returns:
      The tensors (NumPy, sorted by name) and the metadata.

    Raises:
      FileNotFoundError: if one of the two files is missing.
      ValueError: if the manifest is damaged or of another schema, if the file is truncated or
        damaged, or if a tensor is missing, extra, or of another shape, dtype or content. All are
        listed.
    """
    directory = Path(directory)
    missing = [name for name in (MANIFEST, TENSORS) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no artifact in {directory}: {' and '.join(missing)} missing")
    manifest = _read_manifest(directory / MANIFEST)
    path, expected = directory / TENSORS, manifest["tensors"]
    problems = []
    size = path.stat().st_size
    if size != manifest["file"]["bytes"]:
        problems.append(f"the file has {size} bytes, expected {manifest['file']['bytes']}")
    tensors: dict[str, np.ndarray] = {}
    try:
        tensors = dict(sorted(safetensors.numpy.load_file(path).items()))
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"the file can't be read: {error}")
    else:
        problems += [f"tensor {name!r}: missing" for name in sorted(expected.keys() - tensors)]
        problems += [f"tensor {name!r}: not in the manifest" for name in tensors.keys() - expected]
        problems += _changed(tensors, expected)
    if not problems and _file_hash(path) != manifest["file"]["sha256"]:
        problems.append("the file's header isn't the one that was saved")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{path} doesn't match {MANIFEST}:\n  {listed}")
    return Artifact(tensors, manifest["metadata"])


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes one safetensors file, atomically.

    Args:
      path: the file; its folder must exist.
      tensors: name to array (jax or NumPy) of any shape; boolean, integer, float16, bfloat16,
        float32 or float64.
      metadata: strings for the file's header.

    Returns:
      Bytes written.

    Raises:
      ValueError: if there are no tensors, a name is empty or "__metadata__", a dtype is another
        one, or metadata has values that aren't strings.
    """
    strings = dict(metadata or {})
    wrong = [key for key, value in strings.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"metadata: values of {wrong} aren't strings")
    arrays = _as_arrays(tensors)
    files.write_safetensors(path, arrays, strings or None)
    return Path(path).stat().st_size


def write_json(path: str | os.PathLike[str], value: Any) -> int:
    """Writes one JSON file, atomically.

    Returns:
      Bytes written.

    Raises:
      ValueError: if the value isn't made of JSON's types, or has NaN or infinity.
    """
    _as_json(str(path), value)
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    with files.replacing(path) as beside:
        beside.write_bytes(data)
    return len(data)


def _as_arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns tensors into contiguous little-endian NumPy arrays, sorted by name."""
    if not tensors:
        raise ValueError("tensors: got none, expected at least one")
    arrays, problems = {}, []
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        if not name or name == "__metadata__":
            problems.append(f"name {name!r} isn't allowed")
        elif array.dtype.name not in _DTYPES:
            problems.append(f"{name!r} has dtype {array.dtype}, expected one of {sorted(_DTYPES)}")
        else:
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            arrays[name] = np.ascontiguousarray(array).reshape(array.shape)  # keeps 0-d
    if problems:
        raise ValueError("tensors: " + "; ".join(problems))
    return arrays


def _as_json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected finite JSON values: {error}") from error


def _describe(array: np.ndarray) -> dict[str, Any]:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(content.data).hexdigest()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}


def _changed(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> list[str]:
    """Lists the tensors whose shape, dtype or content isn't the manifest's."""
    problems = []
    for name, array in tensors.items():
        if name not in expected:
            continue
        have, want = _describe(array), expected[name]
        for key in ("shape", "dtype"):
            if have[key] != want[key]:
                problems.append(f"tensor {name!r}: {key} is {have[key]}, expected {want[key]}")
        if have["sha256"] != want["sha256"]:
            problems.append(f"tensor {name!r}: its content hash is wrong")
    return problems


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise ValueError(f"{path}: no schema, expected the manifest of an artifact")
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema is {manifest['schema']!r}, expected {SCHEMA}")
    if manifest.pop("sha256", None) != _manifest_hash(manifest):
        raise ValueError(f"{path} is damaged: its content hash is wrong")
    return manifest


def _manifest_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
