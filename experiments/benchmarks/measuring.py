"""What the benchmarks share: memory of a process, and medians of repeated runs."""

import os
import statistics
import threading
import time
from pathlib import Path


class AnonymousMemory(threading.Thread):
    """Samples this process's anonymous memory; `peak` is the largest seen, bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Samples until the process ends."""
        while True:
            self.peak = max(self.peak, anonymous_bytes(os.getpid()))
            time.sleep(0.005)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def medians(measured: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over runs."""
    return {key: statistics.median(figures[key] for figures in measured) for key in measured[0]}
