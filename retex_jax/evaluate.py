"""Rows of results.json and the tables of them; as a program, evaluates a released artefact.

    python -m retex_jax.evaluate --artifact=workdirs/demo

Every row says whether the task and the head were known; see `retex_jax.protocols`. Of a release with other tasks than
its experiment, those of both are evaluated: a task that was added is named and left out, as neither its data nor its
own expert's accuracy are known, but inputs may be identified as of it, which is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from scipy import special

from retex_jax import (
    command_line,
    data,
    experiment,
    logging,
    metrics,
    offsets,
    preflight,
    protocols,
    recovery,
    release,
    tree,
)
from retex_jax.identifier import IDENTIFIERS
from retex_jax.methods import METHODS

MEASURES = {
    measure.__name__: measure
    for measure in (
        metrics.normalized_accuracy,
        metrics.worst_normalized_accuracy,
        metrics.accuracy_ratio,
        metrics.adr,
    )
}
"""What a row tells of all tasks, by its name in the row."""


def result_row(
    method: str,
    variant: str,
    accuracy: Mapping[str, float],
    individual: Mapping[str, float],
    *,
    task_known: bool,
    head_known: bool,
    needs: str,
    bytes_per_task: float,
    model_bytes: int,
    identification_accuracy: float | None = None,
    seconds_fit: float,
) -> dict[str, Any]:
    """One row of results.json.

    `amr` is a fraction, and bytes are measured from what is stored. What is relative to the individual
    accuracies is None where one of them is 0.
    """
    return {
        "method": method,
        "variant": variant,
        "task_known": task_known,
        "head_known": head_known,
        "needs": needs,
        "accuracy": dict(accuracy),
        **_relative(accuracy, individual),
        "amr": metrics.amr(bytes_per_task, model_bytes),
        "bytes_per_task": bytes_per_task,
        "identification_accuracy": identification_accuracy,
        "seconds_fit": seconds_fit,
        "peak_rss_bytes": logging.peak_rss_bytes(),
    }


def known_row(
    suite: protocols.Suite, method: str, variant: str, state: Any, seconds_fit: float
) -> dict[str, Any]:
    """Evaluates a fitted method with the task (and so the head) known; a row of results.json."""
    recover = METHODS[method].recover
    return result_row(
        method,
        variant,
        protocols.known(suite, lambda task: recover(state, task)),
        suite.individual,
        task_known=True,
        head_known=True,
        needs=METHODS[method].needs,
        bytes_per_task=METHODS[method].extra_bytes(state) / len(suite.heads),
        model_bytes=tree.param_bytes(recover(state, 0)),
        seconds_fit=seconds_fit,
    )


def routed_row(
    suite: protocols.Suite,
    method: str,
    variant: str,
    state: Any,
    model: Any,
    seconds_fit: float,
) -> dict[str, Any]:
    """Evaluates a method that mixes experts by input, on shuffled inputs of all tasks with known heads.

    Args:
      suite: what to evaluate on, see `protocols.first_tests`.
      method: with `predict`.
      variant: for the row.
      state: fitted.
      model: functions of the model, such as a `Calibration`.
      seconds_fit: for the row.

    Returns:
      A row of results.json, with "individual", the experts' accuracies on the same inputs.
    """
    entry = METHODS[method]
    if any(recovery.has_choices(task.splits["test"]) for task in suite.tasks):
        raise ValueError(
            f"method: {method!r} gives features of inputs, expected tasks with heads, not questions"
        )
    mixed = protocols.mixed_test(suite.tasks, suite.seed)
    read = suite.model.example_batch()
    inputs = {name: array for name, array in mixed.items() if name in read}
    # Without what fills the last batch up: the mixture of DaWin weighs a batch as a whole.
    batches = (
        {name: array[valid] for name, array in batch.items()}
        for batch, valid in data.padded_batches(inputs, suite.batch_size)
    )
    features = np.concatenate([np.asarray(entry.predict(state, model, batch)) for batch in batches])
    accuracy = {}
    for index, task in enumerate(suite.tasks):
        rows = mixed["task"] == index
        outputs = recovery.logits(suite.heads[index], features[rows])
        accuracy[task.name] = metrics.score(task.metric, outputs, mixed["label"][rows])
    num_inputs = max(len(task.splits["test"]["label"]) for task in suite.tasks)
    row = result_row(
        method,
        f"{variant}, {num_inputs} inputs a task".removeprefix(", "),
        accuracy,
        suite.individual,
        task_known=False,
        head_known=True,
        needs=entry.needs,
        bytes_per_task=entry.extra_bytes(state) / len(suite.tasks),
        model_bytes=tree.param_bytes(entry.recover(state, 0)),
        seconds_fit=seconds_fit,
    )
    return {**row, "individual": dict(suite.individual)}


def over_seeds(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """One row for several seeds: of one method, or of the experts; or for several splits of tasks.

    Args:
      rows: one a seed, from `result_row`; those of splits may have different tasks.
      seeds: their numbers.

    Returns:
      The row of the mean accuracies, measures and seconds, with "seeds", "normalized_accuracies" of each,
      "normalized_accuracy_std" and "normalized_accuracy_interval", see `spread`. What is None for any seed is
      None. A task's accuracy is the mean over the rows that have it.
    """
    first = rows[0]
    accuracy = {
        task: float(np.mean([row["accuracy"][task] for row in rows if task in row["accuracy"]]))
        for task in dict.fromkeys(task for row in rows for task in row["accuracy"])
    }
    means = {
        name: None if None in values else float(np.mean(values))
        for name in (*MEASURES, "bytes_per_task", "amr", "seconds_fit")
        for values in [[row[name] for row in rows]]
    }
    scores = [row["normalized_accuracy"] for row in rows]
    deviation, half_width = spread(scores)
    return {
        **first,
        "accuracy": accuracy,
        **means,
        "normalized_accuracies": scores,
        "normalized_accuracy_std": deviation,
        "normalized_accuracy_interval": half_width,
        "seeds": list(seeds),
        "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows),
    }


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """How far repeats differ.

    Args:
      values: one a repeat.

    Returns:
      Their standard deviation (of a sample: the divisor is one less than their number), and half the width of the
      95% confidence interval of their mean (Student's t). Both are None for one value, or where one is None.
    """
    known = [value for value in values if value is not None]
    if len(values) < 2 or len(known) < len(values):
        return None, None
    deviation = float(np.std(known, ddof=1))
    quantile = special.stdtrit(len(known) - 1, 0.975)
    return deviation, float(quantile * deviation / len(known) ** 0.5)


def _relative(accuracy: Mapping[str, float], individual: Mapping[str, float]) -> dict[str, Any]:
    """What is relative to the individual accuracies; None where one of them is 0."""
    sound = min(individual.values()) > 0
    return {
        name: measure(accuracy, individual) if sound else None for name, measure in MEASURES.items()
    }


def unknown_rows(
    suite: protocols.Suite,
    variant: str,
    state: offsets.OffsetState,
    identifier: recovery.Identifier,
    seconds_fit: float,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Evaluates recovered experts with the task unknown, under both protocols.

    Args:
      suite: what to evaluate on.
      variant: for the rows.
      state: merged model and offsets.
      identifier: its state, its layers and its kind.
      seconds_fit: for the rows.

    Returns:
      Two rows of results.json (head known, nothing known), and the identification confusion matrix
      [T, T] (row = true task), T being the number of heads.
    """
    mixed = protocols.mixed_test(suite.tasks, suite.seed)
    inputs = {name: array for name, array in mixed.items() if name not in ("task", "label")}
    prediction = protocols.predict_unknown(suite.model, state, identifier, inputs, suite.batch_size)
    names = [task.name for task in suite.tasks]
    with_head, without_head, confusion = protocols.unknown(
        prediction,
        suite.heads,
        names,
        mixed["task"],
        mixed["label"],
        [task.metric for task in suite.tasks],
    )
    method = IDENTIFIERS[identifier.kind]
    stored = offsets.offset_bytes(state) + method.bytes(identifier.state)
    rows = [
        result_row(
            "retex",
            variant,
            accuracy,
            suite.individual,
            task_known=False,
            head_known=head_known,
            needs=method.needs,
            bytes_per_task=stored / len(suite.heads),
            model_bytes=tree.param_bytes(state.merged),
            identification_accuracy=float(confusion.trace() / confusion.sum()),
            seconds_fit=seconds_fit,
        )
        for head_known, accuracy in ((True, with_head), (False, without_head))
    ]
    return rows, confusion


def print_results(
    names: Sequence[str], individual: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Prints accuracies a task, and one line a method, as two tables."""
    main = max(
        (row for row in rows if row["method"] == "retex" and row["task_known"]),
        key=lambda row: row["bytes_per_task"],
    )
    shown = {"individual": individual}
    for row in rows:
        if row["method"] == "weight_average":
            shown["averaged"] = row["accuracy"]
        elif row is main:
            shown["recovered"] = row["accuracy"]
        elif not row["task_known"]:
            shown["routed, own head" if row["head_known"] else "nothing known"] = row["accuracy"]
    logging.table(
        "test accuracy",
        ["task", *shown],
        [[name, *(accuracy[name] for accuracy in shown.values())] for name in names],
    )
    print_methods(rows)


def print_methods(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints one line a row of results.json."""
    logging.table(
        "methods",
        ["method", "task", "norm. acc", "worst", "AMR", "KiB/task", "ident.", "fit s"],
        [
            [
                f"{row['method']} {row['variant']}".strip(),
                "known" if row["task_known"] else "own head" if row["head_known"] else "unknown",
                _with_spread(row),
                row.get("worst_normalized_accuracy"),
                row["amr"],
                round(row["bytes_per_task"] / 1024),
                "" if row["identification_accuracy"] is None else row["identification_accuracy"],
                f"{row['seconds_fit']:.1f}",
            ]
            for row in rows
        ],
    )


def _with_spread(row: Mapping[str, Any]) -> Any:
    """The normalized accuracy; as text with its standard deviation where it has one."""
    mean, spread = row["normalized_accuracy"], row.get("normalized_accuracy_std")
    return mean if spread is None else f"{mean:.3f} +- {spread:.3f}"


def known_tasks(released: release.Release) -> list[str]:
    """The names of a release's tasks that its experiment has; the others, which were added, are named in a warning.

    Raises:
      ValueError: if there are none, or one comes after a task that was added.
    """
    metadata, names = released.metadata, list(released.heads)
    known = [
        name
        for name in names
        if name in metadata["settings"]["tasks"] and name in metadata["individual"]
    ]
    added = [name for name in names if name not in known]
    lacking = "neither data nor the own expert's accuracy are known of them"
    if not known or names[: len(known)] != known:
        raise ValueError(
            f"tasks: {added} of {names} were added, expected the others first: {lacking}"
        )
    if added:
        logging.warning(f"tasks: {added} were added to the release and are left out: {lacking}")
    return known


def without_experts(settings: experiment.Settings) -> experiment.Settings:
    """The settings with the pretrained snapshot in place of the experts', if there are such: they are not read."""
    if not experiment.from_snapshots(settings):
        return settings
    spec = settings["experts"]
    repositories = [spec["pretrained"]] * len(spec["repositories"])
    return {**settings, "experts": {**spec, "repositories": repositories}}


def main() -> None:
    """Evaluates an artefact on its tasks, see `known_tasks`, and prints the results."""
    released = release.load(_ARTIFACT.value)
    settings, names = without_experts(released.metadata["settings"]), known_tasks(released)
    preflight.check(settings)
    experiment.start()
    experiment.fetch(settings, announce=logging.info)
    backbone, tasks = experiment.load(settings)
    loaded = {task.name: task for task in tasks}
    suite = protocols.Suite(
        backbone.model,
        [loaded[name] for name in names],
        list(released.heads.values()),
        {name: released.metadata["individual"][name] for name in names},
        settings["evaluate"]["batch_size"],
        settings["seed"],
    )
    variant, seconds = released.metadata["variant"], released.metadata["seconds_fit"]
    row = known_row(suite, "retex", variant, released.state, seconds)
    rows, _ = unknown_rows(suite, variant, released.state, released.identifier, seconds)
    print_results(names, suite.individual, [row, *rows])
    logging.info("individual accuracies and fit seconds are as recorded in the artefact")


if __name__ == "__main__":
    _ARTIFACT = flags.DEFINE_string("artifact", None, "folder with artifact.safetensors")
    command_line.run(main, required="artifact")
