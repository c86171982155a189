"""Products of inputs with a matrix a task: x_i -> x_i G_t(i), for inputs that are sorted by task, or with a mixture.

On an accelerator this is `jax.lax.ragged_dot` over all tokens. On CPU (two cores, jax 0.10.2, 3200 tokens) that
took 2 to 13 times one shared product of the same size, and a loop over the inputs, each multiplied by its
task's matrix as it lies in memory, 1 to 3 times; two inputs at a time, where they are of one task, save up to a
quarter of that. Four save more where matrices are large, and cost where they are small; gathered matrices, padded
groups, and one product with the matrices of all tasks took longer. The choice is by `jax.default_backend()`. An input's
own mixture of the matrices, x_i (sum_t w_it G_t), is made for a few inputs at a time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

_MIXED = 4  # inputs whose mixed matrices lie in memory together
_TOGETHER = 2  # inputs that are multiplied at once on a CPU, if they are of one task


@jax.custom_batching.custom_vmap
def task_product(x: jax.Array, factor: jax.Array, task: jax.Array) -> jax.Array:
    """Multiplies one input by its task's matrix; under `jax.vmap` over inputs, all of them at once.

    Args:
      x: [..., in]; under vmap, inputs of one task must stand side by side, ordered by task.
      factor: a matrix a task, [T, in, out]; may not be mapped.
      task: task id, [], integer; or weights over tasks, [T], float: inputs then stand in any order.

    Returns:
      [..., out].
    """
    return x @ of_task(factor, task)


def of_task(stacked: jax.Array, task: jax.Array) -> jax.Array:
    """One task's part, or the mixture, of what is stacked by task: [T, *shape] to [*shape].

    Args:
      stacked: [T, *shape].
      task: task id, [], integer; or weights, [T], float.
    """
    if task.ndim == 0:
        return stacked[task]
    return jnp.tensordot(task, stacked, axes=1, precision="highest").astype(stacked.dtype)


@task_product.def_vmap
def _(
    size: int, mapped: list[bool], x: jax.Array, factor: jax.Array, task: jax.Array
) -> tuple[Any, bool]:
    has_inputs, has_factors, has_tasks = mapped
    if has_factors:
        raise ValueError("factor: got one for each input, expected one for each task")
    if not has_tasks:
        return x @ of_task(factor, task), has_inputs
    if not has_inputs:
        x = jnp.broadcast_to(x, (size, *x.shape))
    if task.ndim == 2:
        return jax.lax.map(
            lambda one: one[0] @ of_task(factor, one[1]), (x, task), batch_size=min(_MIXED, size)
        ), True
    by_group = _loop if jax.default_backend() == "cpu" else _ragged
    return by_group(x, factor, task), True


def _loop(x: jax.Array, factor: jax.Array, tasks: jax.Array) -> jax.Array:
    """[B, ..., in] to [B, ..., out], a few inputs at a time where they are of one task, else input by input."""

    def each(x: jax.Array, tasks: jax.Array) -> jax.Array:
        return jax.lax.map(lambda one: one[0] @ factor[one[1]], (x, tasks))

    def together(x: jax.Array, tasks: jax.Array) -> jax.Array:
        return x @ factor[tasks[0]]

    count = math.gcd(len(x), _TOGETHER)
    windows = x.reshape(-1, count, *x.shape[1:]), tasks.reshape(-1, count)
    y = jax.lax.map(lambda w: jax.lax.cond(w[1][0] == w[1][-1], together, each, *w), windows)
    return y.reshape(*x.shape[:-1], factor.shape[-1])


def _ragged(x: jax.Array, factor: jax.Array, tasks: jax.Array) -> jax.Array:
    """[B, ..., in] to [B, ..., out], in one call."""
    tokens = x[..., 0].size // x.shape[0]
    sizes = jnp.bincount(tasks, length=factor.shape[0]).astype(jnp.int32) * tokens
    y = jax.lax.ragged_dot(x.reshape(-1, x.shape[-1]), factor, sizes)
    return y.reshape(*x.shape[:-1], factor.shape[-1]).astype(x.dtype)
