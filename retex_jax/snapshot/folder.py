"""A checkpoint as Hugging Face stores it: safetensors, one file or shards, and config.json.

Opening reads headers only and finds every problem that they can show; tensors are memory-mapped
views, so reading one takes no memory of its own. Pickle files are never opened, because unpickling
runs code that the file brings along.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from retex_jax.snapshot.file import SafetensorsFile, parse_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Pickles of the training, which lie beside the weights of a trainer's checkpoint.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


class Snapshot(Mapping[str, np.ndarray]):
    """An opened checkpoint: a read-only mapping of names to memory-mapped tensors.

    Attributes:
      specs: name -> `jax.ShapeDtypeStruct`.
      config: the parsed config.json of a folder, or None where there is none.
      where: what was opened, for messages.
    """

    specs: dict[str, jax.ShapeDtypeStruct]
    config: dict[str, Any] | None
    where: str

    def __init__(self, source: bytes | bytearray | memoryview | str | os.PathLike[str]):
        """Reads the headers.

        Args:
          source: a file's content; the path of a file; or of a folder that holds model.safetensors
            or, for a checkpoint in shards, model.safetensors.index.json and its shards.

        Raises:
          FileNotFoundError: if the path, or a shard that the index names, does not exist.
          ValueError: if a file is truncated or not safetensors, there are only pickle files, the
            index is not one, points outside the folder or disagrees with its shards, or config.json
            is not a JSON object. All problems of a kind are listed.
        """
        self.config = None
        self._files: dict[str, SafetensorsFile] = {}
        if isinstance(source, bytes | bytearray | memoryview):
            self.where = "safetensors data"
            file = SafetensorsFile(source)
            self._files = dict.fromkeys(file.specs, file)
        else:
            path = Path(source)
            self.where = str(path)
            if path.is_dir():
                self._files = _open_folder(path)
                self.config = _read_config(path)
            elif path.suffix in _PICKLES and path.exists():
                raise ValueError(pickle_refusal([path]))
            else:
                file = SafetensorsFile(path)
                self._files = dict.fromkeys(file.specs, file)
        self.specs = {name: file.specs[name] for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as stored (bfloat16 included): a read-only view of the file; copy it to keep it.

        Raises:
          KeyError: if there is no such tensor.
        """
        return self._files[name].read(name)

    def require_config(self) -> dict[str, Any]:
        """Returns the parsed config.json.

        Raises:
          ValueError: if there is none.
        """
        if self.config is None:
            raise ValueError(
                f"{self.where}: there is no {CONFIG}, which says what model the tensors belong to; "
                "give a snapshot folder that holds it"
            )
        return self.config

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _open_folder(folder: Path) -> dict[str, SafetensorsFile]:
    if (folder / SINGLE).exists():
        file = SafetensorsFile(folder / SINGLE)
        return dict.fromkeys(file.specs, file)
    if (folder / INDEX).exists():
        return _open_shards(folder)
    pickles = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _PICKLES and not path.name.startswith(_NOT_WEIGHTS)
    )
    if pickles:
        raise ValueError(pickle_refusal(pickles))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; to read one of its files, give that file's path: {', '.join(others)}"
    raise FileNotFoundError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint if others else ''}")


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Returns the shard of each tensor."""
    index = folder / INDEX
    shard_of = read_weight_map(index)
    shards = sorted(set(shard_of.values()))
    if outside := [shard for shard in shards if not _is_inside(folder, shard)]:
        raise ValueError(f"{index}: shards outside the folder: {', '.join(map(repr, outside))}")
    if absent := [shard for shard in shards if not (folder / shard).exists()]:
        raise FileNotFoundError(f"{folder}: missing shards {', '.join(absent)}")
    files, problems = {}, []
    for shard in shards:
        try:
            files[shard] = SafetensorsFile(folder / shard)
        except ValueError as error:
            problems.append(str(error))
            continue
        names = {name for name, owner in shard_of.items() if owner == shard}
        if lost := sorted(names - files[shard].specs.keys()):
            problems.append(f"{folder / shard}: lacks {', '.join(lost)}")
        if unnamed := sorted(files[shard].specs.keys() - names):
            problems.append(
                f"{folder / shard}: holds {', '.join(unnamed)}, which {INDEX} does not place there"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return {name: files[shard] for name, shard in shard_of.items()}


def read_weight_map(index: Path) -> dict[str, str]:
    """Returns the shard of each tensor, as an index file names them.

    Args:
      index: the path of model.safetensors.index.json.

    Returns:
      Tensor -> file name, which may be any text.

    Raises:
      ValueError: if it is not a JSON object with a weight_map of texts.
    """
    try:
        shard_of = parse_json(index.read_bytes())["weight_map"]
        if not isinstance(shard_of, dict) or not shard_of:
            raise ValueError("weight_map is not a JSON object with entries")
        if not all(isinstance(shard, str) and shard for shard in shard_of.values()):
            raise ValueError("weight_map has a shard that is not a file name")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: expected a JSON object with a weight_map ({error})") from None
    return shard_of


def _is_inside(folder: Path, shard: str) -> bool:
    """Whether a shard is a file of this folder, also after its links are followed.

    The cache of huggingface_hub keeps a snapshot as links from REPO/snapshots/REVISION into
    REPO/blobs, which counts as inside.
    """
    if PurePosixPath(shard).name != shard or shard == ".." or "\\" in shard or "\0" in shard:
        return False
    real, target = folder.resolve(), (folder / shard).resolve()
    blobs = [real.parent.parent / "blobs"] if real.parent.name == "snapshots" else []
    return any(target.is_relative_to(place) for place in (real, *blobs))


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def pickle_refusal(pickles: Sequence[Path], target: str = SINGLE) -> str:
    """Says why pickle files are not read, and the command that converts them to the file `target`."""
    folder = pickles[0].parent
    code = (
        "import torch, safetensors.torch; tensors = {}; "
        f"[tensors.update(torch.load(path, map_location='cpu', weights_only=True)) "
        f"for path in {[str(path) for path in pickles]}]; "
        "tensors = tensors.get('state_dict', tensors); "
        "safetensors.torch.save_file("
        "{name: x.clone().contiguous() for name, x in tensors.items()}, "
        f"{str(folder / target)!r}, {{'format': 'pt'}})"
    )
    return (
        f"{', '.join(str(path) for path in pickles)}: refused, because these are pickle files, and "
        "reading a pickle file runs code that it brings along. Convert once, with torch's loader "
        f"that takes tensors only:\n  python -c {shlex.quote(code)}"
    )
