"""Reads all tensors of a safetensors snapshot: bytes, one file, or a folder of shards."""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# safetensors.numpy cannot load bfloat16 from bytes, so the dtypes are named here.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}")
        for kind in "IU"
        for bits in (8, 16, 32, 64)
    },
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}


def read(source: bytes | str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every tensor.

    Args:
      source: a file's content; the path of a file; or of a folder that holds model.safetensors or,
        for a checkpoint in shards, model.safetensors.index.json and its shards.

    Returns:
      Name -> array, dtype as stored (bfloat16 included).

    Raises:
      FileNotFoundError: if the path, or a shard that the index names, does not exist.
      ValueError: if the content is truncated or is not safetensors, a dtype is unknown, the index
        is not one, or a tensor that it promises is not in its shard.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _load(bytes(source), "safetensors data")
    path = pathlib.Path(source)
    if path.is_dir():
        if (path / SINGLE).exists():
            path = path / SINGLE
        elif (path / INDEX).exists():
            return _read_shards(path)
        else:
            raise FileNotFoundError(f"{path}: holds neither {SINGLE} nor {INDEX}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return _load(path.read_bytes(), str(path))


def _read_shards(folder: pathlib.Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    try:
        shard_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: expected a JSON object with a weight_map ({error!r})") from None
    shards = sorted(set(shard_of.values()))
    if outside := [s for s in shards if pathlib.PurePath(s).name != s]:
        raise ValueError(f"{index}: shards outside the folder: {', '.join(outside)}")
    if absent := [shard for shard in shards if not (folder / shard).exists()]:
        raise FileNotFoundError(f"{folder}: missing shards {', '.join(absent)}")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        loaded = _load((folder / shard).read_bytes(), str(folder / shard))
        names = [name for name, owner in shard_of.items() if owner == shard]
        if lost := [name for name in names if name not in loaded]:
            raise ValueError(f"{folder / shard}: lacks {', '.join(lost)}")
        tensors.update({name: loaded[name] for name in names})
    return tensors


def _load(data: bytes, where: str) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: not a whole safetensors file: {error}") from None
    if unknown := sorted({entry["dtype"] for _, entry in entries} - _DTYPES.keys()):
        known = ", ".join(_DTYPES)
        raise ValueError(f"{where}: dtypes {', '.join(unknown)}, expected {known}")
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }
