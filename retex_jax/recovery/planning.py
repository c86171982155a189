"""Which recovery is the cheapest for a batch of mixed tasks, from counts alone.

A leaf (a, b) of rank r costs r (a + b) multiply-adds a token where its factors are applied, and r a b once a
task where its offset is made: they break even at ab / (a + b) tokens of a task. Making parameters moves the
whole model through memory besides, and inputs that are run group by group are padded group by group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import flax.linen as nn
import jax

from retex_jax import tree
from retex_jax.recovery.factored import Factored, calls_of
from retex_jax.recovery.terms import Term

# Multiply-adds in the time that it takes to move a byte; 5 to 20 on CPUs.
_WORK_OF_A_BYTE = 10


@dataclass(frozen=True)
class Costs:
    """What recovery costs, in multiply-adds.

    Attributes:
      forward: of the merged model, an input.
      correction: of the factors of its task, an input.
      recovery: of one expert's parameters, a task.
    """

    forward: float
    correction: float
    recovery: float


def costs(model: nn.Module, factored: Factored, batch: Mapping[str, Any]) -> Costs:
    """The costs of inputs of one shape; products of matrices only.

    Args:
      model: Linen module.
      factored: from `factored.prepare`.
      batch: one input, [1, ...] each, or the shapes.

    Returns:
      The costs.
    """
    leaves = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in factored.merged.items()}
    for name, x in factored.by_task.items():
        leaves[name] = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    calls = calls_of(model, tree.unflatten(leaves), batch)
    forward = correction = recovery = 0.0
    for name, call in calls.items():
        if not call.is_lookup:
            forward += call.rows * leaves[name].size
        for term in factored.terms.get(name, ()):
            applied = term[1:] if call.is_lookup else term
            correction += call.rows * sum(prod(factor.shape[-2:]) for factor in applied)
    for name, terms in factored.terms.items():
        recovery += sum(_product(term, leaves[name].size) for term in terms)
    recovery += 2 * _WORK_OF_A_BYTE * tree.param_bytes(leaves)
    return Costs(forward, correction, recovery)


def _product(term: Term, size: int) -> int:
    """Of making an offset of `size` entries: the rank times that, or once that for a scaled direction."""
    return size if term[1].ndim == 1 else size * term[1].shape[-2]


def is_factored_cheaper(
    counts: Mapping[int, int], cached: set[int], max_batch: int, costs: Costs
) -> bool:
    """Whether applying factors is cheaper than running each task's inputs through its own parameters.

    Args:
      counts: task id to its number of inputs, >= 1.
      cached: the tasks whose parameters are at hand.
      max_batch: the largest batch.
      costs: of one input and of one task.
    """
    together = padded_size(sum(counts.values()), max_batch) * (costs.forward + costs.correction)
    apart = sum(padded_size(count, max_batch) for count in counts.values()) * costs.forward
    return together < apart + costs.recovery * len(counts.keys() - cached)


def bucket(count: int, limit: int) -> int:
    """The least power of two that is at least `count`; at most `limit`."""
    return min(limit, 1 << max(count - 1, 0).bit_length())


def padded_size(count: int, max_batch: int) -> int:
    """How many inputs run where `count` are asked for: whole batches, and a last one of a bucket's size."""
    full, rest = divmod(count, max_batch)
    return full * max_batch + (bucket(rest, max_batch) if rest else 0)
