"""What the benchmarks share: memory of a process, and medians of repeated runs."""

import os
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def random_model(shapes: Mapping[str, tuple[int, ...]], task: int) -> dict[str, np.ndarray]:
    """A random model, float32, or (task >= 0) an expert of it: the same with random deltas."""
    base, delta = np.random.default_rng(0), np.random.default_rng(task + 2)
    tensors = {}
    for name, shape in shapes.items():
        x = base.standard_normal(shape, np.float32) * np.float32(0.02)
        if task >= 0:
            x += delta.standard_normal(shape, np.float32) * np.float32(0.001)
        tensors[name] = x
    return tensors


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
