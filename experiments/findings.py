"""What the ablations found: differences of two rows, with their intervals.

Read are the rows of the papers' scripts in experiments/results/papers/rows and the comparisons in experiments/results:
SUITE_pareto, of the means of experts of three seeds, and SUITE_compare, of one seed.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import paper_output
import papers
import retex_budget
from papers import Entry, retex

from retex_jax import evaluate


class Change(NamedTuple):
    """What is changed, the entry with the change, and that without."""

    what: str
    changed: Entry
    plain: Entry


def _of(rank: int, what: str, **options: Any) -> Change:
    return Change(f"{what}, rank {rank}", retex(rank=rank, **options), retex(rank=rank))


def changes(suite: str) -> list[Change]:
    """The ablations of a suite."""
    config = paper_output.load(suite)
    rank = config.offsets.rank
    ties = {"base": "ties", "base_options": papers.TIES.options}
    arithmetic = {"base": "task_arithmetic", "base_options": papers.TASK_ARITHMETIC.options}
    ours, plain, average = retex_budget.rows(config), Entry("dts_d"), "weight_average"
    parts = {
        label: entry for label, entry in ours.items() if label not in ("ReTeX, rank 1", "ours")
    }
    return [
        _of(1, "shared factor on the longer side", orientation="auto"),
        _of(16, "shared factor on the longer side", orientation="auto"),
        _of(16, "shared factor on the left (ReTeX-Alt)", orientation="left"),
        _of(1, "base: Task Arithmetic instead of Weight Averaging", **arithmetic),
        _of(16, "base: Task Arithmetic instead of Weight Averaging", **arithmetic),
        _of(1, "base: TIES instead of Weight Averaging", **ties),
        _of(16, "base: TIES instead of Weight Averaging", **ties),
        _of(rank, "embeddings of 4 entries", d_emb=4),
        _of(16, "layers of one shape share a factor (ReTeX-S)", form="shape_shared"),
        _of(16, "learned scales (affine form)", form="affine"),
        Change(
            "two-stage generator (ReTeX-E), rank 64 by 8, beside rank 16",
            retex(form="factorized", rank=64, task_rank=8),
            retex(rank=16),
        ),
        Change("by budget, half a percent, beside rank 1", ours["ours"], retex(rank=1)),
        Change("by budget, one percent, beside rank 4", papers.budgeted(0.01), retex(rank=4)),
        Change("by budget, four percent, beside rank 16", papers.budgeted(0.04), retex(rank=16)),
        Change(
            "by budget, one percent beside a quarter",
            papers.budgeted(0.01),
            papers.budgeted(0.0025),
        ),
        *(
            Change(f"by budget, half a percent: {label}", entry, ours["ours"])
            for label, entry in parts.items()
        ),
        Change("DTS-D without decomposition", Entry("dts_d", {"decompose": False}), plain),
        Change("DTS-D without thresholding", Entry("dts_d", {"levels": 1}), plain),
        Change("DTS-D without scaling", Entry("dts_d", {"scale": "none"}), plain),
        Change(
            "DTS-D over Weight Averaging instead of TIES",
            Entry("dts_d", {"base": average}),
            plain,
        ),
        *(
            Change(
                f"{told} of differences from Weight Averaging",
                Entry(name, {}, average),
                Entry(name),
            )
            for told, name in (("EMR", "emr"), ("T-Switch", "t_switch"))
        ),
    ]


class Source(NamedTuple):
    """Where rows lie, by their path in the repository, and the content of their results.json, one or one a seed."""

    path: str
    found: list[dict[str, Any]]


def sources(suite: str) -> list[Source]:
    """Those of a suite that are there, the most telling first."""
    results = paper_output.RESULTS.parent
    places = {
        paper_output.ROWS / f"{suite}_papers": "seed_*/results.json",
        results / f"{suite}_pareto": "results.json",
        results / f"{suite}_compare": "results.json",
    }
    return [
        Source(
            str(folder.relative_to(paper_output.ROOT)),
            [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))],
        )
        for folder, pattern in places.items()
        if folder.is_dir()
    ]


def difference(change: Change, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What a change buys.

    Args:
      change: of two entries.
      found: of a `Source`.

    Returns:
      "mean" of the difference of the tasks' normalized accuracies and "half_width" of its 95% interval, over pairs of
      task and seed; "changed" and "plain", what both store a task, of the model; "seeds", the numbers of those that
      have both rows, and "commits" of these rows. None where there is none.
    """
    pairs, numbers, sizes, commits = [], [], {}, []
    for results in found:
        rows = {row["entry"]: row for row in results["rows"]}
        if not {change.changed.name, change.plain.name} <= rows.keys():
            continue
        numbers += results.get("expert_seeds") or [results["seed"]]
        changed, plain = rows[change.changed.name], rows[change.plain.name]
        commits += [changed["commit"], plain["commit"]]
        sizes = {"changed": changed["amr"], "plain": plain["amr"]}
        pairs += [
            (changed["accuracy"][task] - plain["accuracy"][task]) / results["individual"][task]
            for task in results["tasks"]
        ]
    if not pairs:
        return None
    half_width = evaluate.spread(pairs)[1]
    return {
        "mean": sum(pairs) / len(pairs),
        "half_width": half_width,
        "seeds": numbers,
        "commits": commits,
        **sizes,
    }
