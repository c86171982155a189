"""What the scripts of the papers' tables and figures share: suites, rows, CSV files, pictures and their list.

A script names rows (`Entry`: method, options, and the model that differences are taken from). Those that the workdir
does not hold are fitted and evaluated by `retex_jax.compare`, on experts of each seed; all scripts share the workdir, so
that a row is made once. That of `ROWS` is part of the repository: from its rows a table is made again without an expert,
and another seed adds its own to them. Accuracies are of the test splits, with the task known.

ReTeX is arXiv:2606.26902; DTS is "Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging".
"""

import argparse
import csv
import importlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the experiment files are no part of the package

import paper_pictures as pictures  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from configs import common  # noqa: E402
from retex_jax import command_line, compare, experiment, files  # noqa: E402
from retex_jax.huggingface import MODEL_NAME  # noqa: E402
from retex_jax.identify.__main__ import identify  # noqa: E402
from retex_jax.unseen.__main__ import evaluate_unseen  # noqa: E402
from retex_jax.variants import Entry  # noqa: E402

RESULTS = ROOT / "experiments/results/papers"
ROWS = RESULTS / "rows"
INDEX = ROOT / "experiments/README.md"
SEEDS = [0, 1, 2]

TIES = Entry("ties", {"density": 0.2, "merge": "mean", "scaling": 1.0})
TASK_ARITHMETIC = Entry("task_arithmetic", {"scaling": 0.3})

Rows = Mapping[str, Entry]
"""What is said of a row, and the row."""

Curves = Mapping[str, Mapping[float, Entry]]
"""What is said of a curve, and its rows by what they differ in."""

FoundRows = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, float]]]
"""Content of results.json to what is said of a row, column and number."""

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


def load(suite: str) -> ConfigDict:
    """The experiment file of this name."""
    return importlib.import_module(f"configs.{suite}").get_config()


def mean(values: Sequence[float]) -> float:
    """Of one number or more."""
    return sum(values) / len(values)


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
    args, started = _parse(_docstring(script), arguments), time.perf_counter()
    tasks = load(args.suite).tasks
    found, results = [], []
    for count in sorted({*(2**n for n in range(1, 12) if 2**n < len(tasks)), len(tasks)}):
        config = load(args.suite)
        config.tasks = tasks[:count]
        planned = [(label, count, entry) for label, entry in rows(config).items()]
        part = "" if count == len(tasks) else f"first_{count}"
        points, result = _compared(config, planned, args, part)
        found += points
        results.append(result)
    order = list(dict.fromkeys(label for label, _, _ in found))
    found.sort(key=lambda point: order.index(point[0]))
    _write(script, found, "num_tasks", results[-1], args, started)


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
    args, started = _parse(_docstring(script), arguments), time.perf_counter()
    tasks, one = load(args.suite).tasks, first(load(args.suite))
    found: dict[str, dict[str, float]] = {}
    for other in tasks:
        if other == one:
            continue
        config = load(args.suite)
        config.tasks = (one, other)
        planned = [(label, 0.0, entry) for label, entry in rows(config).items()]
        points, results = _compared(config, planned, args, f"{one}_{other}")
        for label, _, row in points:
            found.setdefault(label, {})[other] = row["accuracy"][one]
        own = results["individual"][one]
    table = [["Individual", "", _number(own), "", ""]]
    for label, by_other in found.items():
        ends = [pick(by_other, key=by_other.__getitem__) for pick in (max, min)]
        table.append([label, *(text for end in ends for text in (end, _number(by_other[end])))])
    header = [one, "best with", "accuracy", "worst with", "accuracy"]
    _save(script, args, started, [header, *table], pictures.ends(found, own, Path(script).stem))


def identified(script: str, rows: FoundRows, arguments: Sequence[str] | None = None) -> None:
    """Makes a table of what `retex_jax.identify` finds, on experts of each seed.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: content of its results.json to what is said of a row, column and number; where all columns are numbers
        the picture has a curve a row.
      arguments: instead of those of the command line.
    """

    def run(config: ConfigDict, workdir: Path) -> Mapping[str, Any]:
        most = config.identifier.num_calibration
        config.identify.calibration_sizes = tuple(2**n for n in range(5, 12) if 2**n <= most)
        return identify(config, workdir)

    programmed(script, rows, "identify", run, arguments)


def transferred(script: str, rows: FoundRows, arguments: Sequence[str] | None = None) -> None:
    """Makes a table of what `retex_jax.unseen` finds, on experts of each seed; as `identified`."""
    programmed(script, rows, "unseen", evaluate_unseen, arguments)


