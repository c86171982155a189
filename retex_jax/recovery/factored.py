"""Mixed tasks in one batch: one forward pass of the merged model, and each input's own offset beside it.

A token of task t passes a leaf as y = W x + G_t (S x): W and S are applied to the tokens of all tasks at
once, G_t by a product over inputs that are sorted by task (`grouped`). No parameters of an expert are made.
One compiled program serves every mixture of tasks: task ids are traced. An input may also have a mixture of the
experts: its offset is then sum_t w_t (theta_t - theta_merge), as that of `offsets.mix`.

No model is written twice: the model runs under `jax.vmap` over its inputs, with the merged model's
matrices, and `flax.linen.intercept_methods` adds what the offset does to the output of each `nn.Dense`,
`nn.Embed` (a language model's also where it is the head) and patch embedding. All other leaves (biases, norm
scales, class tokens, tables of positions that are read whole) are recovered once for every task and gathered by
input. Which leaves these are is read from the traced model: a leaf is left to interception only if nothing but the
calls of its own module reads it.

Numerics: recovered leaves and factors are computed in float32. Factors are kept in the dtype of the layer's
output, and the product of factors is added to that output, in that dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax import models, offsets, tree
from retex_jax.models.causal import TokenEmbedding
from retex_jax.models.interception import patches
from retex_jax.models.vit import PatchEmbed
from retex_jax.offsets import OffsetState
from retex_jax.recovery.grouped import of_task, task_product
from retex_jax.recovery.terms import Term, leaf_terms
from retex_jax.typing import Batch, FlatParams, Params

_STACKED = "blocks"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """What `apply` needs beside the model.

    Attributes:
      merged: the merged model's leaves, those of `by_task` left out.
      by_task: leaves recovered for every task, [T, *shape], of the leaf's dtype.
      terms: by leaf of a layer that is called, the offsets as chains of factors.
    """

    merged: FlatParams
    by_task: FlatParams
    terms: dict[str, tuple[Term, ...]]


@dataclass(frozen=True)
class Call:
    """How one leaf is used by a forward pass.

    Attributes:
      rows: how often the leaf is applied to a vector: tokens, patches or sequences; or is looked up.
      is_lookup: whether it is a table that is only looked up.
      dtype: of the layer's output.
    """

    rows: int
    is_lookup: bool
    dtype: Any


def stacked_leaves(merged: Params) -> list[str]:
    """The leaves that are stacked for a scan, which `prepare` refuses."""
    return [name for name in tree.flatten(merged) if _STACKED in name.split("/")]


def prepare(model: nn.Module, state: OffsetState, *, method: str = "__call__") -> Factored:
    """Arranges offsets for `apply`, once.

    Args:
      model: Linen module that reads batches like `model.example_batch()`; unrolled, not `scan=True`.
      state: from `offsets.fit`.
      method: of the model that `apply` runs, such as "lm_logits".

    Returns:
      The merged model, the recovered small leaves, and the factors, dense.

    Raises:
      ValueError: if the merged model is stacked for a scan, which hides its layers.
    """
    merged = tree.flatten(state.merged)
    if stacked := stacked_leaves(state.merged):
        raise ValueError(
            f"state: got leaves that are stacked for scan=True, such as {stacked[0]!r}, expected the "
            "unrolled form (models.stacking.unstack_blocks)"
        )
    calls, unread = _readers(model, state.merged, method)
    terms: dict[str, tuple[Term, ...]] = {}
    made: dict[Any, tuple[Term, ...] | None] = {}
    for name in state.offsets:
        if name in calls:
            dtype = calls[name].dtype
            view = tree.matrix_view(name, merged[name].shape, state.layout)
            key = (id(state.form(name)), merged[name].shape, view, dtype)
            if key not in made:
                found = leaf_terms(state, name, merged[name].shape)
                made[key] = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), found)
            if (chains := made[key]) is not None:
                terms[name] = chains
    gathered = [name for name in state.offsets if name not in terms and name not in unread]
    by_task = _recover_leaves(state, gathered)
    kept: FlatParams = {
        name: jnp.asarray(leaf) for name, leaf in merged.items() if name not in by_task
    }
    return Factored(kept, by_task, terms)


def apply(
    model: nn.Module,
    factored: Factored,
    batch: Batch,
    tasks: jax.Array,
    *,
    method: str = "__call__",
) -> Any:
    """Runs each input through the expert of its task, or a mixture of experts; pure, may be traced and compiled.

    Args:
      model: as for `prepare`; static under `jax.jit`.
      factored: from `prepare`.
      batch: what the model takes; all arrays [B, ...].
      tasks: task ids [B], integers, 0 to T - 1 (not checked), in any order; or weights over tasks, [B, T],
        float, of sum 1 (not checked).
      method: as for `prepare`.

    Returns:
      What the method returns for the batch: `models.Features`, or arrays [B, ...].
    """
    order = jnp.argsort(tasks, stable=True) if tasks.ndim == 1 else jnp.arange(len(tasks))

    def one(inputs: Batch, task: jax.Array) -> Any:
        own = {name: of_task(leaf, task) for name, leaf in factored.by_task.items()}
        params = tree.unflatten({**factored.merged, **own})

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_fun(*args, **kwargs)
            name = _leaf_of(context)
            correct = _attended if context.method_name == "attend" else _correction
            for term in factored.terms.get(name, ()):
                y = y + correct(context.module, args[0], term, task).astype(y.dtype)
            return y

        with nn.intercept_methods(intercept):
            own_batch = {name: array[None] for name, array in inputs.items()}
            output = model.apply({"params": params}, own_batch, method=method)
        return _map_rows(lambda x, axis: jnp.squeeze(x, axis), output)

    sorted_batch = {name: jnp.asarray(array)[order] for name, array in batch.items()}
    output = jax.vmap(one)(sorted_batch, tasks[order])
    back = jnp.argsort(order)
    return _map_rows(lambda x, axis: jnp.moveaxis(x[back], 0, axis), output)


def calls_of(model: nn.Module, params: Params, batch: Mapping[str, Any]) -> dict[str, Call]:
    """Which leaves' modules a forward pass calls; nothing is computed.

    Args:
      model: Linen module.
      params: its parameters, or their shapes.
      batch: what it takes, or the shapes.

    Returns:
      By leaf of an `nn.Dense`, `nn.Embed` or patch embedding; rows of all calls together.
    """
    found: dict[str, list[Call]] = {}
    jax.eval_shape(
        lambda *given: _recorded(model, given[0], given[1], found, "__call__"), params, batch
    )
    return {name: _sum(calls) for name, calls in found.items()}


def _readers(model: nn.Module, params: Params, method: str) -> tuple[dict[str, Call], set[str]]:
    """The leaves that nothing but the calls of their modules read, and those that nothing reads."""
    found: dict[str, list[Call]] = {}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    flat = tree.flatten(shapes)
    jaxpr = jax.make_jaxpr(
        lambda flat: _recorded(model, tree.unflatten(flat), model.example_batch(), found, method)
    )(flat).jaxpr
    reads = [id(variable) for equation in jaxpr.eqns for variable in equation.invars]
    count = {name: reads.count(id(var)) for name, var in zip(flat, jaxpr.invars, strict=True)}
    calls = {name: _sum(each) for name, each in found.items() if count[name] == len(each)}
    return calls, {name for name, reads in count.items() if not reads}


def _recorded(
    model: nn.Module, params: Params, batch: Batch, found: dict[str, list[Call]], method: str
) -> Any:
    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        if args and (name := _leaf_of(context)):
            is_table = isinstance(context.module, nn.Embed)
            is_lookup = is_table and context.method_name == "__call__"
            dtype = context.module.dtype or y.dtype if is_table else y.dtype
            found.setdefault(name, []).append(Call(y.size // y.shape[-1], is_lookup, dtype))
        return y

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, batch, method=method)


def _sum(calls: list[Call]) -> Call:
    """What a leaf is applied to costs far more than what is looked up, which is not counted beside it."""
    counted = [call for call in calls if not call.is_lookup] or calls
    return replace(counted[0], rows=sum(call.rows for call in counted))


def _leaf_of(context: Any) -> str:
    """The matrix that a module's call applies; "" where it is no such call."""
    kinds = {
        (nn.Dense, "__call__"): "kernel",
        (PatchEmbed, "__call__"): "kernel",
        (nn.Embed, "__call__"): "embedding",
        (TokenEmbedding, "__call__"): "embedding",
        (TokenEmbedding, "attend"): "embedding",
    }
    leaf = kinds.get((type(context.module), context.method_name))
    return "/".join((*context.module.path, leaf)) if leaf else ""


