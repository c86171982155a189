"""ReTeX, figure 5: ReTeX-E at a fixed rank, against its inner rank and beside ReTeX.

python experiments/retex_figure_5.py --suite=minilm_text8
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """Against what a task stores, as inner ranks do not compare with ranks."""
    rank = config.offsets.rank
    inner = papers.ranks(config)[:-1]
    return {
        "ReTeX": {size: retex(rank=size) for size in papers.ranks(config)},
        f"ReTeX-E, rank {rank}": {
            size: retex(form="factorized", rank=rank, task_rank=size) for size in inner
        },
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "amr")
