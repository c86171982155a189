"""The released form of a run: merged model, offsets, signatures and heads in one checked artefact."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from retex_jax import artifact, offsets, tree
from retex_jax.identifier import subspace
from retex_jax.identifier.subspace import Signatures
from retex_jax.offsets import FitReport, OffsetState, serialization
from retex_jax.recovery import Head, Identifier
from retex_jax.typing import Array, Params

_PARTS = {"merged", "task_embeddings", "offsets", "identifier", "heads"}


@dataclass(frozen=True)
class Release:
    """All that recovers and identifies experts, without the experts.

    Attributes:
      state: merged model and offsets.
      identifier: signatures and their layer.
      heads: task name to head, in task order.
      metadata: facts of the run: "settings", "individual", "checkpoint_set", "commit", "results".
    """

    state: OffsetState
    identifier: Identifier
    heads: dict[str, Head]
    metadata: dict[str, Any]


def save(directory: str | os.PathLike[str], release: Release) -> int:
    """Writes artifact.safetensors and manifest.json; returns their bytes."""
    state, signatures = release.state, release.identifier.signatures
    report = state.report
    factors, forms = serialization.to_tensors(state.offsets)
    tensors = tree.flatten(
        {
            "merged": state.merged,
            "task_embeddings": state.task_embeddings,
            "offsets": tree.unflatten(factors),
            "identifier": {"centers": signatures.centers, "bases": signatures.bases},
            "heads": release.heads,
        }
    )
    metadata = {
        **release.metadata,
        "layout": state.layout,
        "tasks": list(release.heads),
        "forms": forms,
        "identifier": {"layer": release.identifier.layer, "normalize": signatures.normalize},
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
    folders = {name.split("/")[0] for name in tensors}
    if missing := _PARTS - folders:
        raise ValueError(f"{directory}: the tensors lack {sorted(missing)}: not a release")
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
    signatures = Signatures(
        parts["identifier"]["centers"],
        parts["identifier"]["bases"],
        metadata["identifier"]["normalize"],
    )
    heads = {name: parts["heads"][name] for name in metadata["tasks"]}
    return Release(state, Identifier(signatures, metadata["identifier"]["layer"]), heads, metadata)


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
      features: of unlabelled inputs of the task, [n, d], float32: the merged model's, from the identifier's layer
        (see `recovery.run`).
      budget: what its offset may take; see `offsets.add_task`.
      **options: of `offsets.add_task`.

    Returns:
      The release with the task as the last one; what it holds of the others is the same to the last bit.

    Raises:
      ValueError: if there is such a task, or as `offsets.add_task` and `subspace.fit`.
    """
    if name in release.heads:
        raise ValueError(f"name: {name!r} is a task of the release: {sorted(release.heads)}")
    state = offsets.add_task(release.state, expert, budget=budget, **options)
    signatures = release.identifier.signatures
    own = subspace.fit(
        [features],
        signatures.bases.shape[1],
        center=bool(np.any(signatures.centers)),
        normalize=signatures.normalize,
    )
    return _with(
        release,
        state,
        jnp.concatenate([signatures.centers, own.centers]),
        jnp.concatenate([signatures.bases, own.bases]),
        {**release.heads, name: head},
    )


def remove_task(release: Release, name: str) -> Release:
    """Removes one task from a release; see `offsets.remove_task`.

    Raises:
      ValueError: if there is no such task, or it is the only one.
    """
    if name not in release.heads:
        hint = tree.did_you_mean(name, release.heads)
        raise ValueError(f"name: got {name!r}, expected one of {list(release.heads)}{hint}")
    task = list(release.heads).index(name)
    signatures = release.identifier.signatures
    return _with(
        release,
        offsets.remove_task(release.state, task),
        jnp.delete(signatures.centers, task, axis=0),
        jnp.delete(signatures.bases, task, axis=0),
        {task: head for task, head in release.heads.items() if task != name},
    )


def _with(
    release: Release, state: OffsetState, centers: Array, bases: Array, heads: dict[str, Head]
) -> Release:
    signatures = replace(release.identifier.signatures, centers=centers, bases=bases)
    identifier = Identifier(signatures, release.identifier.layer)
    return replace(release, state=state, identifier=identifier, heads=heads)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
