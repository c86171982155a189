"""ReTeX, figure 11: ReTeX beside ReTeX-Alt, whose shared factor stands on the left.

python experiments/retex_figure_11.py --suite=minilm_text8
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """And the side that is best for each leaf, which is not the paper's."""
    sides = {
        "ReTeX": {},
        "ReTeX-Alt": {"orientation": "left"},
        "longer side shared": {"orientation": "auto"},
    }
    return {
        name: {rank: retex(rank=rank, **side) for rank in papers.ranks(config)}
        for name, side in sides.items()
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "amr")
