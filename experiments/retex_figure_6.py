"""ReTeX, figure 6: accuracy against memory, of every method that keeps something a task.

    python experiments/retex_figure_6.py --suite=minilm_text8

Beside the paper's two forms stands ours, by its budget.
"""

import papers
from papers import Entry, budgeted, retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """Methods of one size are points."""
    fractions = (0.0025, 0.005, 0.01, 0.02, 0.04)
    ranks = papers.ranks(config)
    return {
        "EMR-Merging": {0: Entry("emr")},
        "TALL-mask": {0: Entry("tall_mask")},
        "T-Switch": {0: Entry("t_switch")},
        "DTS-T": {size: Entry("dts_t", {"amr": size}) for size in fractions},
        "ReTeX": {rank: retex(rank=rank) for rank in ranks},
        "ReTeX-E": {
            rank: retex(form="factorized", rank=rank, task_rank=rank // 8)
            for rank in ranks
            if rank >= 8
        },
        "ReTeX by budget, 3 bits": {size: budgeted(size) for size in fractions},
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "amr")
