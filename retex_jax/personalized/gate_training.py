"""Test-time adaptation of gates (see `wemoe`): Adam on the entropies of all tasks, a task's batch at a time."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retex_jax.calibration import Calibration
from retex_jax.mergers.adamerging import entropy
from retex_jax.personalized import gating, routing
from retex_jax.typing import Batch, FlatParams, Params, ProgressFn


@partial(jax.jit, static_argnames=("logits", "batch_gate", "mask"))
def entropy_and_gradient(
    gates: Any,
    params: Params,
    stacked: FlatParams,
    head: Any,
    batch: Batch,
    *,
    logits: Callable[[Params, Any, Batch], jax.Array],
    batch_gate: bool,
    mask: str | None,
) -> tuple[jax.Array, Any]:
    """Mean entropy of a batch under one head, and its gradient by the gates.

    Args:
      gates: by module path.
      params: nested dict; see `gating.run`, as for the next.
      stacked: [T, *shape] by leaf.
      head: a task's; see `Calibration`.
      batch: arrays [B, ...].
      logits: (params, head, batch) -> [B, C_t].
      batch_gate: whether the batch shares its mean gates.
      mask: the batch's entry that is non-zero at real tokens, or None.

    Returns:
      [], float32, and a pytree like `gates`.
    """

    def function(params: Params, batch: Batch) -> jax.Array:
        return logits(params, head, batch)

    def mean_entropy(gates: Any) -> jax.Array:
        def run(part: Batch) -> jax.Array:
            return gating.run(function, params, stacked, gates, part, mask)[0]

        each = jax.vmap(lambda example: run(routing.single(example))[0])
        outputs = run(batch) if batch_gate else each(dict(batch))
        return entropy(outputs.astype(jnp.float32)).mean()

    return jax.value_and_grad(mean_entropy)(gates)


def adapt(
    params: Params,
    stacked: FlatParams,
    gates: Any,
    calibration: Calibration,
    mask: str | None,
    *,
    steps: int,
    learning_rate: float,
    batch_gate: bool,
    cosine: bool,
    progress: ProgressFn | None,
) -> Any:
    """Lowers the sum over tasks of the entropies; see `wemoe.fit` for what the arguments mean.

    Returns:
      The gates after the last step.

    Raises:
      FloatingPointError: if an entropy is not finite.
    """
    rate = optax.cosine_decay_schedule(learning_rate, steps) if cosine else learning_rate
    optimizer = optax.adam(rate)
    opt_state = optimizer.init(gates)
    streams = [_again(batches) for batches in calibration.batches]

    @jax.jit
    def update(gradients: Any, opt_state: Any, gates: Any) -> Any:
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(gates, updates), opt_state

    for step in range(steps):
        total = None
        for task, stream in enumerate(streams):
            loss, gradients = entropy_and_gradient(
                gates,
                params,
                stacked,
                calibration.heads[task],
                dict(next(stream)),
                logits=calibration.logits,
                batch_gate=batch_gate,
                mask=mask,
            )
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"WEMoE: the entropy of task {task} in step {step + 1} is {float(loss)}"
                )
            total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
        gates, opt_state = update(total, opt_state, gates)
        if progress:
            progress(step + 1, steps)
    return gates


def _again(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
