"""Our form of ReTeX, which no paper has: what each part of the offsets by budget buys, at half a percent of the model.

    python experiments/retex_budget.py --suite=minilm_text8

Each row has one option changed: bits of an entry of the factors, on which side a leaf's shared factor stands, whether
all tasks share one, whether errors count by the energy of the task's offsets, and the merged model. The paper's form of
as many bytes is the first.
"""

import papers
from papers import retex

FRACTION = 0.005


def rows(config: papers.ConfigDict) -> papers.Rows:
    """Each change alone."""
    changes = {
        "2 bits": {"bits": 2},
        "4 bits": {"bits": 4},
        "8 bits": {"bits": 8},
        "32 bits": {"bits": 32, "vector_bits": 32},
        "shared factor on the right": {"orientation": "right"},
        "one shared factor a leaf": {"sharing": "shared"},
        "tasks count alike": {"task_weights": "equal"},
        "over TIES": {"base": "ties", "base_options": papers.TIES.options},
    }
    ours = papers.budgeted(FRACTION).options
    return {
        "ReTeX, rank 1": retex(rank=1),
        "ours": retex(**ours),
        **{name: retex(**{**ours, **change}) for name, change in changes.items()},
    }


if __name__ == "__main__":
    papers.table(__file__, rows)