def programmed(
    script: str,
    rows: FoundRows,
    name: str,
    run: Callable[[ConfigDict, Path], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Makes a table of what a program finds, on experts of each seed.

    What lies in the workdir is taken as it is, if it is of these experts and no part of it failed or is missing.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: what the program returns to what is said of a row, column and number.
      name: of the program, in its workdirs.
      run: experiment and workdir to what it has found.
      arguments: instead of those of the command line.
    """
    args, started = _parse(_docstring(script), arguments), time.perf_counter()
    repeats = []
    for seed in args.seeds or [0]:
        config = load(args.suite)
        config.seed = seed
        workdir = args.workdir / f"{args.suite}_{name}/seed_{seed}"
        repeats.append(rows(_finished(config, workdir) or run(config, workdir)))
    first = repeats[0]
    columns = list(dict.fromkeys(column for row in first.values() for column in row))
    means = {
        label: {column: mean([found[label][column] for found in repeats]) for column in row}
        for label, row in first.items()
    }
    seeds = " ".join(map(str, args.seeds))
    lines = [
        [label, *(_number(row.get(column)) for column in columns), seeds]
        for label, row in means.items()
    ]
    picture = pictures.columns(means, Path(script).stem)
    _save(script, args, started, [["row", *columns, "seeds"], *lines], picture)


def _finished(config: ConfigDict, workdir: Path) -> Mapping[str, Any] | None:
    """What a program left in its workdir, if it ended and was of these experts."""
    path, settings = workdir / "results.json", command_line.as_dict(config)
    if not path.is_file():
        return None
    known = files.read_json(path)
    parts = [split["rows"].keys() for split in known.get("splits", ())]
    is_whole = not known.get("failed") and all(part == parts[0] for part in parts)
    is_ours = known["checkpoint_set"] == experiment.checkpoint_set(settings)
    return known if is_whole and is_ours else None


def _make(
    script: str,
    curves: Callable[[ConfigDict], Curves],
    x: str | None,
    arguments: Sequence[str] | None,
    tasks: Callable[[ConfigDict], Sequence[str]] = lambda config: config.tasks,
) -> None:
    args, started = _parse(_docstring(script), arguments), time.perf_counter()
    config = load(args.suite)
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
    chosen = [(label, at, _configured(entry, config)) for label, at, entry in planned]
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
    _save(
        script, args, started, _lines(found, x, results), pictures.rows(found, x, Path(script).stem)
    )


def _save(
    script: str,
    args: argparse.Namespace,
    started: float,
    lines: Sequence[Sequence[str]],
    picture: str,
) -> None:
    folder, name = args.out / args.suite, Path(script).stem
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    (folder / f"{name}.svg").write_text(f"{picture}\n", encoding="utf-8")
    print(f"wrote {folder / name}.csv and .svg")
    if args.out == RESULTS:
        shows = _docstring(script).splitlines()[0]
        command = f"python experiments/{name}.py --suite={args.suite}"
        seeds = "" if args.seeds in ([], SEEDS) else f" --seeds {' '.join(map(str, args.seeds))}"
        _list(command, seeds, shows, time.perf_counter() - started)


def _docstring(script: str) -> str:
    return Path(script).read_text(encoding="utf-8").split('"""')[1]


def _parse(shows: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    suites = sorted(
        path.stem
        for path in (ROOT / "configs").glob("*.py")
        if path.stem != "common" and not path.stem.startswith("finetune_")
    )
    parser = argparse.ArgumentParser(
        description=shows, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite",
        default="minilm_text8",
        choices=suites,
        metavar="NAME",
        help="an experiment of configs/: " + ", ".join(suites),
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="of the experts, 0 1 2 where none are given; experts that are snapshots have none",
    )
    parser.add_argument(
        "--workdir", type=Path, default=ROWS, help="where rows are kept"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="receives SUITE/NAME.csv and .svg"
    )
    args = parser.parse_args(arguments)
    if args.seeds is None:
        args.seeds = [] if load(args.suite).model.name == MODEL_NAME else SEEDS
    return args


def _configured(entry: Entry, config: ConfigDict) -> Entry:
    """With the options that the suite gives the method."""
    given = config.method_options.get(entry.method, {})
    return Entry(entry.method, {**entry.options, **given}, entry.origin)


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
        measures = [_number(row.get(column)) for column in _COLUMNS]
        place = [_number(at)] * len(differ)
        scores = _scores(row["accuracy"], tasks)
        lines.append([label, *place, *scores, *measures, seeds, row["commit"]])
    return lines


def _scores(accuracy: Mapping[str, float], tasks: Sequence[str]) -> list[str]:
    values = [accuracy[task] for task in tasks if task in accuracy]
    return [*(_number(accuracy.get(task)) for task in tasks), _number(mean(values))]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"


def _list(command: str, seeds: str, shows: str, seconds: float) -> None:
    """Enters the run into experiments/README.md, in place of an earlier one of whatever seeds."""
    line = f"| `{command}{seeds}` | {seconds / 60:.1f} min | {shows} |"
    before, lines, after = re.split(
        r"(?<=<!-- begin runs -->\n)|(?=<!-- end runs -->)", INDEX.read_text(encoding="utf-8")
    )
    header, kept = lines.splitlines()[:2], lines.splitlines()[2:]
    kept = [known for known in kept if not known.startswith((f"| `{command}`", f"| `{command} "))]
    body = "\n".join([*header, *sorted([*kept, line])])
    INDEX.write_text(f"{before}{body}\n{after}", encoding="utf-8")
