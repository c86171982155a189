"""ReTeX, tables 2 and 6: accuracy against the number of tasks, task known.

    python experiments/retex_table_2.py --suite=minilm_text8

The paper's suite is vit_b32_30; table 6 has ReTeX alone, of several seeds.
"""

import papers
from retex_table_1 import rows

if __name__ == "__main__":
    papers.growth(__file__, rows)
