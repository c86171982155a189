"""The papers' tables and figures of what other programs find, and of what follows from an experiment file alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import paper_output as output
import paper_pictures as pictures
from ml_collections import ConfigDict

from retex_jax import command_line, experiment, files
from retex_jax.identify.__main__ import identify
from retex_jax.unseen.__main__ import evaluate_unseen
from retex_jax.unseen.__main__ import identity as unseen_identity

Numbers = Mapping[str, Mapping[str, float]]
"""What is said of a row, column and number."""

FoundRows = Callable[[Mapping[str, Any]], Numbers]
"""Content of results.json to its numbers."""


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


@command_line.clear_errors()
def programmed(
    script: str,
    rows: FoundRows,
    name: str,
    run: Callable[[ConfigDict, Path], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
    unit: str | None = None,
) -> None:
    """Makes a table of what a program finds, on experts of each seed.

    What lies in the workdir is taken as it is, if it is of these experts and no part of it failed or is missing.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: what the program returns to what is said of a row, column and number.
      name: of the program, in its workdirs.
      run: experiment and workdir to what it has found.
      arguments: instead of those of the command line.
      unit: what the picture says of the numbers, if they are no fractions.
    """
    args, started = output.parse(output.docstring(script), arguments), time.perf_counter()
    repeats = []
    for seed in args.seeds or [0]:
        config = output.load(args.suite)
        config.seed = seed
        workdir = args.workdir / f"{args.suite}_{name}/seed_{seed}"
        repeats.append(rows(_finished(config, workdir) or run(config, workdir)))
    first = repeats[0]
    columns = list(dict.fromkeys(column for row in first.values() for column in row))
    means = {
        label: {column: output.mean([found[label][column] for found in repeats]) for column in row}
        for label, row in first.items()
    }
    seeds = " ".join(map(str, args.seeds))
    lines = [
        [label, *(output.number(row.get(column)) for column in columns), seeds]
        for label, row in means.items()
    ]
    picture = pictures.columns(means, Path(script).stem, unit)
    output.save(script, args, started, [["row", *columns, "seeds"], *lines], picture)


def _finished(config: ConfigDict, workdir: Path) -> Mapping[str, Any] | None:
    """What a program left in its workdir, if it ended and was of these experts."""
    path, settings = workdir / "results.json", command_line.as_dict(config)
    if not path.is_file():
        return None
    known = files.read_json(path)
    parts = [split["rows"].keys() for split in known.get("splits", ())]
    is_whole = not known.get("failed") and all(part == parts[0] for part in parts)
    is_ours = known["checkpoint_set"] == experiment.checkpoint_set(settings)
    if "identity" in known:  # of unseen tasks, whose rows depend on more than the experts
        is_ours = is_ours and known["identity"] == unseen_identity(settings)
    return known if is_whole and is_ours else None


@command_line.clear_errors()
def stated(
    script: str,
    rows: Callable[[ConfigDict], Numbers],
    unit: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """Makes a table of what follows from an experiment file.

    Args:
      script: path of the script, whose docstring says what it shows.
      rows: experiment to its numbers.
      unit: what the picture says of the numbers.
      arguments: instead of those of the command line.
    """
    args, started = output.parse(output.docstring(script), arguments), time.perf_counter()
    args.seeds = []
    found = rows(output.load(args.suite))
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    lines = [
        [label, *(output.number(row.get(column)) for column in columns)]
        for label, row in found.items()
    ]
    picture = pictures.columns(found, Path(script).stem, unit)
    output.save(script, args, started, [["row", *columns], *lines], picture)
