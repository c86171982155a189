"""Fits ReTeX's offsets (arXiv:2606.26902, section 4.1): merge, plan the ranks, solve."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS
from retex_jax.offsets import adam, exact
from retex_jax.offsets.state import OffsetState, RankRule, plan_leaves
from retex_jax.typing import Params


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    rank: int = 64,
    rank_rule: RankRule = "paper",
    solver: Literal["exact", "adam"] = "exact",
    base: str | Params = "weight_average",
    base_options: Mapping[str, Any] | None = None,
    **solver_options: Any,
) -> OffsetState:
    """Merges the experts and fits one offset a task and leaf, so that each expert can be recovered.

    Needs no data. Leaves below two axes are recovered exactly (by "adam": as far as it gets).

    Args:
      experts: the experts.
      key: typed PRNG key; needed by solver "adam" only, `jax.random.key(0)` when not given.
      rank: target rank r of the matrix leaves; the paper uses 256.
      rank_rule: for leaves of min(a, b) <= rank: "paper" halves min(a, b), "clip" takes all of it,
        which recovers leaves of b <= a exactly.
      solver: "exact" (closed form) or "adam" (the paper's loop).
      base: name of a merger, or a merged model (nested dict like the pretrained one).
      base_options: keywords of that merger.
      **solver_options: keywords of `offsets.exact.fit` or `offsets.adam.fit`.

    Returns:
      The state; `state.report` has residual, optimum and ratio.

    Raises:
      ValueError: if `rank` is not from 1 to the largest min(a, b) of any leaf, an option is unknown or
        out of range, or `base` does not fit the experts.
    """
    if solver not in ("exact", "adam"):
        raise ValueError(f"solver: got {solver!r}, expected 'exact' or 'adam'")
    _check_options(solver_options, exact.fit if solver == "exact" else adam.fit)
    key = jax.random.key(0) if key is None else key
    plans = plan_leaves(experts.leaves, experts.layout, rank, rank_rule)
    merged = _merge(experts, key, base, base_options or {})
    if solver == "exact":
        return exact.fit(experts, merged, plans, **solver_options)
    return adam.fit(experts, merged, plans, key=key, **solver_options)


def _check_options(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    known = set(inspect.signature(function).parameters) - {"experts", "merged", "plans", "key"}
    for name in options:
        if name not in known:
            suggestion = tree.did_you_mean(name, known)
            raise ValueError(f"{name}: no such option, expected {sorted(known)}{suggestion}")


def _merge(
    experts: ExpertSet, key: jax.Array, base: str | Params, options: Mapping[str, Any]
) -> Params:
    if isinstance(base, str):
        if base not in MERGERS:
            suggestion = tree.did_you_mean(base, MERGERS)
            raise ValueError(f"base: got {base!r}, expected one of {sorted(MERGERS)}{suggestion}")
        return MERGERS[base](experts, key=key, **options)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(base).items()}
    wrong = sorted(
        name
        for name in {*shapes, *experts.leaves}
        if name not in shapes
        or name not in experts.leaves
        or shapes[name] != experts.leaves[name].shape
    )
    if wrong:
        raise ValueError(f"base: leaves {wrong} do not fit the experts")
    for name, leaf in tree.flatten(base).items():
        if tree.is_float(leaf.dtype) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"base: {name} has values that are NaN or Inf")
    return base
