"""The released file: artifact.safetensors, and a manifest.json that vouches for it.

The manifest (schema 1) holds shape, dtype and SHA-256 of every tensor, size and SHA-256 of the
whole file, and the metadata; a hash of all that closes it. It is written last, so files that do not
belong together are refused. All writers here write beside and rename: a reader sees the old file or
the new one. The tensors of a new artifact lie beside as .artifact.safetensors.new until the manifest
is there: killed at any moment, `save` leaves the old artifact or the new one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from retex_jax import files
from retex_jax.snapshot import SafetensorsFile

SCHEMA = 1
TENSORS = "artifact.safetensors"
MANIFEST = "manifest.json"
_NEW = f".{TENSORS}.new"

# The dtypes that safetensors' NumPy writer has.
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
    """Writes an artifact, replacing the one that may be there. Two processes must not write one at once.

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
    _settle(directory)
    new = directory / _NEW
    size = save_safetensors(new, arrays)
    body["file"] = {"name": TENSORS, "bytes": size, "sha256": files.file_hash(new)}
    body["tensors"] = {name: _describe(array) for name, array in arrays.items()}
    written = write_json(directory / MANIFEST, {**body, "sha256": files.json_hash(body)})
    os.replace(new, directory / TENSORS)
    return size + written


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
    path = _tensors_path(directory)
    missing = [each.name for each in (directory / MANIFEST, path) if not each.is_file()]
    if missing:
        raise FileNotFoundError(f"no artifact in {directory}: {' and '.join(missing)} missing")
    manifest = _read_manifest(directory / MANIFEST)
    expected, problems = manifest["tensors"], []
    size = path.stat().st_size
    if size != manifest["file"]["bytes"]:
        problems.append(f"the file has {size} bytes, expected {manifest['file']['bytes']}")
    tensors: dict[str, np.ndarray] = {}
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        problems.append(f"the file can't be read: {error}")
    else:
        problems += [f"tensor {name!r}: missing" for name in sorted(expected.keys() - file.specs)]
        problems += [
            f"tensor {name!r}: not in the manifest" for name in file.specs.keys() - expected
        ]
        for name in sorted(file.specs.keys() & expected):
            if different := _differences(name, file.specs[name], expected[name]):
                problems += different
                continue
            tensors[name] = np.array(file.read(name))
            if _content_hash(tensors[name]) != expected[name]["sha256"]:
                problems.append(f"tensor {name!r}: its content hash is wrong")
    if not problems and files.file_hash(path) != manifest["file"]["sha256"]:
        problems.append("the file's header isn't the one that was saved")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{path} doesn't match {MANIFEST}:\n  {listed}")
    return Artifact(tensors, manifest["metadata"])


def _tensors_path(directory: Path) -> Path:
    """The tensors that the manifest vouches for: those of a `save` that was killed are still beside."""
    new = directory / _NEW
    if not (new.is_file() and (directory / MANIFEST).is_file()):
        return directory / TENSORS
    file = _read_manifest(directory / MANIFEST)["file"]
    is_meant = new.stat().st_size == file["bytes"] and files.file_hash(new) == file["sha256"]
    return new if is_meant else directory / TENSORS


def _settle(directory: Path) -> None:
    """Ends what a `save` that was killed has left."""
    try:
        path = _tensors_path(directory)
    except ValueError:  # no artifact that could be lost
        return
    if path.name == _NEW:
        os.replace(path, directory / TENSORS)


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
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": _content_hash(array),
    }


def _content_hash(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(content.data).hexdigest()


def _differences(name: str, spec: jax.ShapeDtypeStruct, expected: Mapping[str, Any]) -> list[str]:
    """Lists whether shape and dtype of a tensor aren't the manifest's."""
    have = {"shape": list(spec.shape), "dtype": spec.dtype.name}
    return [
        f"tensor {name!r}: {key} is {value}, expected {expected[key]}"
        for key, value in have.items()
        if value != expected[key]
    ]


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise ValueError(f"{path}: no schema, expected the manifest of an artifact")
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema is {manifest['schema']!r}, expected {SCHEMA}")
    if manifest.pop("sha256", None) != files.json_hash(manifest):
        raise ValueError(f"{path} is damaged: its content hash is wrong")
    file, tensors = manifest.get("file"), manifest.get("tensors")
    if (
        not isinstance(file, dict)
        or not {"bytes", "sha256"} <= file.keys()
        or not isinstance(tensors, dict)
        or not all(
            isinstance(entry, dict) and {"shape", "dtype", "sha256"} <= entry.keys()
            for entry in tensors.values()
        )
        or not isinstance(manifest.get("metadata"), dict)
    ):
        raise ValueError(f"{path}: expected metadata, and what file and tensors are")
    return manifest
