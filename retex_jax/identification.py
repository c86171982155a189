"""Identifiers of an experiment: the choice of layers and options on validation inputs, fits, and result rows.

Labels are used nowhere. Which task an input is of is known of calibration inputs, which are training inputs, of
validation inputs, on which layers and options are chosen, and of test inputs when they are counted.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from retex_jax import (
    data,
    experiment,
    logging,
    metrics,
    offsets,
    recovery,
    search,
    task_features,
)
from retex_jax.identifier import IDENTIFIERS, selection
from retex_jax.identifier.selection import FeaturesByLayer, Layer
from retex_jax.task_features import TaskFeatures
from retex_jax.typing import ProgressFn


class Candidate(NamedTuple):
    """An identifier, its layers and options.

    Attributes:
      kind: name in IDENTIFIERS.
      layer: one, or several.
      options: of its fit.
      validation_accuracy: the mean of the tasks' own identification accuracy; None where nothing was chosen.
      forward: what it costs; see `selection.forward_fraction`.
    """

    kind: str
    layer: Layer
    options: Mapping[str, Any]
    validation_accuracy: float | None
    forward: float


def choose(
    kind: str,
    features: TaskFeatures,
    num_layers: int,
    *,
    max_forward: float = math.inf,
    fixed: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    progress: ProgressFn | None = None,
) -> search.SearchResult:
    """Tries each layer alone and the first ones together with the options of `selection.GRIDS`.

    Args:
      kind: name in IDENTIFIERS.
      features: from `extract`.
      num_layers: blocks of the model.
      max_forward: layers that cost more are not tried.
      fixed: options that are not tried.
      key: typed PRNG key of every fit.
      progress: called with (candidates done, candidates) after each.

    Returns:
      As `selection.select`.

    Raises:
      ValueError: as `selection.select`.
    """
    layers, grid = _plan(kind, features, num_layers, max_forward, fixed)
    return selection.select(
        kind,
        features.calibration,
        features.validation,
        grid,
        layers=layers,
        key=key,
        fixed=fixed,
        progress=progress,
    )


def num_candidates(
    kind: str,
    features: TaskFeatures,
    num_layers: int,
    *,
    max_forward: float = math.inf,
    fixed: Mapping[str, Any] | None = None,
) -> int:
    """How many candidates `choose` tries."""
    layers, grid = _plan(kind, features, num_layers, max_forward, fixed)
    return len(layers) * math.prod(len(values) for values in grid.values())


def _plan(
    kind: str,
    features: TaskFeatures,
    num_layers: int,
    max_forward: float,
    fixed: Mapping[str, Any] | None,
) -> tuple[list[Layer], dict[str, Sequence[Any]]]:
    """The layers and the grid of options to try."""
    tasks = len(next(iter(features.calibration.values())))
    layers = [
        layer
        for layer in selection.candidates(list(features.calibration))
        if cost(kind, layer, num_layers, tasks) <= max_forward
    ]
    grid = selection.GRIDS[kind]
    return layers, {name: values for name, values in grid.items() if name not in (fixed or {})}


def cost(kind: str, layer: Layer, num_layers: int, num_tasks: int) -> float:
    """`selection.forward_fraction` of an identifier for T tasks."""
    experts = num_tasks if IDENTIFIERS[kind].needs_experts else 0
    return selection.forward_fraction(layer, num_layers, experts)


def best(
    kind: str,
    found: search.SearchResult,
    num_layers: int,
    num_tasks: int,
    *,
    max_forward: float = math.inf,
    fixed: Mapping[str, Any] | None = None,
) -> Candidate | None:
    """The best candidate on validation inputs that costs at most `max_forward`; None if there is none."""
    trial = selection.best_trial(
        found, lambda layer: cost(kind, layer, num_layers, num_tasks) <= max_forward
    )
    if trial is None:
        return None
    options = {name: value for name, value in trial.options.items() if name != "layer"}
    layer, score = trial.options["layer"], trial.score
    assert score is not None
    spent = cost(kind, layer, num_layers, num_tasks)
    return Candidate(kind, layer, {**(fixed or {}), **options}, score, spent)


def fit(candidate: Candidate, calibration: FeaturesByLayer, *, key: jax.Array | None = None) -> Any:
    """Fits a candidate to calibration features; returns the identifier's state."""
    features = selection.stacked(calibration, candidate.layer)
    return IDENTIFIERS[candidate.kind].fit(features, key=key, **candidate.options)


