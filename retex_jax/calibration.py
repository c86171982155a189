"""What data-dependent methods are given: inputs a task, and the model as pure functions.

Core methods know no models and no data sets. Who calls them says how features, logits and the inputs of
linear layers are computed, and hands over batches: dicts of arrays [B, ...] that the model reads.
Nothing here carries a label.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax

from retex_jax.typing import Batch, Params


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs of each task, and the model.

    Attributes:
      batches: one iterable of batches a task, in task order; each can be iterated again, and all of its
        batches have one shape.
      features: (params, batch) -> what heads read, [B, d], float32.
      logits: (params, task, batch) -> logits of the task's own head, [B, C_t], float32; `task` is a
        Python integer.
      linear_inputs: (params, batch) -> kernel leaf name to inputs of that layer, [N, in], float32, one
        row a token; rows of padding are zero. None where the model cannot say.
    """

    batches: Sequence[Iterable[Batch]]
    features: Callable[[Params, Batch], jax.Array]
    logits: Callable[[Params, int, Batch], jax.Array]
    linear_inputs: Callable[[Params, Batch], Mapping[str, jax.Array]] | None = None


def require(calibration: Calibration | None, method: str, num_tasks: int) -> Calibration:
    """Returns the calibration that a method needs.

    Raises:
      ValueError: if it is None, or has not one iterable of batches a task, or one is empty.
    """
    if calibration is None:
        raise ValueError(f"calibration: got None, but {method} needs inputs of every task")
    if len(calibration.batches) != num_tasks:
        raise ValueError(
            f"calibration.batches: got {len(calibration.batches)}, expected one for each of the "
            f"{num_tasks} tasks"
        )
    empty = [
        t for t, batches in enumerate(calibration.batches) if next(iter(batches), None) is None
    ]
    if empty:
        raise ValueError(f"calibration.batches: those of tasks {empty} are empty")
    return calibration
