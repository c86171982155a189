"""Wall-clock seconds of the phases of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from retex_jax.logging.terminal import info


class Clock:
    """Wall-clock seconds by phase; phases of one name add up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times its block, and announces a phase when it first begins."""
        if phase not in self.seconds:
            info(phase)
            self.seconds[phase] = 0.0
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started
