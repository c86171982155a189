"""The released form of a run: merged model, offsets, identifier and heads in one checked artefact."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from retex_jax import artifact, offsets, tree
from retex_jax.identifier import IDENTIFIERS
from retex_jax.identifier import serialization as identifiers
from retex_jax.identifier.subspace import Signatures
from retex_jax.offsets import FitReport, OffsetState, serialization
from retex_jax.offsets.state import check_fits
from retex_jax.recovery import Head, Identifier
from retex_jax.typing import Array, Params

_PARTS = {"merged", "task_embeddings", "offsets", "identifier"}


@dataclass(frozen=True)
class Release:
    """All that recovers and identifies experts, without the experts.

    Attributes:
      state: merged model and offsets.
      identifier: its state, its layers and its kind.
      heads: task name to head, in task order; {} for a task of questions.
      metadata: facts of the run: "settings", "individual", "checkpoint_set", "commit", "results".
    """

    state: OffsetState
    identifier: Identifier
    heads: dict[str, Head]
    metadata: dict[str, Any]


def save(directory: str | os.PathLike[str], release: Release) -> int:
    """Writes artifact.safetensors and manifest.json; returns their bytes."""
    state, identifier = release.state, release.identifier
    report = state.report
    identifier_tensors, identifier_facts = identifiers.to_tensors(identifier.state)
    factors, forms = serialization.to_tensors(state.offsets)
    heads = {name: head for name, head in release.heads.items() if head}
    tensors = tree.flatten(
        {
            "merged": state.merged,
            "task_embeddings": state.task_embeddings,
            "offsets": tree.unflatten(factors),
            "identifier": tree.unflatten(identifier_tensors),
            **({"heads": heads} if heads else {}),
        }
    )
    metadata = {
        **release.metadata,
        "layout": state.layout,
        "tasks": list(release.heads),
        "headless": [name for name in release.heads if name not in heads],
        "forms": forms,
        "identifier": {
            "kind": identifier.kind,
            "layer": identifier.layer,
            "state": identifier_facts,
        },
        "report": {
            "residuals": report.residuals,
            "optima": {name: _finite(value) for name, value in report.optima.items()},
            "energies": report.energies,
        },
    }
    return artifact.save(directory, tensors, metadata)


def load(directory: str | os.PathLike[str]) -> Release:
    """Reads a release; every tensor's hash is checked. Spectra are not part of it.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged or is not a release.
    """
    tensors, metadata = artifact.load(directory)
    expected = {"layout", "tasks", "forms", "identifier", "report"}
    if missing := expected - set(metadata):
        raise ValueError(f"{directory}: the manifest lacks {sorted(missing)}: not a release")
    try:
        released = _assemble(tensors, metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}: not a release: {error}") from error
    check_fits(released.state, str(directory))
    return released


def _assemble(tensors: Mapping[str, np.ndarray], metadata: dict[str, Any]) -> Release:
    headless = set(metadata.get("headless", []))
    expected = _PARTS if set(metadata["tasks"]) == headless else {*_PARTS, "heads"}
    if missing := expected - {name.split("/")[0] for name in tensors}:
        raise ValueError(f"the tensors lack {sorted(missing)}")
    parts: Mapping[str, Any] = tree.unflatten({name: jnp.asarray(x) for name, x in tensors.items()})
    report = metadata["report"]
    optima = {name: np.nan if x is None else x for name, x in report["optima"].items()}
    state = OffsetState(
        merged=parts["merged"],
        task_embeddings=parts["task_embeddings"],
        offsets=serialization.from_tensors(tree.flatten(parts["offsets"]), metadata["forms"]),
        report=FitReport(report["residuals"], optima, report["energies"], {}),
        layout=metadata["layout"],
    )
    identifier = _identifier(tree.flatten(parts["identifier"]), metadata["identifier"])
    heads = {name: {} if name in headless else parts["heads"][name] for name in metadata["tasks"]}
    if len(heads) != state.num_tasks:
        raise ValueError(f"{len(heads)} heads of {state.num_tasks} tasks")
    return Release(state, identifier, heads, metadata)


def _identifier(tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> Identifier:
    if "kind" not in facts:  # released before there was more than one
        signatures = Signatures(tensors["centers"], tensors["bases"], facts["normalize"])
        return Identifier(signatures, facts["layer"])
    layer = facts["layer"] if isinstance(facts["layer"], int) else tuple(facts["layer"])
    return Identifier(identifiers.from_tensors(tensors, facts["state"]), layer, facts["kind"])


def add_task(
    release: Release,
    name: str,
    expert: Params,
    head: Head,
    features: Array,
    *,
    budget: float,
    **options: Any,
) -> Release:
    """Adds one expert to a release, without the others.

    Args:
      release: from `load`.
      name: of the new task.
      expert: its backbone, nested dict like the merged model.
      head: its classifier.
      features: of unlabelled inputs of the task, [n, d] or [n, L, d], float32: the merged model's, or the new
        expert's if the identifier needs the experts, from its layers (see `recovery.run`).
      budget: what its offset may take; see `offsets.add_task`.
      **options: of `offsets.add_task`.

    Returns:
      The release with the task as the last one; what it holds of the others is the same to the last bit.

    Raises:
      ValueError: if there is such a task, the identifier has to be fitted anew (a router), or as
        `offsets.add_task` and the identifier's fit.
    """
    if name in release.heads:
        raise ValueError(f"name: {name!r} is a task of the release: {sorted(release.heads)}")
    known = release.identifier
    identified = IDENTIFIERS[known.kind].add(known.state, features)
    state = offsets.add_task(release.state, expert, budget=budget, **options)
    return replace(
        release,
        state=state,
        identifier=replace(known, state=identified),
        heads={**release.heads, name: head},
    )


def remove_task(release: Release, name: str) -> Release:
    """Removes one task from a release; see `offsets.remove_task`.

    Its accuracy and its class names leave the metadata, so that another task may take the name.

    Raises:
      ValueError: if there is no such task, or it is the only one.
    """
    if name not in release.heads:
        hint = tree.did_you_mean(name, release.heads)
        raise ValueError(f"name: got {name!r}, expected one of {list(release.heads)}{hint}")
    task = list(release.heads).index(name)
    state = offsets.remove_task(release.state, task)
    others = [other for other in range(len(release.heads)) if other != task]
    known = release.identifier
    metadata = {
        key: {task: own for task, own in value.items() if task != name}
        if key in ("individual", "classes")
        else value
        for key, value in release.metadata.items()
    }
    return replace(
        release,
        state=state,
        identifier=replace(known, state=IDENTIFIERS[known.kind].take(known.state, others)),
        heads={task: head for task, head in release.heads.items() if task != name},
        metadata=metadata,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
