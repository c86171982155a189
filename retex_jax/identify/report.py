"""What `retex_jax.identify` tells: parts of results.json, tables on the terminal, and the page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retex_jax import evaluate, experiment, logging, plots, report, search
from retex_jax.identifier.held_out import Detection

_FIGURES = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "aupr")


def detection_row(kind: str, detection: Detection, names: Sequence[str]) -> dict[str, Any]:
    """A detection for results.json, without its measures."""
    return {
        "identifier": kind,
        "unseen": [names[task] for task in detection.unseen],
        "measure": detection.measure,
        **detection.figures,
    }


def trials(found: search.SearchResult) -> list[dict[str, Any]]:
    """All candidates of a search: their options, scores, and errors where one could not be fitted."""
    return [
        {
            "options": dict(trial.options),
            "score": trial.score,
            "task_scores": list(trial.task_scores),
            "error": trial.error,
        }
        for trial in found.trials
    ]


def gap(
    oracle: Mapping[str, Any], head_known: Mapping[str, Any], nothing_known: Mapping[str, Any]
) -> dict[str, float] | None:
    """Where the normalized accuracy goes, from the experts' own, which is 1, to that with nothing known.

    Args:
      oracle: row of the recovered experts with the task known.
      head_known: row with the backbone routed.
      nothing_known: row with the head routed too.

    Returns:
      "recovery": what the oracle lacks; "routed_backbone": what wrong backbones under right heads cost;
      "routed_head": what wrong heads cost besides. Their sum is 1 less what is reached with nothing known. None where
      an expert's accuracy is 0.
    """
    reached = [row["normalized_accuracy"] for row in (oracle, head_known, nothing_known)]
    if None in reached:
        return None
    names = ("recovery", "routed_backbone", "routed_head")
    return {
        name: before - after
        for name, before, after in zip(names, [1.0, *reached], reached, strict=False)
    }


def print_results(results: Mapping[str, Any]) -> None:
    """Prints identifiers, accuracies a task, calibration sizes, held-out tasks and the recovered experts."""
    for title, _, columns, rows, _ in _sections(results, ()):
        logging.table(title, columns, rows)
    evaluate.print_methods(results["rows"])


def write(
    path: Path,
    results: Mapping[str, Any],
    detections: Sequence[tuple[str, Detection]],
    settings: experiment.Settings,
) -> None:
    """Writes the page: the tables, a confusion matrix of each identifier, a histogram of each held-out task."""
    main = _recommended(results)
    shown = [(kind, found) for kind, found in detections if kind == main["identifier"]]
    confusion = [
        (f"Identified by {_name(row)}", np.asarray(row["confusion"]))
        for row in results["identifiers"]
    ]
    report.write(
        path,
        results,
        confusion=confusion,
        seconds=results["seconds"],
        config_text=json.dumps(settings, indent=1),
        sections=_sections(results, shown),
    )


def _sections(
    results: Mapping[str, Any], shown: Sequence[tuple[str, Detection]]
) -> list[report.Section]:
    """The tables, with histograms of some detections."""
    names, rows = results["tasks"], results["identifiers"]
    sections = [
        report.Section(
            "Identifiers",
            "Layers and options were chosen on validation inputs; accuracy is of test inputs, the mean of the tasks' "
            "own. Forward is blocks run / blocks of a forward pass. The recommended one, marked *, is the best on "
            "validation inputs of those within the limit.",
            ["identifier", "limit", "validation", "test", "forward", "KiB", "fit s", "needs"],
            [
                [
                    _name(row) + (" *" if row["recommended"] else ""),
                    row["limit"],
                    row["validation_accuracy"],
                    row["accuracy"],
                    row["forward"],
                    round(row["bytes"] / 1024),
                    row["seconds_fit"],
                    row["needs"],
                ]
                for row in rows
            ],
        ),
        report.Section(
            "Identification of each task",
            "Fraction of a task's test inputs that are identified as its own.",
            ["task", *(_short(row) for row in rows)],
            [[task, *(row["task_accuracy"][task] for row in rows)] for task in names],
        ),
    ]
    if swept := results["calibration_sizes"]:
        sizes = list(swept[0]["accuracy"])
        sections.append(
            report.Section(
                "Calibration inputs a task",
                "Test accuracy with the same layers and options, fitted to other numbers of inputs; all inputs of a "
                "task that has fewer.",
                ["identifier", *sizes],
                [[_short(row), *row["accuracy"].values()] for row in swept],
            )
        )
    target = f"{100 * results['target']:g}%"
    sections.append(
        report.Section(
            "Inputs of no known task",
            "Each row holds tasks out: the identifier knows the others only. The threshold lets "
            f"{target} of the known tasks' validation inputs pass. Positive: of a held-out task.",
            ["identifier", "held out", "measure", *_FIGURES],
            _detection_rows(results["out_of_distribution"]),
            tuple(_histogram(kind, found, names) for kind, found in shown),
        )
    )
    if results["gap"]:
        sections.append(
            report.Section(
                "Where accuracy is lost",
                "Of the normalized accuracy, 1 for the experts themselves: by recovery (the oracle knows each task), "
                "by wrong backbones under right heads, and by wrong heads besides.",
                ["lost by", "normalized accuracy"],
                [[name.replace("_", " "), lost] for name, lost in results["gap"].items()],
            )
        )
    return sections


def _detection_rows(found: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """One row a detection, and their mean by identifier and measure."""
    rows = [
        [row["identifier"], ", ".join(row["unseen"]), row["measure"], *(row[x] for x in _FIGURES)]
        for row in found
    ]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["identifier"], row["measure"]), []).append(row)
    means = [
        [kind, "mean", measure, *(float(np.mean([row[x] for row in group])) for x in _FIGURES)]
        for (kind, measure), group in groups.items()
    ]
    return rows + means


def _histogram(kind: str, found: Detection, names: Sequence[str]) -> tuple[str, str, str]:
    unseen = ", ".join(names[task] for task in found.unseen)
    title = f"{found.measure} of {kind}, {unseen} unknown".capitalize()
    text = (
        f"AUROC {found.figures['auroc']:.3f}; what is right of the threshold is taken as unknown."
    )
    svg = plots.histogram(
        found.inside, found.outside, threshold=found.figures["threshold"], title=title
    )
    return title, text, svg


def _recommended(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in results["identifiers"] if row["recommended"])


def _name(row: Mapping[str, Any]) -> str:
    """The identifier with its layers and options."""
    layer = row["layer"]
    blocks = "pooled" if layer == 0 else f"layers {layer}" if isinstance(layer, list) else layer
    where = blocks if isinstance(blocks, str) else f"layer {blocks}"
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    return f"{row['identifier']} {where}, {options}".removesuffix(", ")


def _short(row: Mapping[str, Any]) -> str:
    limit = "" if row["limit"] is None else f" <= {row['limit']:g}"
    return f"{row['identifier']}{limit}"
