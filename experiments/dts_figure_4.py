"""DTS, figure 4: accuracy against the additional memory rate, of every method that keeps something a task.

python experiments/dts_figure_4.py --suite=minilm_text8
"""

import papers
from papers import Entry


def curves(config: papers.ConfigDict) -> papers.Curves:
    """Methods of one size are points; the paper's suite is roberta_base_glue8."""
    ratios = (0.05, 0.1, 0.2, 0.5)
    return {
        "EMR-Merging": {0: Entry("emr")},
        "TALL-mask": {0: Entry("tall_mask")},
        "T-Switch": {0: Entry("t_switch")},
        "SVD": {ratio: Entry("svd", {"rank_ratio": ratio}) for ratio in ratios[:3]},
        "DTS-T": {ratio: Entry("dts_t", {"rank_ratio": ratio}) for ratio in ratios},
        "DTS-D": {ratio: Entry("dts_d", {"rank_ratio": ratio}) for ratio in ratios},
    }


if __name__ == "__main__":
    papers.figure(__file__, curves, "amr")
