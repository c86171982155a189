"""ReTeX, figure 14: ReTeX-S, whose layers of one shape share a factor, beside ReTeX.

python experiments/retex_figure_14.py --suite=minilm_text8
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """Against what a task stores."""
    ranks = papers.ranks(config)
    return {
        "ReTeX": {rank: retex(rank=rank) for rank in ranks},
        "ReTeX-S": {rank: retex(rank=rank, form="shape_shared") for rank in ranks},
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "amr")
