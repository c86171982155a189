"""ReTeX, figure 8: offsets alone beside the affine form, whose scales gamma are learned.

python experiments/retex_figure_8.py --suite=minilm_text8
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """Against what a task stores: gamma takes the pretrained model besides, once for all tasks."""
    ranks = papers.ranks(config)
    return {
        "offsets": {rank: retex(rank=rank) for rank in ranks},
        "affine": {rank: retex(rank=rank, form="affine") for rank in ranks},
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "amr")
