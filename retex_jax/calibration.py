"""What data-dependent methods are given: inputs a task, and the model as pure functions.

Core methods know no models and no data sets. Who calls them says how features, logits and the inputs of
linear layers are computed, and hands over batches: dicts of arrays [B, ...] that the model reads.
Nothing here carries a label.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
      logits: (params, head, batch) -> logits of a head, [B, C_t], float32.
      heads: what `logits` reads of each task, in task order: a pytree of arrays, or None where there is nothing.
        They are arguments, so that what is compiled for one serves all of its shapes.
      linear_inputs: (params, batch) -> kernel leaf name to inputs of that layer, [N, in], float32, one
        row a token; rows of padding are zero. None where the model cannot say.
    """

    batches: Sequence[Iterable[Batch]]
    features: Callable[[Params, Batch], jax.Array]
    logits: Callable[[Params, Any, Batch], jax.Array]
    heads: Sequence[Any]
    linear_inputs: LinearInputs | None = None


def require(calibration: Calibration | None, method: str, num_tasks: int) -> Calibration:
    """Returns the calibration that a method needs.

    Raises:
      ValueError: if it is None, or has not one head and one iterable of batches a task, or one of these is empty
        or an iterator.
    """
    if calibration is None:
        raise ValueError(f"calibration: got None, but {method} needs inputs of every task")
    counts = {"batches": len(calibration.batches), "heads": len(calibration.heads)}
    if wrong := {name: count for name, count in counts.items() if count != num_tasks}:
        raise ValueError(
            "\n".join(
                f"calibration.{name}: got {count}, expected one for each of the {num_tasks} tasks"
                for name, count in wrong.items()
            )
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
