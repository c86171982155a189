"""The merged model that offsets are added to: by a merger's name, or given."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.mergers import LEAFWISE, MERGERS
from retex_jax.offsets.factor_writer import FactorFile
from retex_jax.typing import Params

# Of leaves that are merged before they go into the file.
_MERGED_BYTES = 1 << 26


def problems(experts: ExpertSet, base: str | Params) -> list[str]:
    """What is wrong with a base whatever its values are."""
    if isinstance(base, str):
        hint = tree.did_you_mean(base, MERGERS)
        expected = f"expected one of {sorted(MERGERS)}{hint}"
        return [] if base in MERGERS else [f"base: got {base!r}, {expected}"]
    shapes = {name: leaf.shape for name, leaf in tree.flatten(base).items()}
    wanted = {name: spec.shape for name, spec in experts.leaves.items()}
    wrong = sorted(
        name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)
    )
    return [f"base: leaves {wrong} do not fit the experts"] if wrong else []


def merge(
    experts: ExpertSet,
    key: jax.Array,
    base: str | Params,
    options: Mapping[str, Any],
    factors: FactorFile | None = None,
) -> Params:
    """Merges the experts, or checks what is given.

    Args:
      experts: the experts.
      key: typed PRNG key, of a merger that is random.
      base: name of a merger, or a merged model.
      options: keywords of that merger.
      factors: a file that takes the merged model, of which the result is then mapped. Mergers of LEAFWISE give it
        some leaves at a time, so that no whole model is in memory.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if the merger takes no such options, or a value of a given model is NaN or Inf.
    """
    if not isinstance(base, str):
        for name, leaf in tree.flatten(base).items():
            if tree.is_float(leaf.dtype) and not np.isfinite(np.asarray(leaf)).all():
                raise ValueError(f"base: {name} has values that are NaN or Inf")
        return base if factors is None else factors.put_merged(base)
    merger = MERGERS[base]
    if factors is None:
        return merger(experts, key=key, **options)
    if base not in LEAFWISE:
        return factors.put_merged(merger(experts, key=key, **options))
    merged = {}
    for names in _by_bytes(experts):
        part = merger(experts.only(names), key=key, **options)
        merged |= tree.flatten(factors.put_merged(part))
    return tree.unflatten(merged)


def _by_bytes(experts: ExpertSet) -> Iterator[list[str]]:
    """The leaves in groups of `_MERGED_BYTES` or a little more."""
    group: list[str] = []
    size = 0
    for name, spec in experts.leaves.items():
        group.append(name)
        size += spec.size * spec.dtype.itemsize
        if size >= _MERGED_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
