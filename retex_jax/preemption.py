"""A scheduler's SIGTERM: the work that is under way is saved, and the program ends.

    with preemption.Guard() as guard:
        for step in range(steps):
            ...
            if guard.is_called:
                checkpoints.save(step + 1, state)
                raise preemption.Preempted(f"step {step + 1} is saved")

Where several processes share the work, `retex_jax.distributed.any_process(guard.is_called)` lets all leave at one step.

Where several processes share the work, `retex_jax.distributed.any_process(guard.is_called)` lets all leave at one step.

A program ends with exit code 75 (EX_TEMPFAIL of sysexits.h: to be tried again), and the same command goes on from what
was saved. Outside of a guard, and by a second SIGTERM, the process ends at once, as it always did.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75


class Preempted(SystemExit):
    """Ends the program; its text says what is saved."""

    def __init__(self, message: str):
        """Takes what is said before the program ends."""
        super().__init__(message)
        self.message = message
        self.code = EXIT_CODE


class Guard:
    """Takes note of SIGTERM as long as it is entered; in other threads than the main one it never does.

    Attributes:
      is_called: whether the signal has come.
    """

    def __init__(self) -> None:
        self.is_called = False
        self._before: Any = None
        self._is_set = False

    def __enter__(self) -> "Guard":
        """Sets the handler."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._is_set = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the handler back that was there.

        Raises:
          Preempted: if the signal has come, and nothing was raised yet.
        """
        if self._is_set:
            self._is_set = False
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        if self.is_called and error is None:
            raise Preempted("what was under way is finished")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_called:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self.is_called = True
