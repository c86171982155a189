"""The checkpointer: a step's folder is whole or absent. The package says how it looks."""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from retex_jax import tree as trees
from retex_jax.checkpoint import leaves, records

_STATE = "state"
_STEP = re.compile(r"0|[1-9]\d*")
_LEFTOVER = re.compile(r"\.\d+\.(saving|replaced)")

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores pytrees, one folder a step.

    Leaves may be jax.Array (sharded ones too), typed PRNG keys, NumPy arrays and Python numbers.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_to_keep: int = 2):
        """Names the directory; nothing is created before the first save.

        Args:
          directory: on a file system that all processes share.
          max_to_keep: number of newest whole steps that stay after a save.

        Raises:
          ValueError: if max_to_keep < 1.
        """
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep: got {max_to_keep}, expected at least 1")
        self.directory = Path(directory).absolute()
        self.max_to_keep = max_to_keep

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> Path:
        """Writes one step and returns when it is whole on disk.

        A kill at any moment leaves the other steps as they were. Saving a step again replaces it.

        Args:
          step: not negative, and not before the newest whole step.
          tree: pytree of arrays.
          metadata: JSON-serialisable facts to go with it (config, commit, data position).

        Returns:
          The step's folder.

        Raises:
          ValueError: if the step is negative or before the newest whole step, the tree has no
            leaves, a leaf isn't numeric, two leaves share a name, or metadata isn't finite JSON.
        """
        newest = next(self._whole_steps(warn=False), None)
        if newest is not None and step < newest:
            newest = next(self._whole_steps(warn=False, hashed=True), None)
        if step < 0 or (newest is not None and step < newest):
            raise ValueError(f"step: got {step}, expected at least {newest or 0}")
        try:
            facts = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata: got {metadata!r}, expected finite JSON values") from error
        named, _ = leaves.name_leaves(tree)
        stored = {name: leaves.as_stored(leaf) for name, leaf in named.items()}
        hashes = {name: leaves.content_hash(leaf) for name, leaf in stored.items()}
        described = {name: leaves.describe(leaf)._asdict() for name, leaf in named.items()}
        record: dict[str, Any] = {
            "schema": records.SCHEMA,
            "step": step,
            "metadata": facts,
            "leaves": {name: {**described[name], "sha256": hashes[name]} for name in named},
        }
        stage = self.directory / f".{step}.saving"
        lead = jax.process_index() == 0
        if lead:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.iterdir():
                if _LEFTOVER.fullmatch(leftover.name):
                    shutil.rmtree(leftover)
            stage.mkdir()
        _sync(f"retex_jax.checkpoint.{step}.begin")
        arrays = {
            name: leaf for name, leaf in stored.items() if leaf.size
        }  # Orbax refuses empty ones
        try:
            if arrays:
                with _orbax() as orbax:
                    orbax.save(stage / _STATE, args=ocp.args.PyTreeSave(trees.unflatten(arrays)))
            if lead:
                record["files"] = records.inventory(stage)
                records.write(stage, record)
                self._publish(stage, step)
        except BaseException:
            if lead:
                shutil.rmtree(stage, ignore_errors=True)
            raise
        _sync(f"retex_jax.checkpoint.{step}.end")
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Returns the whole steps, ascending; one that isn't whole is named in a warning.

        Whole means: the record is intact and every file is there with its recorded size.
        """
        return sorted(self._whole_steps(warn=True))

    def latest(self) -> int | None:
        """Returns the newest whole step, or None; a newer broken one is named in a warning.

        Here whole also means that every file has its recorded content.
        """
        return next(self._whole_steps(warn=True, hashed=True), None)

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata saved with a step.

        Raises:
          ValueError: if the step is missing or its record is damaged.
        """
        return records.read(self.directory / str(step))["metadata"]

    def restore(self, step: int, like: Any) -> Any:
        """Reads one step back, checked against `like` and against every hash.

        Args:
          step: a saved step.
          like: pytree of arrays or of jax.ShapeDtypeStruct. A leaf comes back as the same kind:
            with the sharding of `like` (first local device if it has none), as NumPy, or as a
            Python number.

        Returns:
          A pytree of the structure of `like`.

        Raises:
          ValueError: if the step is missing; if leaves are missing, extra, or of another shape or
            dtype than in `like`; if a file or a leaf isn't as it was saved. All are listed.
        """
        folder = self.directory / str(step)
        record = records.read(folder)
        saved = {
            name: leaves.Description(tuple(leaf["shape"]), leaf["dtype"], leaf["impl"])
            for name, leaf in record["leaves"].items()
        }
        expected, treedef = leaves.name_leaves(like)
        _fail(f"{folder} doesn't fit", _mismatches(saved, expected))
        share = (jax.process_index(), jax.process_count())
        _fail(f"{folder} is damaged", records.damaged_files(folder, record, share=share))
        _fail(f"{folder} can't be read", records.hostile_files(folder, record))
        targets = {name: leaves.target(leaf, saved[name].impl) for name, leaf in expected.items()}
        found = _read(folder / _STATE, targets)
        damaged = [
            f"leaf {name!r}: its content isn't what was saved"
            for name, leaf in found.items()
            if leaves.content_hash(leaf) != record["leaves"][name]["sha256"]
        ]
        _fail(f"{folder} is damaged", damaged)
        given = [
            leaves.as_given(found[name], leaf, saved[name].impl) for name, leaf in expected.items()
        ]
        return jax.tree.unflatten(treedef, given)

    def _publish(self, stage: Path, step: int) -> None:
        """Gives a finished stage its name, then removes the steps that are too old, or newer and damaged."""
        final = self.directory / str(step)
        aside = self.directory / f".{step}.replaced"
        if final.exists():
            os.replace(final, aside)
        os.replace(stage, final)
        records.flush_folder(self.directory)
        shutil.rmtree(aside, ignore_errors=True)
        whole = list(self._whole_steps(warn=False))
        for newer in whole[: whole.index(step)]:  # whose content `save` has found damaged
            shutil.rmtree(self.directory / str(newer))
        oldest = whole[whole.index(step) :][: self.max_to_keep][-1]
        for old in self._folders():
            if old < oldest:
                shutil.rmtree(self.directory / str(old))

    def _folders(self) -> list[int]:
        """Returns the steps that have a folder, whole or not, newest first."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted((int(name) for name in names if _STEP.fullmatch(name)), reverse=True)

    def _whole_steps(self, *, warn: bool, hashed: bool = False) -> Iterator[int]:
        """Yields the whole steps, newest first; contents are compared where that is asked for."""
        share = (jax.process_index(), jax.process_count()) if hashed else None
        for step in self._folders():
            folder = self.directory / str(step)
            try:
                problems = records.damaged_files(folder, records.read(folder), share=share)
            except ValueError as error:
                problems = [str(error)]
            if not (_count(problems) if hashed else len(problems)):
                yield step
            elif warn:
                _log.warning(
                    "skipped checkpoint step %d (%s): %s", step, folder, "; ".join(problems)
                )


def _mismatches(saved: Mapping[str, leaves.Description], expected: Mapping[str, Any]) -> list[str]:
    """Lists the leaves that are missing, extra, or of another shape or dtype."""
    problems = [f"leaf {name!r}: not expected" for name in saved if name not in expected]
    for name, leaf in expected.items():
        want = leaves.describe(leaf)
        have = saved.get(name)
        if have is None:
            problems.append(f"leaf {name!r}: missing in the checkpoint, expected {want}")
        elif have[:2] != want[:2]:
            problems.append(f"leaf {name!r}: the checkpoint has {have}, expected {want}")
    return problems


def _read(state: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads leaves through Orbax; those without elements have no file."""
    found = {
        name: jnp.zeros(leaf.shape, leaf.dtype) if leaves.is_on_device(leaf) else leaf
        for name, leaf in targets.items()
        if 0 in leaf.shape
    }
    nested = trees.unflatten({name: leaf for name, leaf in targets.items() if name not in found})
    if not nested:
        return found
    restore_args = jax.tree.map(_restore_args, nested)
    try:
        with _orbax() as orbax:
            args = ocp.args.PyTreeRestore(item=nested, restore_args=restore_args)
            return {**found, **trees.flatten(orbax.restore(state, args=args))}
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"{state} can't be read: {error}") from error


def _restore_args(target: Any) -> Any:
    if leaves.is_on_device(target):
        return ocp.ArrayRestoreArgs(sharding=target.sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _fail(what: str, problems: list[str]) -> None:
    """Raises on all processes if one has a problem, so that none waits for another in Orbax."""
    if _count(problems):
        listed = "\n  ".join(sorted(problems) or ["another process has found it"])
        raise ValueError(f"checkpoint step {what}:\n  {listed}")


def _count(problems: list[str]) -> int:
    """Of all processes."""
    if jax.process_count() == 1:
        return len(problems)
    return int(np.sum(multihost_utils.process_allgather(np.int32(len(problems)))))


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _passes(record: logging.LogRecord) -> bool:
    """Drops Orbax's remarks below an error; everybody else's absl messages pass."""
    return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Opens Orbax with one folder a leaf, so that a damaged file names its leaf."""
    absl = logging.getLogger("absl")
    absl.addFilter(_passes)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as orbax:
            yield orbax
    finally:
        absl.removeFilter(_passes)
