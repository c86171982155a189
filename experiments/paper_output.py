"""What every script of the papers' tables and figures has: suites, seeds, the command line, and what it writes."""

import argparse
import csv
import importlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the experiment files are no part of the package

from ml_collections import ConfigDict  # noqa: E402

from retex_jax.huggingface import MODEL_NAME  # noqa: E402

RESULTS = ROOT / "experiments/results/papers"
ROWS = RESULTS / "rows"
INDEX = ROOT / "experiments/README.md"


def load(suite: str) -> ConfigDict:
    """The experiment file of this name."""
    return importlib.import_module(f"configs.{suite}").get_config()


def mean(values: Sequence[float]) -> float:
    """Of one number or more."""
    return sum(values) / len(values)


def save(
    script: str,
    args: argparse.Namespace,
    started: float,
    lines: Sequence[Sequence[str]],
    picture: str,
) -> None:
    """Writes the CSV file and the picture, and lists the run where they are part of the repository.

    Args:
      script: path of the script, after which they are called.
      args: of `parse`.
      started: `time.perf_counter()` when it started.
      lines: of the CSV file.
      picture: an SVG document.
    """
    folder, name = args.out / args.suite, Path(script).stem
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    (folder / f"{name}.svg").write_text(f"{picture}\n", encoding="utf-8")
    print(f"wrote {folder / name}.csv and .svg")
    if args.out == RESULTS:
        shows = docstring(script).splitlines()[0]
        command = f"python experiments/{name}.py --suite={args.suite}"
        seeds = f" --seeds {' '.join(map(str, args.seeds))}" if args.seeds else ""
        _list(command, seeds, shows, time.perf_counter() - started)


def docstring(script: str) -> str:
    """What a script says of itself."""
    return Path(script).read_text(encoding="utf-8").split('"""')[1]


def parse(shows: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of every script: suite, seeds, workdir and out.

    Args:
      shows: what --help says.
      arguments: instead of those of the command line.
    """
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
        help="of the experts, 0 if not given; one whose rows are not kept needs its experts, which are fine-tuned "
        "first where they are not cached; experts that are snapshots have none",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        default=ROWS,
        help=f"where rows are kept, {_shown(ROWS)} if not given",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help=f"receives SUITE/NAME.csv and .svg, {_shown(RESULTS)} if not given",
    )
    args = parser.parse_args(arguments)
    if args.seeds is None:
        args.seeds = [] if load(args.suite).model.name == MODEL_NAME else [0]
    return args


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def number(value: Any) -> str:
    """Six digits; nothing for None."""
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