def row(
    candidate: Candidate,
    features: TaskFeatures,
    names: Sequence[str],
    *,
    num_calibration: int,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Fits a candidate and identifies the test inputs.

    Args:
      candidate: what to fit.
      features: with test inputs.
      names: of the tasks.
      num_calibration: calibration inputs of each task to fit it to, the first.
      key: typed PRNG key of the fit.

    Returns:
      What results.json tells of it: "accuracy", the mean of the tasks' own; "task_accuracy"; "confusion", counts [T, T]
      (row = true task); "bytes", for all tasks; "forward"; "seconds_fit", and "seconds_identify", of all test inputs
      without the forward pass.

    Raises:
      ValueError: as the identifier's fit.
    """
    method = IDENTIFIERS[candidate.kind]
    cut = {
        layer: [task[:num_calibration] for task in tasks]
        for layer, tasks in features.calibration.items()
    }
    started = time.perf_counter()
    state = jax.block_until_ready(fit(candidate, cut, key=key))
    fitted = time.perf_counter()
    test = selection.stacked(features.test, candidate.layer)
    identified = [np.asarray(method.scores(state, task)).argmax(axis=1) for task in test]
    finished = time.perf_counter()
    true_tasks = np.repeat(np.arange(len(names)), [len(task) for task in identified])
    confusion = metrics.confusion_matrix(np.concatenate(identified), true_tasks, len(names))
    own = confusion.diagonal() / confusion.sum(axis=1)
    return {
        "identifier": candidate.kind,
        "layer": candidate.layer,
        "options": dict(candidate.options),
        "num_calibration": num_calibration,
        "needs": method.needs,
        "validation_accuracy": candidate.validation_accuracy,
        "accuracy": float(own.mean()),
        "task_accuracy": dict(zip(names, own.tolist(), strict=True)),
        "confusion": confusion.tolist(),
        "bytes": method.bytes(state),
        "forward": candidate.forward,
        "seconds_fit": fitted - started,
        "seconds_identify": finished - fitted,
    }


def obtain(
    settings: experiment.Settings,
    model: Any,
    state: offsets.OffsetState,
    tasks: Sequence[data.Task],
    key: jax.Array,
) -> tuple[recovery.Identifier, dict[str, Any]]:
    """Fits the identifier as it is set, or with what is best on validation inputs.

    Returns:
      The identifier; and for results.json and the manifest its kind, layers, options, "forward" (see
      `selection.forward_fraction`), whether it was "searched", and its "validation_accuracy" if so.
    """
    if settings["identifier"]["search"]:
        return search_for(settings, model, state, tasks, key)
    identifier = fit_as_set(settings, model, state, tasks, key)
    candidate = Candidate(
        identifier.kind,
        identifier.layer,
        experiment.identifier_options(settings["identifier"]),
        None,
        cost(identifier.kind, identifier.layer, model.config.num_layers, len(tasks)),
    )
    return identifier, {"searched": False, **_told(candidate)}


def search_for(
    settings: experiment.Settings,
    model: Any,
    state: offsets.OffsetState,
    tasks: Sequence[data.Task],
    key: jax.Array,
) -> tuple[recovery.Identifier, dict[str, Any]]:
    """Chooses layers and options of the identifier on validation inputs; see `obtain`."""
    spec, num_layers = settings["identifier"], model.config.num_layers
    kind, fixed = spec["kind"], spec["options"]
    experts = IDENTIFIERS[kind].needs_experts
    features = task_features.extract(
        model,
        lambda task: offsets.recover(state, task) if experts else state.merged,
        tasks,
        range(num_layers + 1),
        spec["num_calibration"],
        settings["evaluate"]["batch_size"],
        experts=experts,
        test=False,
    )
    limit = spec["max_forward"] * (len(tasks) if experts else 1)
    total = num_candidates(kind, features, num_layers, max_forward=limit, fixed=fixed)
    with logging.progress(total, f"choose identifier, {kind}") as bar:
        found = choose(
            kind,
            features,
            num_layers,
            max_forward=limit,
            fixed=fixed,
            key=key,
            progress=lambda done, _: bar.update(done),
        )
    chosen = best(kind, found, num_layers, len(tasks), fixed=fixed)
    assert chosen is not None
    fitted = fit(chosen, features.calibration, key=key)
    return recovery.Identifier(fitted, chosen.layer, kind), {"searched": True, **_told(chosen)}


def fit_as_set(
    settings: experiment.Settings,
    model: Any,
    state: offsets.OffsetState,
    tasks: Sequence[data.Task],
    key: jax.Array,
) -> recovery.Identifier:
    """Fits the identifier on features of unlabelled training inputs, the merged model's or the experts'."""
    spec = settings["identifier"]
    method, layer = IDENTIFIERS[spec["kind"]], experiment.identifier_layer(spec)
    features = [
        recovery.run(
            model,
            offsets.recover(state, index) if method.needs_experts else state.merged,
            data.take(task.splits["train"], np.arange(spec["num_calibration"])),
            settings["evaluate"]["batch_size"],
            layer=layer,
        )
        for index, task in enumerate(tasks)
    ]
    fitted = method.fit(features, key=key, **experiment.identifier_options(spec))
    return recovery.Identifier(fitted, layer, spec["kind"])


def _told(candidate: Candidate) -> dict[str, Any]:
    """A candidate in JSON's types."""
    layer, options = candidate.layer, dict(candidate.options)
    layers = list(layer) if isinstance(layer, tuple) else layer
    return {**candidate._asdict(), "layer": layers, "options": options}
