"""Runs a Linen model with some of its modules' parameters mixed by gates on what enters them.

No model is copied: `flax.linen.intercept_methods` stops the call of each gated module, measures the gates on the
module's input, and calls the same module, unbound, with the mixed parameters. It needs modules whose path is the
prefix of their leaves' names, that are called with hidden states [B, N, d] (or [B, d]) first, and that have parameters
only.

Interception happens while a function is traced. A function that `jax.jit` has traced before would run without it, and
one that it traces meanwhile would keep it; so `jax.jit` is disabled inside, and the model's operations become part of
the caller's own trace. That every gated module was met is checked.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax import tree
from retex_jax.personalized import bank
from retex_jax.typing import Array, Batch, FlatParams, Params

Gates = Mapping[str, Mapping[str, jax.Array]]
"""By module: "hidden_kernel" [d, d], "hidden_bias" [d], "kernel" [d, T], "bias" [T], float32."""


def widths(
    function: Callable[[Params, Batch], Any], params: Params, batch: Batch, pattern: str
) -> dict[str, int]:
    """Finds the modules to gate, without running anything.

    Args:
      function: (params, batch) -> anything; calls the model.
      params: nested dict.
      batch: arrays [B, ...].
      pattern: regular expression that is searched in module paths "a/b/c".

    Returns:
      Path to width d of the hidden states that enter the module, in order of calls.

    Raises:
      ValueError: if no module matches.
    """
    found: dict[str, int] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and re.search(pattern, path):
            found[path] = args[0].shape[-1]
        return next_fun(*args, **kwargs)

    def traced(params: Params, batch: Batch) -> Any:
        with jax.disable_jit(), nn.intercept_methods(record):
            return function(params, batch)

    jax.eval_shape(traced, params, dict(batch))
    if not found:
        raise ValueError(
            f"pattern: got {pattern!r}, expected one that is found in the path of a module of the model"
        )
    return found


def gate(gates: Mapping[str, jax.Array], x: jax.Array, mask: Array | None) -> jax.Array:
    """The gates of one module: two layers with ReLU at every token, then the mean over tokens and the batch.

    Args:
      gates: see `Gates`.
      x: what enters the module, [B, ..., d].
      mask: non-zero where a token is real, [B, ...]; None means all are.

    Returns:
      [T], float32.
    """
    x = x.astype(jnp.float32)
    hidden = jax.nn.relu(x @ gates["hidden_kernel"] + gates["hidden_bias"])
    outputs = hidden @ gates["kernel"] + gates["bias"]
    outputs = outputs.reshape(len(x), -1, outputs.shape[-1])
    if mask is None:
        return outputs.mean(axis=(0, 1))
    real = (jnp.asarray(mask).reshape(outputs.shape[:2]) != 0).astype(jnp.float32)[..., None]
    means = jnp.sum(outputs * real, axis=1) / jnp.maximum(real.sum(axis=1), 1.0)
    return means.mean(axis=0)


def run(
    function: Callable[[Params, Batch], Any],
    params: Params,
    stacked: FlatParams,
    gates: Gates,
    batch: Batch,
    mask: str | None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Calls the model with every gated module as theta_0 + sum_t g_t tau_t, one set of gates for the batch.

    Args:
      function: (params, batch) -> anything; calls the model.
      params: nested dict; theta_0 at the gated modules.
      stacked: the experts' leaves of the gated modules, [T, *shape].
      gates: by module path.
      batch: arrays [B, ...].
      mask: the batch's entry that is non-zero at real tokens; where the batch has none, all are real.

    Returns:
      What the function gives, and the gates' values, by module path: [T], float32.

    Raises:
      ValueError: if a gated module is not called.
    """
    flat = tree.flatten(params)
    values: dict[str, jax.Array] = {}

    def intercept(
        next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        path = "/".join(context.module.path)
        if context.method_name != "__call__" or path not in gates:
            return next_fun(*args, **kwargs)
        values[path] = gate(gates[path], args[0], batch.get(mask) if mask else None)
        prefix = f"{path}/"
        mixed = {
            name.removeprefix(prefix): bank.mix_leaf(leaf, stacked[name], values[path])
            if name in stacked
            else leaf
            for name, leaf in flat.items()
            if name.startswith(prefix)
        }
        module = context.module.clone(parent=None)
        return module.apply({"params": tree.unflatten(mixed)}, *args, **kwargs)

    with jax.disable_jit(), nn.intercept_methods(intercept):
        output = function(params, batch)
    missing = sorted(set(gates) - set(values))
    if missing:
        raise ValueError(f"model: modules {missing} were not called")
    return output, values
