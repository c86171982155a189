"""DTS, table 13: sensitivity to r, the part of the rank that is kept.

python experiments/dts_table_13.py --suite=minilm_text8
"""

import papers
from papers import Entry


def curves(config: papers.ConfigDict) -> papers.Curves:
    """DTS-D as in the paper, over TIES and over Weight Averaging, and DTS-T."""
    ratios = (0.05, 0.1, 0.2, 0.5, 1.0)
    forms = {
        "DTS-D": Entry("dts_d"),
        "DTS-D from Weight Averaging": Entry("dts_d", {"base": "weight_average"}),
        "DTS-T": Entry("dts_t"),
    }
    return {
        name: {ratio: Entry(form.method, {**form.options, "rank_ratio": ratio}) for ratio in ratios}
        for name, form in forms.items()
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "r")
