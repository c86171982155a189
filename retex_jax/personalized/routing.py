"""What the methods that mix experts by input have in common.

Besides `fit` and `recover`, the modules `twin`, `dawin`, `smear` and `wemoe` have

- `weights(state, ...)`: what decides, [B, T] (WEMoE: a set a layer);
- `mix(state, weights [T]) -> Params`: the model of one set of weights; `recover(state, task)` is that of the
  task's own, one-hot but for DaWin's mixture;
- `predict(state, model, batch, *, chunk) -> features [B, d]`: every input through a model of its own.

No path of `predict` sees a task id or a label. The model comes in as two pure functions and the heads
(`ModelFunctions`; a `Calibration` has them). The functions are static arguments of jitted functions: give the same
function objects again, or every call compiles anew.

Memory of `predict`: `chunk` mixed models and their activations beside the state.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.calibration import Calibration
from retex_jax.personalized import changes
from retex_jax.typing import Array, Batch, Params


class ModelFunctions(Protocol):
    """The model; see `Calibration`, of which these are three fields."""

    @property
    def features(self) -> Callable[[Params, Batch], jax.Array]:
        """(params, batch) -> [B, d], float32."""
        ...

    @property
    def logits(self) -> Callable[[Params, Any, Batch], jax.Array]:
        """(params, head, batch) -> logits of a head, [B, C_t], float32."""
        ...

    @property
    def heads(self) -> Sequence[Any]:
        """What `logits` reads of each task: a pytree of arrays."""
        ...


def one_hot(task: int | jax.Array, num_tasks: int) -> jax.Array:
    """The weights of a known task: [T], float32; raises ValueError if `task` is out of range."""
    changes.check_task(task, num_tasks)
    return jax.nn.one_hot(task, num_tasks)


@partial(jax.jit, static_argnums=0)
def features(
    function: Callable[[Params, Batch], jax.Array], params: Params, batch: Batch
) -> jax.Array:
    """Features of a batch through one model: [B, d], float32."""
    return function(params, batch)


@partial(jax.jit, static_argnums=0)
def logits(
    function: Callable[[Params, Any, Batch], jax.Array], params: Params, head: Any, batch: Batch
) -> jax.Array:
    """Logits of a batch through one model and one head: [B, C_t], float32."""
    return function(params, head, batch)


def calibration_features(calibration: Calibration, params: Params) -> list[np.ndarray]:
    """Features of all calibration inputs: a [n_t, d] array a task, float32, on the host."""
    return [
        np.concatenate(
            [np.asarray(features(calibration.features, params, batch)) for batch in batches]
        )
        for batches in calibration.batches
    ]


def check_chunk(chunk: int) -> None:
    """Raises ValueError unless `chunk` is an integer of 1 or more."""
    if isinstance(chunk, bool) or not isinstance(chunk, int | np.integer) or chunk < 1:
        raise ValueError(f"chunk: got {chunk!r}, expected an integer of 1 or more")


def map_examples(function: Callable[..., Any], xs: Any, chunk: int) -> Any:
    """Maps over examples, `chunk` of them at a time under one vmap; to be called under jit.

    Args:
      function: (entry of xs without its leading axis) -> pytree of arrays.
      xs: pytree of arrays [B, ...].
      chunk: examples that are in memory at a time.

    Returns:
      Pytree of arrays [B, ...].
    """
    size = jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.map(function, xs, batch_size=min(chunk, size))


def single(example: Batch) -> Batch:
    """A batch of one example."""
    return {name: array[None] for name, array in example.items()}


@partial(jax.jit, static_argnums=(0, 1), static_argnames="chunk")
def _predict(
    function: Callable[[Params, Batch], jax.Array],
    mix: Callable[[Any, jax.Array], Params],
    state: Any,
    weights: jax.Array,
    batch: Batch,
    chunk: int,
) -> jax.Array:
    def one(inputs: tuple[jax.Array, Batch]) -> jax.Array:
        example_weights, example = inputs
        return function(mix(state, example_weights), single(example))[0]

    return map_examples(one, (weights, batch), chunk)


def predict(
    function: Callable[[Params, Batch], jax.Array],
    mix: Callable[[Any, jax.Array], Params],
    state: Any,
    weights: Array,
    batch: Batch,
    *,
    chunk: int,
) -> jax.Array:
    """Runs every example through the mixture of its own weights.

    Args:
      function: (params, batch) -> features, [B, d].
      mix: (state, weights [T]) -> params; a function of a module, not a new closure each time.
      state: the method's.
      weights: [B, T], float32.
      batch: arrays [B, ...].
      chunk: mixed models in memory at a time.

    Returns:
      Features [B, d], in the order of the batch.

    Raises:
      ValueError: if `chunk` is not a positive integer, or `weights` has another B than the batch.
    """
    check_chunk(chunk)
    sizes = {array.shape[0] for array in batch.values()}
    if sizes != {weights.shape[0]}:
        raise ValueError(
            f"weights: got B = {weights.shape[0]}, expected {sorted(sizes)}, the batch's"
        )
    return _predict(function, mix, state, jnp.asarray(weights), dict(batch), chunk=chunk)
