"""Finds snapshots of Hugging Face repositories: local folders first, then the cache, then the network.

Only safetensors, configs and tokenizer files are downloaded. `huggingface_hub` is imported where it is
needed; without it local folders are found all the same.
"""

import os
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from retex_jax.snapshot import CONFIG, INDEX, SINGLE, parse_entry, parse_json, read_weight_map

ADAPTER = "adapter_model.safetensors"
PATTERNS = (
    CONFIG,
    INDEX,
    "model*.safetensors",
    ADAPTER,
    "adapter_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
"""The files of a repository that are downloaded."""

_PICKLED = "pytorch_model.bin"
_FILES = (".safetensors", ".bin", ".pt")  # ends of a file's name, not of a repository's


class Header(NamedTuple):
    """What a repository holds, known without its tensors.

    Attributes:
      specs: name -> `jax.ShapeDtypeStruct`.
      config: the parsed config.json, or None where there is none.
    """

    specs: dict[str, jax.ShapeDtypeStruct]
    config: dict[str, Any] | None


def find(
    repository: str | os.PathLike[str],
    root: str | os.PathLike[str] = "",
    revision: str | None = None,
    offline: bool = False,
) -> Path:
    """Finds the snapshot folder of a repository, and downloads it as the last resort.

    In this order: `repository` itself where it is a folder; ROOT/OWNER/NAME; ROOT/NAME; the cache of
    huggingface_hub; the network. Local folders are taken as they are, whatever the revision is.

    Args:
      repository: "OWNER/NAME", or a folder; "OWNER/NAME/FOLDER" is a folder of a repository that holds
        several models.
      root: a folder of snapshot folders, or "".
      revision: a commit, tag or branch; give a commit for the same files on every day. None is the
        default branch.
      offline: whether the network may not be used.

    Returns:
      A folder that holds safetensors weights; where `repository` is a folder, that folder.

    Raises:
      ValueError: if `repository` is neither a folder nor of the form NAME, OWNER/NAME or OWNER/NAME/FOLDER.
      FileNotFoundError: if there is no snapshot and none can be downloaded; the message has the
        command that downloads it and the folder to put it in.
    """
    if Path(repository).is_dir():
        return Path(repository)
    name = os.fspath(repository)
    _check_name(name, folders=True)
    parts = name.split("/")
    name, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = Path(root, *parts)
    if root:
        for folder in (wanted, Path(root, *(parts[1:] or parts))):
            if _holds_weights(folder):
                return folder
    command = ["hf", "download", name, *(["--revision", revision] if revision else [])]
    command += ["--include", f"{inside}/*"] if inside else []
    help_ = (
        f"{repository}: no snapshot in {wanted if root else 'the cache'}; get it where there is a "
        f"network: {shlex.join([*command, *(['--local-dir', str(Path(root, name))] if root else [])])}"
    )
    if (wanted / _PICKLED).is_file():
        help_ = (
            f"{repository}: {wanted} holds {_PICKLED}, a pickle, which is not read; transformers writes it "
            "as safetensors: from_pretrained(FOLDER).save_pretrained(FOLDER) of its Auto class"
        )
    hub = _import(help_)
    arguments = {
        "revision": revision,
        "allow_patterns": [f"{inside}/{pattern}" if inside else pattern for pattern in PATTERNS],
    }
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True, **arguments), inside)
        if _holds_weights(folder):
            return folder
        missing = FileNotFoundError("the cache has no weights of it")
    except Exception as error:  # not in the cache, in one of several words
        missing = error
    if offline:
        raise FileNotFoundError(help_) from missing
    try:
        folder = Path(hub.snapshot_download(name, **arguments), inside)
    except Exception as error:  # whatever the network or the hub did
        raise FileNotFoundError(f"{help_}\n  ({type(error).__name__}: {error})") from error
    if not _holds_weights(folder):
        raise FileNotFoundError(
            f"{repository}: revision {revision or 'main'} holds neither {SINGLE} nor {INDEX} with "
            f"all its shards nor {ADAPTER}"
        )
    return folder


def header(repository: str, revision: str | None = None) -> Header:
    """Reads the header of a repository's tensors from the hub, by ranges, and its config.json.

    Args:
      repository: "OWNER/NAME".
      revision: as for `find`.

    Returns:
      Names, shapes and dtypes, and the config: what `engine.check` and `architectures.identify` need.

    Raises:
      ValueError: if `repository` is not of the form OWNER/NAME or NAME, or its header or config
        is broken.
      FileNotFoundError: if the hub cannot be reached or has no such repository, revision or
        safetensors.
    """
    _check_name(repository)
    hub = _import(f"{repository}: its header cannot be read")
    try:
        metadata = hub.get_safetensors_metadata(repository, revision=revision)
        config = _remote_config(hub, repository, revision)
    except Exception as error:  # whatever the network or the hub did
        raise FileNotFoundError(
            f"{repository}: no header of revision {revision or 'main'} "
            f"({type(error).__name__}: {error})"
        ) from error
    specs, problems = {}, []
    for file, content in metadata.files_metadata.items():
        for name, info in content.tensors.items():
            fields = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            try:
                entry = parse_entry(fields)
            except ValueError as error:
                problems.append(f"{file}: {name}: {error}")
                continue
            specs[name] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            if metadata.weight_map.get(name) != file:
                problems.append(f"{file}: holds {name}, which the index does not place there")
    problems += [
        f"{file}: lacks {name}" for name, file in metadata.weight_map.items() if name not in specs
    ]
    if config is not None:
        try:
            config = parse_json(config)
            if not isinstance(config, dict):
                raise ValueError(f"expected a JSON object, got {type(config).__name__}")
        except ValueError as error:
            problems.append(f"{CONFIG}: {error}")
    if problems:
        raise ValueError("\n  ".join([f"{repository}: {len(problems)} problem(s)", *problems]))
    return Header(specs, config)


def _remote_config(hub: ModuleType, repository: str, revision: str | None) -> bytes | None:
    if not hub.file_exists(repository, CONFIG, revision=revision):
        return None
    return Path(hub.hf_hub_download(repository, CONFIG, revision=revision)).read_bytes()


def _check_name(name: str, *, folders: bool = False) -> None:
    parts = name.split("/")
    named = all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in parts)
    if not named or name.endswith(_FILES) or (len(parts) > 2 and not folders):
        raise ValueError(
            f"repository: got {name!r}, expected a folder or OWNER/NAME; there is no such file or folder"
        )


def _holds_weights(folder: Path) -> bool:
    """Whether all weights are there; a download that was cut off lacks shards."""
    if any((folder / name).is_file() for name in (SINGLE, ADAPTER)):
        return True
    index = folder / INDEX
    return index.is_file() and all(
        (folder / shard).is_file() for shard in set(read_weight_map(index).values())
    )


def _import(problem: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{problem}\n  (huggingface_hub is missing: pip install 'retex_jax[hub]')"
        ) from error
    return huggingface_hub
