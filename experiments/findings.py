"""What the ablations found: differences of two rows of the papers' scripts, with their intervals.

Read are the rows in experiments/results/papers/rows, which these scripts make.
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
    ours, plain = retex_budget.rows(config), Entry("dts_d")
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
            f"two-stage generator (ReTeX-E), rank {rank} by 16, beside rank 16",
            retex(form="factorized", rank=rank, task_rank=16),
            retex(rank=16),
        ),
        Change("by budget, half a percent, beside rank 1", ours["ours"], retex(rank=1)),
        *(
            Change(f"by budget, half a percent: {label}", entry, ours["ours"])
            for label, entry in parts.items()
        ),
        Change("DTS-D without decomposition", Entry("dts_d", {"decompose": False}), plain),
        Change("DTS-D without thresholding", Entry("dts_d", {"levels": 1}), plain),
        Change("DTS-D without scaling", Entry("dts_d", {"scale": "none"}), plain),
        Change(
            "DTS-D over Weight Averaging instead of TIES",
            Entry("dts_d", {"base": "weight_average"}),
            plain,
        ),
    ]


def folder(suite: str) -> str:
    """Where a suite's rows lie, by its path in the repository."""
    return str((paper_output.ROWS / f"{suite}_papers").relative_to(paper_output.ROOT))


def seeds(suite: str) -> list[dict[str, Any]]:
    """What was found on the experts of each seed; the content of their results.json."""
    paths = sorted((paper_output.ROOT / folder(suite)).glob("seed_*/results.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def difference(change: Change, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What a change buys.

    Args:
      change: of two entries.
      found: by `seeds`.

    Returns:
      "mean" of the difference of the tasks' normalized accuracies and "half_width" of its 95% interval, over pairs of
      task and seed; "changed" and "plain", what both store a task, of the model; "seeds", the numbers of those that
      have both rows. None where there is none.
    """
    pairs, numbers, sizes = [], [], {}
    for results in found:
        rows = {row["entry"]: row for row in results["rows"]}
        if not {change.changed.name, change.plain.name} <= rows.keys():
            continue
        numbers.append(results["seed"])
        changed, plain = rows[change.changed.name], rows[change.plain.name]
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
        **sizes,
    }
