"""What a checkpoint is and whether experts fit it, from headers alone: no tensor is read.

Works before any download: a repository on the hub is asked for the headers of its files only.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retex_jax import expert_checks, lora, models, tree
from retex_jax.convert import hub
from retex_jax.convert.architectures import Architecture, identify
from retex_jax.convert.engine import check
from retex_jax.experts import ExpertSet
from retex_jax.snapshot import Snapshot
from retex_jax.sources import SafetensorsSource

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Inspection:
    """What is known of one checkpoint.

    Attributes:
      where: the folder, file or repository.
      specs: tensor name -> shape and dtype, as stored.
      architecture: what its config.json names, or None where there is none or it is not known.
      leaves: Flax leaf name -> shape and dtype (as stored) of what a merger sees: heads are left out,
        and of a classifier the backbone's names. Empty where the architecture is not known.
      raw_leaves: the same of all tensors, by the names that `ExpertSet.from_safetensors` reads.
      tied: whether the output layer of a language model is its embedding; None where there is none.
      problems: what stops it from being read.

    What `inspect` is told to exclude is in neither `leaves` nor `raw_leaves`.
    """

    where: str
    specs: Mapping[str, Any]
    architecture: Architecture | None = None
    leaves: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    raw_leaves: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    tied: bool | None = None
    problems: tuple[str, ...] = ()

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype name to number of tensors."""
        return dict(Counter(np.dtype(spec.dtype).name for spec in self.specs.values()))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors."""
        return tree.param_bytes(dict(self.specs))


def inspect(
    source: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "",
    revision: str | None = None,
    offline: bool = False,
    exclude: Sequence[str] = (),
) -> Inspection:
    """Looks at one checkpoint.

    Args:
      source: a file, a snapshot folder, or "OWNER/NAME" on the hub, of which only headers are read.
      root: where snapshot folders of repositories lie, or "".
      revision: of a repository.
      offline: whether the network may not be used.
      exclude: regular expressions of leaves that are left out, as `ExpertSet.from_safetensors` takes them.

    Returns:
      What is known; what is wrong is among its problems.

    Raises:
      ValueError: if `exclude` is not a sequence of regular expressions.
    """
    expert_checks.check_patterns(exclude)
    try:
        specs, config = _headers(source, root, revision, offline)
    except (ValueError, OSError) as error:
        return Inspection(str(source), {}, problems=(str(error),))
    raw_leaves = {
        _raw(key): jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        for key, spec in specs.items()
        if not tree.matches_any(exclude, _raw(key))
    }
    if config is None:
        return Inspection(str(source), specs, raw_leaves=raw_leaves)
    try:
        architecture = identify(config)
        model = architecture.from_hf(config)
        expected = tree.flatten(models.expected_params(model))
        keys = check(specs, architecture.table(model), _unresized(expected, specs, architecture))
    except (ValueError, TypeError) as error:
        return Inspection(str(source), specs, problems=(str(error),))
    leaves = {
        name.removeprefix("backbone/"): jax.ShapeDtypeStruct(spec.shape, specs[keys[name]].dtype)
        for name, spec in expected.items()
        if not name.startswith("head/") and _raw(keys[name]) in raw_leaves
    }
    lm_head = getattr(getattr(model, "config", None), "lm_head", None)
    tied = {"tied": True, "untied": False}.get(lm_head)
    return Inspection(str(source), specs, architecture, leaves, raw_leaves, tied)


def inspect_adapter(
    folder: str | os.PathLike[str], pretrained: str | os.PathLike[str]
) -> list[str]:
    """Says what stops a PEFT adapter from being read as an expert of a pretrained checkpoint."""
    try:
        lora.LoraSource(folder, SafetensorsSource(pretrained))
    except ValueError as error:
        return str(error).splitlines()
    return []


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (Path(source) / _ADAPTER_CONFIG).is_file()


def disagreements(pretrained: Inspection, expert: Inspection) -> list[str]:
    """Says where an expert is not of the pretrained model.

    Leaves that only the pretrained model has, such as a text tower that was not fine-tuned, are no
    disagreement. Where one of the two has no config.json, they are compared as by `raw_disagreements`.

    Args:
      pretrained: without problems.
      expert: without problems.

    Returns:
      One line each.
    """
    if pretrained.architecture is None or expert.architecture is None:
        return raw_disagreements(pretrained, expert)
    base = dict(pretrained.leaves)
    if "logit_scale" in base and "logit_scale" not in expert.leaves:
        tower = "text/" if "token_embedding/embedding" in expert.leaves else "vision/"
        base = {n.removeprefix(tower): spec for n, spec in base.items() if n.startswith(tower)}
    problems = []
    if None not in (pretrained.tied, expert.tied) and pretrained.tied != expert.tied:
        said = {True: "tied to", False: "untied from"}
        problems.append(
            f"its output layer is {said[expert.tied]} the embedding, the pretrained model's is "
            f"{said[pretrained.tied]} it"
        )
    for name, spec in expert.leaves.items():
        if name not in base:
            problems.append(f"{name}: not in the pretrained model{tree.did_you_mean(name, base)}")
        elif spec.shape != base[name].shape:
            resized = name.endswith("embedding") and spec.shape[1:] == base[name].shape[1:]
            why = " (the vocabulary or the number of positions was resized)" if resized else ""
            problems.append(f"{name}: shape {spec.shape}, expected {base[name].shape}{why}")
    dtypes = {
        name: (np.dtype(spec.dtype).name, np.dtype(base[name].dtype).name)
        for name, spec in expert.leaves.items()
        if name in base
    }
    if len(pairs := set(dtypes.values())) == 1 and len(dtypes) > 1:
        problems += [
            f"stored in {ours}, expected {theirs}" for ours, theirs in pairs if ours != theirs
        ]
    else:
        problems += [
            f"{name}: dtype {ours}, expected {theirs}"
            for name, (ours, theirs) in dtypes.items()
            if ours != theirs
        ]
    return problems


def raw_disagreements(pretrained: Inspection, expert: Inspection) -> list[str]:
    """Says what stops `ExpertSet.from_safetensors`, which compares the names in the files.

    Args:
      pretrained: without problems.
      expert: without problems.

    Returns:
      One line each.
    """
    try:
        ExpertSet.from_sources(
            _Header(pretrained.raw_leaves),
            [_Header(expert.raw_leaves)],
            names=["expert"],
            layout="torch",
            check_finite=False,
        )
    except ValueError as error:
        lines = [line.strip().removeprefix("expert: ") for line in str(error).splitlines()]
        return lines[1:] or lines
    return []


def merge_bytes(leaves: Mapping[str, jax.ShapeDtypeStruct], num_tasks: int) -> int:
    """Bytes that merging leaf by leaf takes: the merged model, and float32 stacks of its largest leaf.

    The stack is [T, *shape] of the experts and of their task vectors, and one leaf of the pretrained
    model.

    Args:
      leaves: of the pretrained model.
      num_tasks: T.

    Returns:
      Bytes, beside the program itself.
    """
    largest = max(int(np.prod(spec.shape)) for spec in leaves.values())
    return tree.param_bytes(dict(leaves)) + 4 * largest * (2 * num_tasks + 1)


def _headers(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
    revision: str | None,
    offline: bool,
) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    path = Path(source)
    if not path.exists():
        try:
            path = hub.find(source, root, revision, offline=True)
        except FileNotFoundError as missing:
            try:
                if offline:
                    raise missing
                return hub.header(os.fspath(source), revision)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"no such file or folder; {error}") from error
    snapshot = Snapshot(path)
    return snapshot.specs, snapshot.config


class _Header:
    """A source of which only the names, shapes and dtypes are known."""

    def __init__(self, leaves: Mapping[str, jax.ShapeDtypeStruct]):
        self.leaves = leaves

    def read(self, name: str) -> Any:
        raise ValueError(f"{name}: only its header is known")


def _raw(key: str) -> str:
    """A tensor's name as `ExpertSet.from_safetensors` has it."""
    return key.replace(".", "/")


def _unresized(
    expected: Mapping[str, jax.ShapeDtypeStruct],
    specs: Mapping[str, Any],
    architecture: Architecture,
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """DINOv2's file may hold a larger position grid than its image size needs: it is resized."""
    if architecture.model_type != "dinov2":
        return expected
    grids = [spec for name, spec in specs.items() if name.endswith("position_embeddings")]
    name = "position_embedding/embedding"
    if len(grids) != 1 or len(grids[0].shape) != 3:
        return expected
    return {**expected, name: jax.ShapeDtypeStruct(grids[0].shape[1:], expected[name].dtype)}


def summarise(inspections: Sequence[Inspection]) -> list[list[Any]]:
    """One row a checkpoint: where, architecture, tensors, dtypes, MiB, tied."""
    return [
        [
            item.where,
            item.architecture.name if item.architecture else "?",
            len(item.specs),
            ", ".join(f"{name} x {count}" for name, count in sorted(item.dtypes.items())),
            round(item.stored_bytes / 2**20, 1),
            {None: "-", True: "yes", False: "no"}[item.tied],
        ]
        for item in inspections
    ]
