"""DTS, table 11: thresholding with and without the decomposition before it.

    python experiments/dts_table_11.py --suite=minilm_text8

The paper counts three bits an element (9.37% without decomposition); here are two, as stored.
"""

import papers
from papers import Entry


def rows(config: papers.ConfigDict) -> papers.Rows:
    """DTS-D over TIES, as in the paper."""
    without = {"decompose": False}
    return {
        "DTS-T": Entry("dts_t"),
        "DTS-T, without decomposition": Entry("dts_t", without),
        "DTS-D": Entry("dts_d"),
        "DTS-D, without decomposition": Entry("dts_d", without),
    }


if __name__ == "__main__":
    papers.table(__file__, rows)
