"""ReTeX, figure 3: recovered accuracy against rank, over three merged models.

python experiments/retex_figure_3.py --suite=minilm_text8
"""

import papers
from papers import TASK_ARITHMETIC, TIES, retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """A curve a merged model."""
    bases = {
        "Weight Averaging": {},
        "Task Arithmetic": {"base": "task_arithmetic", "base_options": TASK_ARITHMETIC.options},
        "TIES": {"base": "ties", "base_options": TIES.options},
    }
    return {
        name: {rank: retex(rank=rank, **base) for rank in papers.ranks(config)}
        for name, base in bases.items()
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "rank")
