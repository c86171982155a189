"""ReTeX, tables 2 and 6: accuracy against the number of tasks, task known.

    python experiments/retex_table_2.py --suite=minilm_text8

The paper's suite is vit_b32_30; table 6 has ReTeX alone, of several seeds.
"""

import papers
from papers import BUDGET, TASK_ARITHMETIC, TIES, Entry, retex


def rows(config: papers.ConfigDict) -> papers.Rows:
    """The table's methods that know the task."""
    return {
        "Weight Averaging": Entry("weight_average"),
        "Task Arithmetic": TASK_ARITHMETIC,
        "TIES": TIES,
        "EMR-Merging": Entry("emr"),
        f"ReTeX, rank {config.offsets.rank}": retex(rank=config.offsets.rank),
        "ReTeX, 1% of the model": retex(budget=0.01, **BUDGET),
    }


if __name__ == "__main__":
    papers.growth(__file__, rows)
