"""Features of a suite's inputs for identifiers: one pass of the merged model, or of each expert, for all layers."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from retex_jax import data, recovery
from retex_jax.identifier.selection import FeaturesByLayer
from retex_jax.typing import Params, ProgressFn

SPLITS = {"calibration": "train", "validation": "val", "test": "test"}
"""Field of `TaskFeatures` to the split that it is of."""


class TaskFeatures(NamedTuple):
    """Features of all tasks, by layer.

    Attributes:
      calibration: T arrays [n_t, d] a layer, of the first training inputs.
      validation: T arrays [n_t, d], or [T, n_t, d], of every expert.
      test: like `validation`; without layers where it was not asked for.
    """

    calibration: FeaturesByLayer
    validation: FeaturesByLayer
    test: FeaturesByLayer


def extract(
    model: Any,
    params: Callable[[int], Params],
    tasks: Sequence[data.Task],
    layers: Sequence[int],
    num_calibration: int,
    batch_size: int,
    *,
    experts: bool = False,
    test: bool = True,
    progress: ProgressFn | None = None,
) -> TaskFeatures:
    """Runs a model, or every expert, once over calibration, validation and test inputs.

    Args:
      model: Linen module.
      params: task id -> parameters: the merged ones for all, or those of the task's expert.
      tasks: with splits "train", "val" and "test".
      layers: 0 for the pooled output, i for the mean token after block i.
      num_calibration: the first training inputs of each task, or all where there are fewer.
      batch_size: B.
      experts: whether validation and test inputs run through all experts, and calibration inputs through their own.
      test: whether test inputs are wanted.
      progress: called with (inputs run, inputs) after each split of a task.

    Returns:
      The features; a pooled output that equals the last block's mean token is left out.
    """
    jobs = _jobs(tasks, num_calibration, experts, test)
    total, done = sum(job.count for job in jobs), 0
    found: dict[tuple[str, int, int], dict[int, np.ndarray]] = {}
    for owner, own_jobs in itertools.groupby(jobs, lambda job: job.owner):
        own = params(owner)
        for _, field, index, count in own_jobs:
            inputs = data.take(tasks[index].splits[SPLITS[field]], np.arange(count))
            found[field, index, owner] = recovery.run_layers(model, own, inputs, batch_size, layers)
            done += count
            if progress:
                progress(done, total)
    kept = [layer for layer in layers if not _repeats(layer, layers, found)]

    def collect(field: str) -> dict[int, list[np.ndarray]]:
        if not any(key[0] == field for key in found):
            return {}
        several = experts and field != "calibration"
        return {
            layer: [
                np.stack([found[field, index, owner][layer] for owner in range(len(tasks))])
                if several
                else found[field, index, index][layer]
                for index in range(len(tasks))
            ]
            for layer in kept
        }

    return TaskFeatures(*(collect(field) for field in SPLITS))


def num_inputs(
    tasks: Sequence[data.Task], num_calibration: int, *, experts: bool = False, test: bool = True
) -> int:
    """How many inputs `extract` runs; those that run through all experts count for each."""
    return sum(job.count for job in _jobs(tasks, num_calibration, experts, test))


class _Job(NamedTuple):
    """Inputs of one split of a task, the first ones, and whose parameters they run through."""

    owner: int
    field: str
    task: int
    count: int


def _jobs(
    tasks: Sequence[data.Task], num_calibration: int, experts: bool, test: bool
) -> list[_Job]:
    """All jobs, those of one owner in a row."""
    jobs = []
    for field, split in SPLITS.items():
        for index, task in enumerate(tasks):
            count = len(task.splits[split]["label"])
            count = min(num_calibration, count) if field == "calibration" else count
            owners = range(len(tasks)) if experts and field != "calibration" else (index,)
            jobs += [_Job(owner, field, index, count) for owner in owners]
    kept = (job for job in jobs if test or job.field != "test")
    return sorted(kept, key=lambda job: job.owner)


def _repeats(
    layer: int, layers: Sequence[int], found: Mapping[Any, Mapping[int, np.ndarray]]
) -> bool:
    last = max(layers)
    return layer == 0 < last and all(np.array_equal(x[0], x[last]) for x in found.values())
