"""ReTeX, table 9: inputs of unknown tasks by trained and by training-free identifiers.

    python experiments/retex_table_9.py --suite=minilm_text8

Test inputs whose task is identified, and the part of a forward pass that this takes (T passes where experts run), of
the layers and options that are best on validation inputs. Beside them how good the recovered experts then are, of the
recommended identifier: with the task known, with the backbone routed, and with nothing known.
"""

from collections.abc import Mapping
from typing import Any

import paper_programs

PROTOCOLS = {
    (True, True): "recovered, task known",
    (False, True): "recovered, backbone routed",
    (False, False): "recovered, nothing known",
}


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A row an identifier, whatever it costs and within the limit; and a row a protocol."""
    identified = {
        found["identifier"] + (" within the limit" if found["limit"] else ""): {
            "identified": found["accuracy"],
            "forward": found["forward"],
        }
        for found in results["identifiers"]
    }
    recovered = {
        PROTOCOLS[row["task_known"], row["head_known"]]: {
            "normalized accuracy": row["normalized_accuracy"]
        }
        for row in results["rows"]
    }
    return {**identified, **recovered}


if __name__ == "__main__":
    paper_programs.identified(__file__, rows)
