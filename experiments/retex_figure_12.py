"""ReTeX, figures 12 and 13: how many tasks of test inputs are identified, against calibration inputs a task.

    python experiments/retex_figure_12.py --suite=minilm_text8

Of every kind of identifier the layers and options that are best on validation inputs, whatever they cost.
"""

from collections.abc import Mapping
from typing import Any

import paper_programs


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A curve a kind."""
    return {
        found["identifier"]: found["accuracy"]
        for found in results["calibration_sizes"]
        if found["limit"] is None
    }


if __name__ == "__main__":
    paper_programs.identified(__file__, rows)
