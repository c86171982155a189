"""ReTeX, tables 1, 2, 3 and 8: merged models and recovered experts, task known.

    python experiments/retex_table_1.py --suite=minilm_text8

The tables differ in their suites: --suite=vit_b32_8 and its like, vit_b32_30, roberta_base_glue8, gpt2_glue7. Their
halves with unknown tasks are of retex_jax.train. ReTeX of 1% of the model is not the paper's.
"""

import papers
from papers import TASK_ARITHMETIC, TIES, Entry, budgeted, retex


def rows(config: papers.ConfigDict) -> papers.Rows:
    """The table's methods in its order."""
    return {
        "Weight Averaging": Entry("weight_average"),
        "Task Arithmetic": TASK_ARITHMETIC,
        "TIES": TIES,
        "Consensus TA": Entry("consensus"),
        "EMR-Merging": Entry("emr"),
        f"ReTeX, rank {config.offsets.rank}": retex(rank=config.offsets.rank),
        "ReTeX, 1% of the model": budgeted(0.01),
    }


if __name__ == "__main__":
    papers.table(__file__, rows)
