"""The papers' tables and figures of fitted methods.

A script names rows (`Entry`: method, options, and the model that differences are taken from). Those that the workdir
does not hold are fitted and evaluated by `retex_jax.compare`, on experts of each seed; all scripts share the workdir,
so that a row is made once. `paper_output.ROWS` is part of the repository: from its rows a table is made again without
an expert, and another seed adds its own to them. Accuracies are of the test splits, with the task known.

ReTeX is arXiv:2606.26902; DTS is "Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging".
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import paper_output as output
import paper_pictures as pictures
from ml_collections import ConfigDict

from configs import common
from retex_jax import command_line, compare
from retex_jax.variants import Entry

TIES = Entry("ties", {"density": 0.2, "merge": "mean", "scaling": 1.0})
TASK_ARITHMETIC = Entry("task_arithmetic", {"scaling": 0.3})

Rows = Mapping[str, Entry]
"""What is said of a row, and the row."""

Curves = Mapping[str, Mapping[float, Entry]]
"""What is said of a curve, and its rows by what they differ in."""

_COLUMNS = (
    "normalized_accuracy",
    "normalized_accuracy_interval",
    "worst_normalized_accuracy",
    "adr",
    "amr",
    "bytes_per_task",
    "seconds_fit",
)


def retex(**options: Any) -> Entry:
    """ReTeX with these options."""
    return Entry("retex", options)


def budgeted(fraction: float) -> Entry:
    """ReTeX of our own form, by the part of the model that a task takes."""
    return retex(budget=fraction, **common.BUDGETED)


def ranks(config: ConfigDict) -> list[int]:
    """Powers of four below the suite's rank, and it."""
    most = config.offsets.rank
    return [*(4**n for n in range(7) if 4**n < most), most]


def configured(entry: Entry, config: ConfigDict) -> Entry:
    """With the options that the suite gives the method."""
    given = config.method_options.get(entry.method, {})
    return Entry(entry.method, {**entry.options, **given}, entry.origin)


def table(
    script: str,
    rows: Callable[[ConfigDict], Rows],
    arguments: Sequence[str] | None = None,
    tasks: Callable[[ConfigDict], Sequence[str]] = lambda config: config.tasks,
) -> None:
    """Makes a table: a CSV file with a line a row, and a picture of normalized accuracies.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: experiment to its rows.
      arguments: instead of those of the command line.
      tasks: experiment to those of its tasks that are merged.
    """

    def single(config: ConfigDict) -> Curves:
        return {label: {0.0: entry} for label, entry in rows(config).items()}

    _make(script, single, None, arguments, tasks)


