"""ReTeX, figure 4: recovered accuracy against the size of the task embeddings.

python experiments/retex_figure_4.py --suite=minilm_text8
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """From T - 1 embeddings on it is the closed form: differences from Weight Averaging sum to zero."""
    rank = config.offsets.rank
    count = len(config.tasks)
    sizes = sorted({*(2**n for n in range(8) if 2**n < count), count - 1, count})
    return {f"ReTeX, rank {rank}": {size: retex(rank=rank, d_emb=size) for size in sizes}}


if __name__ == "__main__":
    papers.figure(__file__, curves, "d_emb")
