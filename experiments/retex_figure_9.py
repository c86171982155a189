"""ReTeX, figure 9: recovered accuracy against rank; what a rank stores is in the CSV file.

python experiments/retex_figure_9.py --suite=minilm_text8
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """The shared factor on the right, as in the paper, and on each leaf's longer side."""
    return {
        name: {rank: retex(rank=rank, **options) for rank in papers.ranks(config)}
        for name, options in (("ReTeX", {}), ("ReTeX, longer side shared", {"orientation": "auto"}))
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "rank")
