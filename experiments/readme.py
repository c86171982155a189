"""Writes the figures of README.md and of experiments/docs from the committed results.

    python experiments/readme.py            # rewrites the pages and the picture
    python experiments/readme.py --check    # changes nothing; shows what differs, and exits with 1

A page has a table of `readme_blocks` between two lines, "<!-- begin NAME -->" and "<!-- end NAME -->".
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import picture
from compared import KEPT_APART, SUITES
from readme_blocks import BLOCKS, ROOT, entry, row

MARKED = re.compile(r"(<!-- begin (\w+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """README.md and the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "experiments/docs").glob("*.md"))]


def render(text: str) -> str:
    """A page with what belongs between its marks.

    Raises:
      ValueError: if a name is unknown, or a mark has no partner.
    """
    marks = re.findall(r"<!-- (begin|end) (\w+) -->", text)
    paired = [
        mark for match in MARKED.finditer(text) for mark in (("begin", match[2]), ("end", match[2]))
    ]
    if marks != paired:
        raise ValueError(f"marks: got {marks}, expected each begin to be followed by its end")
    if unknown := sorted({name for _, name in marks} - set(BLOCKS)):
        raise ValueError(f"marks: got {unknown}, expected some of {sorted(BLOCKS)}")
    return MARKED.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[4]}", text)


def points() -> picture.Points:
    """What the picture shows: by suite and curve, bytes a task and normalized accuracy."""

    def curve(suite: str, *labels: str) -> list[tuple[float, float]]:
        found = [entry(suite, KEPT_APART[label]) for label in labels]
        return sorted((row["amr"], row["normalized_accuracy"]) for row in found if row)

    ranks = [label for label in KEPT_APART if label.startswith("ReTeX, rank")]
    budgets = [label for label in KEPT_APART if label.startswith("ReTeX by budget")]
    named = {name: [name] for name in ("SVD", "T-Switch", "EMR", "TALL-mask")}
    curves = {
        "ReTeX by budget": budgets,
        "ReTeX by rank": ranks,
        "DTS-T": ["DTS-T, at most one percent", "DTS-T"],
        **named,
    }
    return {
        suite: {
            "Weight Averaging": [(0.0, row(suite, "weight_average")["normalized_accuracy"])],
            **{name: curve(suite, *labels) for name, labels in curves.items()},
        }
        for suite in SUITES
    }


def main() -> int:
    """Rewrites, or checks, all pages and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, show what differs")
    args = parser.parse_args()
    stale = 0
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if old == new:
            continue
        name = str(path.relative_to(ROOT))
        stale += 1
        if args.check:
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), name, "results", "", "", 0, ""
            )
            print("\n".join(lines))
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {name}")
    if not picture.is_current(ROOT / picture.PATH, points()):
        stale += 1
        if args.check:
            print(f"{picture.PATH}: drawn from other results")
        else:
            picture.draw(ROOT / picture.PATH, points())
            print(f"wrote {picture.PATH}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
