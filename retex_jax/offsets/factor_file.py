"""The file of a fit: merged model and offsets as safetensors, mapped into memory instead of read.

Its names are those that a released file has; what is no tensor is in its header's metadata, with the SHA-256 of every
tensor, and one of all this. `retex_jax.offsets.factor_writer` writes it.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.offsets import factor_writer, serialization
from retex_jax.offsets.factor_header import REPORTED, SEAL, alias, content_hash, describe, seal
from retex_jax.offsets.journal import Journal
from retex_jax.offsets.state import FitReport, OffsetState, check_fits
from retex_jax.snapshot import SafetensorsFile, parse_json
from retex_jax.typing import Array

_FACTS = {"layout", "forms", "report", "identity", "sha256"}

_log = logging.getLogger(__name__)


def save(path: str | os.PathLike[str], state: OffsetState) -> None:
    """Writes a state that is in memory, atomically; `load` opens it, without the report's histories and gammas.

    Args:
      path: of the file; its folder must exist.
      state: of addressable arrays; see `offsets.gather`.
    """
    with factor_writer.writing(path, factor_writer.room_for_state(state)) as file:
        file.put_merged(state.merged)
        for name, form in state.offsets.items():
            file.offsets[name] = form
        file.finish(state)


def load_finished(path: str | os.PathLike[str], identity: str) -> OffsetState | None:
    """What a fit of this identity has left at `path`, or None; a damaged file is named in a warning.

    A journal that the fit was killed before it could remove is removed; that of another fit stays.

    Raises:
      RuntimeError: if another fit of this identity has the journal open.
    """
    try:
        if SafetensorsFile(path).metadata.get("identity") != json.dumps(identity):
            return None
        state = load(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("%s is solved again: %s", path, error)
        return None
    journal_path = factor_writer.journal_path(Path(path))
    if Journal.is_of(journal_path, identity):
        with contextlib.closing(Journal(journal_path, identity)) as journal:
            journal.remove()
    return state


def load(path: str | os.PathLike[str], *, verify: bool = True) -> OffsetState:
    """Opens a file that `fit` or `save` wrote.

    Args:
      path: of the file.
      verify: whether to read it once now, to compare the hash of every tensor.

    Returns:
      The state, its arrays mapped from the file; its report has no histories and no gammas.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a whole safetensors file, or not one of a fit, or has changed since.
    """
    opened = SafetensorsFile(path)
    metadata = dict(opened.metadata)
    sealed = metadata.pop(SEAL, None)
    if missing := _FACTS - metadata.keys():
        raise ValueError(f"{path}: its header lacks {sorted(missing)}: not the file of a fit")
    described = {name: describe(spec) for name, spec in opened.specs.items()}
    if sealed != seal(metadata, described):
        raise ValueError(f"{path} is damaged: its header isn't the one that was written")
    try:
        facts = {name: parse_json(text) for name, text in metadata.items()}
        hashes = dict(zip(opened.specs, facts["sha256"], strict=True))
        state = _state(opened, facts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the file of a fit: {error}") from error
    changed = [
        name for name, want in hashes.items() if verify and content_hash(opened.read(name)) != want
    ]
    if changed:
        raise ValueError(f"{path} is damaged: the content of {changed} isn't what was written")
    check_fits(state, str(path))
    return state


def _state(opened: SafetensorsFile, facts: Mapping[str, Any]) -> OffsetState:
    parts: dict[str, dict[str, Array]] = {
        "merged": {},
        "offsets": {},
        "spectra": {},
        "task_embeddings": {},
    }
    for name in opened.specs:
        folder, _, rest = name.partition("/")
        parts[folder][rest] = alias(opened.read(name))
    spectra = {name: np.array(values) for name, values in parts["spectra"].items()}
    reported = {part: dict(facts["report"][part]) for part in REPORTED}
    offsets = serialization.from_tensors(parts["offsets"], facts["forms"])
    return OffsetState(
        tree.unflatten(parts["merged"]),
        jnp.asarray(parts["task_embeddings"][""]),
        dict(sorted(offsets.items())),
        FitReport(**reported, spectra=spectra),
        facts["layout"],
    )
