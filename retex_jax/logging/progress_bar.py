"""Progress of a loop: a live bar on a terminal, a line now and then when piped."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import rich.progress

from retex_jax.logging import terminal

PIPED_SECONDS = 10.0  # between two lines when piped
_BAR_SECONDS = 0.25  # between two readings of the metrics on a terminal
_WORTH_SAYING_SECONDS = 1.0  # a shorter loop ends silently when piped


class Progress:
    """What `progress` yields; `update` is all that a loop needs."""

    def __init__(self, total: int, description: str, bar: rich.progress.Progress | None):
        """Starts the clock.

        Args:
          total: number of steps.
          description: shown first.
          bar: a started bar, or None for lines.
        """
        self.total = total
        self.description = description
        self.completed = 0
        self._started = self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar = bar
        self._task = bar.add_task(description, total=total, tail="") if bar else None

    def update(self, completed: int, **metrics: Any) -> None:
        """Reports how far the loop is; cheap, so that it may be called at every step.

        The rate counts from the first call on, so that neither the steps before a resume nor the
        compilation of the first one distort it.

        Args:
          completed: steps done so far in all, not since the last call.
          **metrics: scalars to show; device arrays are waited for only when something is shown.
        """
        now = time.monotonic()
        self.completed = completed
        self._first = self._first or (completed, now)
        pause = _BAR_SECONDS if self._bar else PIPED_SECONDS
        if now - self._shown < pause and not (self._bar and completed >= self.total):
            return
        self._shown = now
        text = self._text(now, metrics)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=completed, tail=text)
        else:
            share = 100 * completed / max(self.total, 1)
            terminal.info(f"{self.description}: {share:.0f}%, {text}")

    def finish(self) -> None:
        """Says how long the loop took, when piped and if it took a while."""
        seconds = time.monotonic() - self._started
        if not self._bar and seconds >= _WORTH_SAYING_SECONDS:
            terminal.info(
                f"{self.description}: {self.completed}/{self.total} done in {_duration(seconds)}"
            )

    def _text(self, now: float, metrics: Mapping[str, Any]) -> str:
        parts = [f"{self.completed}/{self.total}"]
        if self._first and self.completed > self._first[0] and now > self._first[1]:
            rate = (self.completed - self._first[0]) / (now - self._first[1])
            left = max(self.total - self.completed, 0) / rate
            parts += [f"{rate:.3g}/s", f"{_duration(left)} left"]
        parts += [f"{name} {terminal.format_value(value)}" for name, value in metrics.items()]
        return ", ".join(parts)


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Progress]:
    """Shows the progress of the loop in its block on stderr.

    On a terminal: a bar with percent, rate, remaining time and metrics. Piped: at most one line
    every 10 seconds, and one at the end of a loop of a second or more. A single step is done where its block ends.

    Args:
      total: number of steps, those before a resume included.
      description: what the loop does.

    Raises:
      ValueError: if total < 0.
    """
    if total < 0:
        raise ValueError(f"total: got {total}, expected a number of steps")
    if not (terminal.is_lead() and terminal.stderr.is_terminal):
        shown = Progress(total, description, None)
        yield shown
        if total == 1:
            shown.completed = 1
        shown.finish()
        return
    columns = [
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[tail]}", markup=False),
    ]
    with rich.progress.Progress(*columns, console=terminal.stderr) as bar:
        shown = Progress(total, description, bar)
        yield shown
        if total == 1:
            shown.update(1)


def _duration(seconds: float) -> str:
    """Returns "45 s", "3:20 min" or "2:05 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
