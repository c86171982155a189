"""DTS, tables 15 to 18: every method on task vectors and on differences from Weight Averaging.

    python experiments/dts_table_15.py --suite=minilm_text8

The tables differ in their suites: --suite=vit_b32_8, vit_l14_8, roberta_base_glue8, gpt2_glue7.
"""

import papers
from papers import TASK_ARITHMETIC, TIES, Entry


def rows(config: papers.ConfigDict) -> papers.Rows:
    """In pairs; Task Arithmetic on differences is Weight Averaging, as these sum to zero."""
    pairs = {"Task Arithmetic": TASK_ARITHMETIC, "TIES": TIES}
    pairs |= {"EMR-Merging": Entry("emr"), "T-Switch": Entry("t_switch")}
    made = {"Weight Averaging": Entry("weight_average")}
    for name, entry in pairs.items():
        made[f"{name}, task"] = entry
        made[f"{name}, difference"] = Entry(entry.method, entry.options, "weight_average")
    made["DTS, task"] = Entry("dts_t")
    made["DTS, difference"] = Entry("dts_d", {"base": "weight_average"})
    return made


if __name__ == "__main__":
    papers.table(__file__, rows)
