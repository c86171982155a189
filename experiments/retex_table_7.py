"""ReTeX, table 7 and figure 15: inputs of tasks that are not known, told from the others by the identifier.

    python experiments/retex_table_7.py --suite=minilm_text8

Means over the tasks that are held out in turn (`identify.unseen` names others), by the entropy of the scores and by the
residual. The threshold takes 95% of validation inputs as known. The histograms are in the report of retex_jax.identify.
"""

from collections.abc import Mapping
from typing import Any

import paper_output
import paper_programs

COLUMNS = ("accuracy", "balanced_accuracy", "recall", "f1", "auroc", "aupr")


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A row an identifier and measure."""
    split: dict[str, list[Mapping[str, Any]]] = {}
    for found in results["out_of_distribution"]:
        split.setdefault(f"{found['identifier']}, {found['measure']}", []).append(found)
    return {
        label: {name: paper_output.mean([one[name] for one in each]) for name in COLUMNS}
        for label, each in split.items()
    }


if __name__ == "__main__":
    paper_programs.identified(__file__, rows)
