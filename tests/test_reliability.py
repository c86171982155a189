"""Short forms of experiments/reliability: the counts must add up, and nothing may be lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "experiments" / "reliability"


def counts(script, *arguments):
    """Runs a script; gives its table as row to column to number."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPTS / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    start = next(place for place, line in enumerate(lines) if line[0] in ("phase", "format"))
    columns = lines[start][1:]
    return {
        line[0]: dict(zip(columns, map(int, line[1:]), strict=True)) for line in lines[start + 1 :]
    }


def test_killed_runs_lose_nothing():
    table = counts("kill.py", "--kills=4", "--phases", "exact", "artifact")
    assert table["all"]["killed"] == table["all"]["equal"] == 4
    assert table["all"]["lost"] == 0
    assert table["exact"]["killed"] and table["artifact"]["killed"]


def test_damaged_files_give_the_right_answer_or_a_clear_error():
    table = counts("fuzz.py", "--cases=250")
    assert table["all"]["cases"] == 250
    assert table["all"]["bad"] == 0
    for name, row in table.items():
        assert row["right"] + row["error"] + row["no hash"] + row["other"] == row["cases"], name
        assert row["cases"] >= 5
    for name in ("artefact", "factor file", "unfinished fit", "checkpoint"):
        assert not table[name]["no hash"]
