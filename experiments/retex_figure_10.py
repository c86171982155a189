"""ReTeX, figure 10: the training objectives: L2, cosine, and cosine with lambda times L2.

    python experiments/retex_figure_10.py --suite=minilm_text8

By the paper's loop (Adam); the line of L2 in closed form is beside them. Takes hours on two cores.
"""

import papers
from papers import retex


def curves(config: papers.ConfigDict) -> papers.Curves:
    """Against lambda; what does not have one is a line of two points."""
    rank, weights = config.offsets.rank, (0.01, 0.1, 1.0, 10.0)
    adam = {"rank": rank, "solver": "adam"}

    def line(**options: object) -> dict[float, papers.Entry]:
        return {at: retex(**options) for at in (weights[0], weights[-1])}

    return {
        "L2, closed form": line(rank=rank),
        "L2": line(**adam),
        "cosine": line(**adam, objective="cosine"),
        "cosine + lambda L2": {
            at: retex(**adam, objective="cosine_l2", l2_weight=at) for at in weights
        },
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "lambda")
