"""DTS, table 12: without thresholding (one magnitude a sign) and without scaling (magnitudes of 1).

    python experiments/dts_table_12.py --suite=minilm_text8

Besides: the mean in place of the root mean square, and groups of each singular vector in place of a whole matrix'.
"""

import papers
from papers import Entry

_CHANGES = {
    "": {},
    ", without thresholding": {"levels": 1},
    ", without scaling": {"scale": "none"},
    ", mean magnitudes": {"scale": "mean"},
    ", groups a vector": {"grouping": "vector"},
}


def rows(config: papers.ConfigDict) -> papers.Rows:
    """Each change alone."""
    return {
        f"{name}{change}": Entry(method, options)
        for name, method in (("DTS-T", "dts_t"), ("DTS-D", "dts_d"))
        for change, options in _CHANGES.items()
    }


if __name__ == "__main__":
    papers.table(__file__, rows)
