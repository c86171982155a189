"""ReTeX, figure 16: how many inputs the training-free router identifies, by the layer whose features it reads.

    python experiments/retex_figure_16.py --suite=minilm_text8

The paper's Gaussians of each task, on its own expert's features (T passes up to the layer), beside one covariance for
all tasks on the merged model's features (one pass). Validation inputs, on which the paper chooses the layer; of each
layer the best options.
"""

from collections.abc import Mapping
from typing import Any

import paper_programs

KINDS = {"mahalanobis": "experts' features", "shared_mahalanobis": "merged model's features"}


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A curve a kind."""
    return {
        label: {
            str(layer): max(_scores(results["trials"][kind], layer))
            for layer in range(1, results["num_layers"] + 1)
        }
        for kind, label in KINDS.items()
        if kind in results["trials"]
    }


def _scores(trials: list[Mapping[str, Any]], layer: int) -> list[float]:
    return [
        trial["score"]
        for trial in trials
        if trial["options"]["layer"] == layer and trial["score"] is not None
    ]


if __name__ == "__main__":
    paper_programs.identified(__file__, rows)
