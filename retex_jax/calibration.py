"""What data-dependent methods are given: inputs a task, and the model as pure functions.

Core methods know no models and no data sets. Who calls them says how features, logits and the inputs of
linear layers are computed, and hands over batches: dicts of arrays [B, ...] that the model reads.
Nothing here carries a label.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.typing import Batch, Params

LinearInputs = Callable[[Params, Batch], Mapping[str, jax.Array]]
"""(params, batch) -> kernel leaf name to inputs of that layer, [N, in], float32."""


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs of each task, and the model.

    Attributes:
      batches: one iterable of batches a task, in task order; each can be iterated again, so that none is an
        iterator, and all of its batches have one shape.
      features: (params, batch) -> what heads read, [B, d], float32.
      logits: (params, task, batch) -> logits of the task's own head, [B, C_t], float32; `task` is a
        Python integer.
      linear_inputs: (params, batch) -> kernel leaf name to inputs of that layer, [N, in], float32, one
        row a token; rows of padding are zero. None where the model cannot say.
    """

    batches: Sequence[Iterable[Batch]]
    features: Callable[[Params, Batch], jax.Array]
    logits: Callable[[Params, int, Batch], jax.Array]
    linear_inputs: LinearInputs | None = None


def require(calibration: Calibration | None, method: str, num_tasks: int) -> Calibration:
    """Returns the calibration that a method needs.

    Raises:
      ValueError: if it is None, or has not one iterable of batches a task, or one is empty or an iterator.
    """
    if calibration is None:
        raise ValueError(f"calibration: got None, but {method} needs inputs of every task")
    if len(calibration.batches) != num_tasks:
        raise ValueError(
            f"calibration.batches: got {len(calibration.batches)}, expected one for each of the "
            f"{num_tasks} tasks"
        )
    once = [t for t, batches in enumerate(calibration.batches) if iter(batches) is batches]
    if once:
        raise ValueError(
            f"calibration.batches: those of tasks {once} are iterators, which can be read once, expected "
            "iterables that can be iterated again, such as lists"
        )
    empty = [
        t for t, batches in enumerate(calibration.batches) if next(iter(batches), None) is None
    ]
    if empty:
        raise ValueError(f"calibration.batches: those of tasks {empty} are empty")
    return calibration


def require_linear_inputs(calibration: Calibration, method: str) -> LinearInputs:
    """Returns the function that gives the inputs of linear layers.

    Raises:
      ValueError: if the calibration has none.
    """
    if calibration.linear_inputs is None:
        raise ValueError(f"calibration.linear_inputs: got None, but {method} needs them")
    return calibration.linear_inputs


def logits_of(calibration: Calibration, task: int) -> Callable[[Params, Batch], jax.Array]:
    """The model with one task's head: (params, batch) -> logits, [B, C_t], float32."""
    return lambda params, batch: calibration.logits(params, task, batch)


def gram(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X^T X, and the number of rows that are not entirely zero.

    Args:
      inputs: X, [N, in], float32.

    Returns:
      [in, in], float32, and [], int32.
    """
    product = jnp.matmul(inputs.T, inputs, precision=jax.lax.Precision.HIGHEST)
    return product, jnp.sum(jnp.any(inputs != 0, axis=1), dtype=jnp.int32)


def second_moments(
    linear_inputs: LinearInputs, names: Collection[str]
) -> Callable[[str, Params, Iterable[Batch]], Iterator[tuple[str, np.ndarray]]]:
    """How the second moments of what layers read are gathered, compiled once for all models.

    Args:
      linear_inputs: of a calibration.
      names: of the layers' kernels.

    Returns:
      (whose model, params, batches) -> pairs of a name and X^T X / n, [in, in], float64, summed in float32; n
      counts the rows that are not entirely zero. What was yielded is not kept. ValueError, with the model's
      name, for inputs that are NaN or Inf.
    """

    @jax.jit
    def gather(params: Params, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        inputs = linear_inputs(params, batch)
        return {name: gram(inputs[name]) for name in names}

    def moments(
        owner: str, params: Params, batches: Iterable[Batch]
    ) -> Iterator[tuple[str, np.ndarray]]:
        params = jax.tree.map(jnp.asarray, params)
        gathered = None
        for batch in batches:
            found = gather(params, batch)
            gathered = found if gathered is None else jax.tree.map(jnp.add, gathered, found)
        assert gathered is not None
        for name in names:
            total, count = gathered.pop(name)
            whole = np.asarray(total, np.float64) / max(int(count), 1)
            if not np.isfinite(whole).all():
                raise ValueError(f"{owner}: the inputs of {name} have values that are NaN or Inf")
            yield name, whole

    return moments
