"""DTS, table 14: experts of one task on different data sets.

    python experiments/dts_table_14.py --suite=minilm_text8

Digits and letters of several data sets, sentiments of several domains, paraphrases of several collections.
"""

import papers
from papers import TASK_ARITHMETIC, TIES, Entry

ALIKE = (
    ("movie", "product", "editorial", "tweet"),
    ("optdigits", "mnist_5k"),
    ("mnist", "svhn"),
    ("mrpc", "stsb", "qqp"),
)


def tasks(config: papers.ConfigDict) -> tuple[str, ...]:
    """Those of the suite that are alike."""
    for names in ALIKE:
        if set(names) <= set(config.tasks):
            return names
    raise SystemExit(f"{config.name}: has none of {ALIKE}")


def rows(config: papers.ConfigDict) -> papers.Rows:
    """The table's methods in its order."""
    return {
        "DARE + TIES": Entry("dare", {"drop": 0.5, "merge": "ties"}),
        "Task Arithmetic": TASK_ARITHMETIC,
        "TIES": TIES,
        "DTS-T": Entry("dts_t"),
        "DTS-D": Entry("dts_d"),
    }


if __name__ == "__main__":
    papers.table(__file__, rows, tasks=tasks)