def figure(
    script: str,
    curves: Callable[[ConfigDict], Curves],
    x: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """Makes a figure: a CSV file with a line a point, and the picture.

    Args:
      script: path of the script, whose docstring says what it shows.
      curves: experiment to its curves.
      x: what the points of a curve differ in; or "amr", which is measured.
      arguments: instead of those of the command line.
    """
    _make(script, curves, x, arguments)


@command_line.clear_errors()
def growth(
    script: str,
    rows: Callable[[ConfigDict], Rows],
    arguments: Sequence[str] | None = None,
) -> None:
    """Makes a figure of rows against the number of tasks: the first 2, 4, 8, ... of the suite, and all.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: experiment to its rows.
      arguments: instead of those of the command line.
    """
    args, started = output.parse(output.docstring(script), arguments), time.perf_counter()
    tasks = output.load(args.suite).tasks
    found, results = [], []
    for count in sorted({*(2**n for n in range(1, 12) if 2**n < len(tasks)), len(tasks)}):
        config = output.load(args.suite)
        config.tasks = tasks[:count]
        planned = [(label, count, entry) for label, entry in rows(config).items()]
        part = "" if count == len(tasks) else f"first_{count}"
        points, result = _compared(config, planned, args, part)
        found += points
        results.append(result)
    order = list(dict.fromkeys(label for label, _, _ in found))
    found.sort(key=lambda point: order.index(point[0]))
    _write(script, found, "num_tasks", results[-1], args, started)


@command_line.clear_errors()
def pairs(
    script: str,
    rows: Callable[[ConfigDict], Rows],
    first: Callable[[ConfigDict], str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Makes a table of one task merged with each other one alone: its accuracy beside the best and the worst partner.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: experiment to its rows.
      first: experiment to the task.
      arguments: instead of those of the command line.
    """
    args, started = output.parse(output.docstring(script), arguments), time.perf_counter()
    tasks, one = output.load(args.suite).tasks, first(output.load(args.suite))
    found: dict[str, dict[str, float]] = {}
    for other in tasks:
        if other == one:
            continue
        config = output.load(args.suite)
        config.tasks = (one, other)
        planned = [(label, 0.0, entry) for label, entry in rows(config).items()]
        points, results = _compared(config, planned, args, f"{one}_{other}")
        for label, _, row in points:
            found.setdefault(label, {})[other] = row["accuracy"][one]
        own = results["individual"][one]
    table = [["Individual", "", output.number(own), "", "", ""]]
    seeds = " ".join(map(str, args.seeds))
    for label, by_other in found.items():
        ends = [pick(by_other, key=by_other.__getitem__) for pick in (max, min)]
        shown = (text for end in ends for text in (end, output.number(by_other[end])))
        table.append([label, *shown, seeds])
    header = [one, "best with", "accuracy", "worst with", "accuracy", "seeds"]
    output.save(
        script, args, started, [header, *table], pictures.ends(found, own, Path(script).stem)
    )


@command_line.clear_errors()
def _make(
    script: str,
    curves: Callable[[ConfigDict], Curves],
    x: str | None,
    arguments: Sequence[str] | None,
    tasks: Callable[[ConfigDict], Sequence[str]] = lambda config: config.tasks,
) -> None:
    args, started = output.parse(output.docstring(script), arguments), time.perf_counter()
    config = output.load(args.suite)
    chosen = tuple(tasks(config))
    part = "" if chosen == tuple(config.tasks) else "_".join(chosen)
    config.tasks = chosen
    planned = [
        (label, at, entry)
        for label, points in curves(config).items()
        for at, entry in points.items()
    ]
    found, results = _compared(config, planned, args, part)
    _write(script, found, x, results, args, started)


def _compared(
    config: ConfigDict,
    planned: Sequence[tuple[str, float, Entry]],
    args: argparse.Namespace,
    part: str = "",
) -> tuple[pictures.Points, Mapping[str, Any]]:
    """The rows of what is planned, of experts of all seeds, and the content of results.json."""
    config.expert_seeds = tuple(args.seeds)
    if args.seeds:
        config.num_seeds = 1  # of what is random besides
    chosen = [(label, at, configured(entry, config)) for label, at, entry in planned]
    entries = {entry.name: entry for _, _, entry in chosen}
    workdir = args.workdir / f"{args.suite}_papers" / part
    results = compare.compare(config, workdir, list(entries.values()))
    if results["failed"]:
        sys.exit(f"failed: {results['failed']}")
    rows = {row["entry"]: row for row in results["rows"]}
    return [(label, at, rows[entry.name]) for label, at, entry in chosen], results


def _write(
    script: str,
    found: pictures.Points,
    x: str | None,
    results: Mapping[str, Any],
    args: argparse.Namespace,
    started: float,
) -> None:
    """Writes the CSV file and the picture, and lists the run."""
    output.save(
        script, args, started, _lines(found, x, results), pictures.rows(found, x, Path(script).stem)
    )


def _lines(found: pictures.Points, x: str | None, results: Mapping[str, Any]) -> list[list[str]]:
    """The lines of the CSV file."""
    tasks, seeds = results["tasks"], " ".join(map(str, results.get("expert_seeds", ())))
    differ = [x] if x and x != "amr" else []
    own = _scores(results["individual"], tasks)
    lines = [
        ["row", *differ, *tasks, "mean", *_COLUMNS, "seeds", "commit"],
        ["Individual", *[""] * len(differ), *own],
    ]
    for label, at, row in found:
        measures = [output.number(row.get(column)) for column in _COLUMNS]
        place = [output.number(at)] * len(differ)
        scores = _scores(row["accuracy"], tasks)
        lines.append([label, *place, *scores, *measures, seeds, row["commit"]])
    return lines


def _scores(accuracy: Mapping[str, float], tasks: Sequence[str]) -> list[str]:
    values = [accuracy[task] for task in tasks if task in accuracy]
    return [
        *(output.number(accuracy.get(task)) for task in tasks),
        output.number(output.mean(values)),
    ]
