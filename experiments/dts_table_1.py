"""DTS, tables 1, 2, 3, 7 and 8: merged models and approximated experts, task known.

    python experiments/dts_table_1.py --suite=minilm_text8

The tables differ in their suites: --suite=vit_b32_8, vit_l14_8, roberta_base_glue8, gpt2_glue7, qwen_qa3. DTS* takes 1%
of the model a task. Routed methods see `evaluate.routed_inputs` mixed inputs of each task.
"""

import papers
from papers import TASK_ARITHMETIC, TIES, Entry


def rows(config: papers.ConfigDict) -> papers.Rows:
    """The table's methods in its order."""
    small = {"amr": 0.01}
    return {
        "Weight Averaging": Entry("weight_average"),
        "Fisher": Entry("fisher", {"num_samples": 1}),
        "RegMean": Entry("regmean"),
        "Task Arithmetic": TASK_ARITHMETIC,
        "TIES": TIES,
        "DARE + TIES": Entry("dare", {"drop": 0.5, "merge": "ties"}),
        "AdaMerging, a layer": Entry("adamerging", {"granularity": "layer"}),
        "Twin-Merging (routed)": Entry("twin"),
        "TALL-mask": Entry("tall_mask"),
        "EMR-Merging": Entry("emr"),
        "T-Switch": Entry("t_switch"),
        "DTS-T": Entry("dts_t"),
        "DTS-D": Entry("dts_d"),
        "DTS-T*": Entry("dts_t", small),
        "DTS-D*": Entry("dts_d", small),
    }


if __name__ == "__main__":
    papers.table(__file__, rows)
