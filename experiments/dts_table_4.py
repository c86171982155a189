"""DTS, tables 4, 5, 6, 9 and 10: tasks whose experts are left out, and what the others give on them.

    python experiments/dts_table_4.py --suite=minilm_text8

The tables differ in their suites. `unseen` of the suite says which tasks are left out, in how many splits; heads of
unseen tasks are the same for every row. Table 6, other approximations under DTS' weights, is among the rows.
"""

from collections.abc import Mapping
from typing import Any

import paper_programs


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracies of unseen and of seen tasks, means over the splits."""
    return {
        row["rule"]: {"seen": row["seen_accuracy"], "unseen": row["unseen_accuracy"]}
        for row in results["rows"]
    }


if __name__ == "__main__":
    paper_programs.transferred(__file__, rows)
