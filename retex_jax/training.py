"""The loop of fine-tuning: it goes on from the newest checkpoint, and ends cleanly on SIGTERM."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from retex_jax import checkpoint, data, distributed, logging
from retex_jax.preemption import Guard, Preempted

_State = TypeVar("_State")
_Batch = Mapping[str, np.ndarray]


def run(
    name: str,
    step: Callable[[_State, _Batch], tuple[_State, jax.Array]],
    state: _State,
    read: Callable[[int], _Batch],
    unfinished: Path,
    *,
    steps: int,
    checkpoint_every: int,
    learning_rate: float,
    after: Callable[[int, _State], _State] = lambda _, state: state,
) -> _State:
    """Takes the steps that are left.

    Args:
      name: of the task.
      step: (state, batch) -> the next state and the loss; may donate the state.
      state: before the first step; every array of it is kept in the checkpoints.
      read: number of a step, from 0, to its batch; called ahead, in a thread.
      unfinished: the folder of the checkpoints, of which the last is kept.
      steps: of the whole run.
      checkpoint_every: steps between two checkpoints.
      learning_rate: peak, for the message about a loss that is not finite.
      after: (number of steps taken, state) -> the state that is saved and goes on.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: if the loss is not finite, with the step.
      Preempted: after a SIGTERM to any process, when the step that is under way is saved; it ends the program.
    """
    checkpoints = checkpoint.Checkpointer(unfinished, max_to_keep=1)
    done = checkpoints.latest() or 0
    if done:
        state = checkpoints.restore(done, state)
        logging.info(f"{name}: resumed at step {done}")
    with Guard() as guard, logging.progress(steps, f"fine-tune {name}") as progress:
        for number, batch in enumerate(data.ahead(read, range(done, steps)), done + 1):
            state, loss = step(state, batch)
            loss = float(loss)  # waits for the step, so that the progress shown is real
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"{name}: the loss is {loss} at step {number}; learning_rate = {learning_rate}"
                )
            state = after(number, state)
            is_leaving = distributed.any_process(guard.is_called)
            if is_leaving or number % checkpoint_every == 0 or number == steps:
                checkpoints.save(number, state)
            progress.update(number, loss=loss)
            if is_leaving:
                raise Preempted(f"{name} is saved at step {number} of {steps}")
    return state
