"""DTS, figure 1: one task merged with each other one alone, beside the best and the worst partner.

    python experiments/dts_figure_1.py --suite=minilm_text8

The paper's tasks are SVHN and CoLA; of a suite without them it is the first.
"""

import papers
from papers import TASK_ARITHMETIC, TIES, Entry


def first(config: papers.ConfigDict) -> str:
    """The task that is merged."""
    return next((task for task in ("svhn", "cola") if task in config.tasks), config.tasks[0])


def rows(config: papers.ConfigDict) -> papers.Rows:
    """The figure's methods."""
    return {
        "Weight Averaging": Entry("weight_average"),
        "RegMean": Entry("regmean"),
        "Task Arithmetic": TASK_ARITHMETIC,
        "TIES": TIES,
        "EMR-Merging": Entry("emr"),
        "DTS-T": Entry("dts_t"),
    }


if __name__ == "__main__":
    papers.pairs(__file__, rows, first)