def _correction(module: nn.Module, x: jax.Array, term: Term, task: jax.Array) -> jax.Array:
    """What a term of the offset adds to the output of a module for one input."""
    if task.ndim and sum(factor.ndim != 2 for factor in term) > 1:  # no product of mixed factors
        return _mixture(partial(_correction, module, x, term), task)
    first, *others = term
    if isinstance(module, nn.Embed):
        x = first[x] if first.ndim == 2 else of_task(first[:, x], task)
    else:
        x = patches(x, module.patch_size) if isinstance(module, PatchEmbed) else x
        x = _multiply(x.astype(first.dtype), first, task)
    for factor in others:
        x = _multiply(x, factor, task)
    return x


def _attended(module: nn.Module, x: jax.Array, term: Term, task: jax.Array) -> jax.Array:
    """What a term of a table's offset adds to its products with hidden states: the chain, transposed."""
    if task.ndim and sum(factor.ndim != 2 for factor in term) > 1:
        return _mixture(partial(_attended, module, x, term), task)
    x = x.astype(term[0].dtype)
    for factor in reversed(term):
        x = _multiply(x, factor if factor.ndim == 1 else jnp.swapaxes(factor, -1, -2), task)
    return x


def _mixture(of_one: Callable[[jax.Array], jax.Array], weights: jax.Array) -> jax.Array:
    """Of what a task id gives, by weights over tasks."""
    each = [weight * of_one(jnp.int32(task)) for task, weight in enumerate(jnp.unstack(weights))]
    return sum(each[1:], each[0])


def _multiply(x: jax.Array, factor: jax.Array, task: jax.Array) -> jax.Array:
    if factor.ndim == 1:
        return x * of_task(factor, task)
    return x @ factor if factor.ndim == 2 else task_product(x, factor, task)


def _map_rows(function: Callable[[jax.Array, int], jax.Array], output: Any) -> Any:
    """Maps (array, axis of the inputs in what the model returns) over an output."""
    if isinstance(output, models.Features):
        pooled = None if output.pooled is None else function(output.pooled, 0)
        return models.Features(pooled, function(output.layers, 1))
    return jax.tree.map(lambda x: function(x, 0), output)


def _recover_leaves(state: OffsetState, names: list[str]) -> FlatParams:
    """Some leaves of every expert, [T, *shape], as `offsets.recover` gives them."""
    merged = tree.flatten(state.merged)
    partial = replace(
        state,
        merged=tree.unflatten({name: merged[name] for name in names}),
        offsets={name: state.form(name) for name in names},
    )
    experts = [tree.flatten(offsets.recover(partial, task)) for task in range(state.num_tasks)]
    return {name: jnp.stack([expert[name] for expert in experts]) for name in names}
