"""Fits ReTeX's offsets (arXiv:2606.26902, section 4.1): merge, plan the ranks, solve."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal, get_args

import jax
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS
from retex_jax.offsets import adam, exact
from retex_jax.offsets import budget as budgets
from retex_jax.offsets.coding import coded_bytes
from retex_jax.offsets.forms import Orientation
from retex_jax.offsets.state import LeafPlan, OffsetState, RankRule, plan_leaves
from retex_jax.typing import Params

_RANK = 64


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    rank: int | None = None,
    rank_rule: RankRule = "paper",
    orientation: Orientation | Literal["auto"] = "right",
    budget: float | None = None,
    sharing: budgets.Sharing = "shared",
    task_weights: Literal["equal", "energy"] | Sequence[float] = "equal",
    solver: Literal["exact", "adam"] = "exact",
    base: str | Params = "weight_average",
    base_options: Mapping[str, Any] | None = None,
    **solver_options: Any,
) -> OffsetState:
    """Merges the experts and fits one offset a task and leaf, so that each expert can be recovered.

    Needs no data. Leaves below two axes are recovered exactly (by "adam": as far as it gets; in few bits:
    as well as these hold them). Size is given by `rank`, as in the paper, or by `budget`.

    Args:
      experts: the experts.
      key: typed PRNG key; needed by solver "adam" only, `jax.random.key(0)` when not given.
      rank: target rank r of the matrix leaves, 64 when not given; the paper uses 256. Not with `budget`.
      rank_rule: for leaves of min(a, b) <= rank: "paper" halves min(a, b), "clip" takes all of it,
        which recovers leaves of b <= a exactly.
      orientation: where the shared factor stands: "right" (ReTeX), "left" (ReTeX-Alt), or "auto": on the
        longer side of each leaf.
      budget: what the offsets may take a task: a fraction of the merged model's bytes below 1, or a number
        of bytes. Ranks are then chosen leaf by leaf (see `retex_jax.offsets.budget`). By "exact" only.
      sharing: with a budget, whether tasks share a factor: "shared" (ReTeX), "separate", or "auto",
        whichever leaves less error.
      task_weights: of the tasks' errors: "equal"; "energy": each task's error relative to its own offset, so
        that tasks of small offsets do not starve; or T positive numbers. By "exact" only.
      solver: "exact" (closed form) or "adam" (the paper's loop).
      base: name of a merger, or a merged model (nested dict like the pretrained one).
      base_options: keywords of that merger.
      **solver_options: keywords of `offsets.exact.fit` (such as `bits`) or `offsets.adam.fit`.

    Returns:
      The state; `state.report` has residual, optimum and ratio.

    Raises:
      ValueError: if `rank` is not from 1 to the largest min(a, b) of any leaf, the budget is too small for
        the leaves below two axes, an option is unknown or out of range, or `base` does not fit the experts.
    """
    _check(experts, rank, budget, sharing, task_weights, solver)
    _check_options(solver_options, exact.fit if solver == "exact" else adam.fit)
    key = jax.random.key(0) if key is None else key
    plans = plan_leaves(
        experts.leaves,
        experts.layout,
        rank or _RANK if budget is None else 1,
        rank_rule,
        orientation,
    )
    merged = _merge(experts, key, base, base_options or {})
    if solver == "adam":
        return adam.fit(experts, merged, plans, key=key, **solver_options)
    weights = _weights(experts, merged, task_weights)
    if budget is not None:
        plans = _spend(experts, merged, plans, weights, budget, sharing, solver_options)
    return exact.fit(experts, merged, plans, task_weights=weights, **solver_options)


def _check(
    experts: ExpertSet, rank: Any, budget: Any, sharing: str, task_weights: Any, solver: str
) -> None:
    problems = []
    if solver not in ("exact", "adam"):
        problems.append(f"solver: got {solver!r}, expected 'exact' or 'adam'")
    if sharing not in get_args(budgets.Sharing):
        problems.append(f"sharing: got {sharing!r}, expected one of {get_args(budgets.Sharing)}")
    if budget is not None and not 0 < budget < float("inf"):
        problems.append(
            f"budget: got {budget!r}, expected a fraction of the model, or bytes, a task"
        )
    if budget is not None and rank is not None:
        problems.append(f"rank: got {rank!r} beside budget = {budget!r}, expected one of the two")
    if budget is None and sharing != "shared":
        problems.append(f"sharing: got {sharing!r} without a budget, expected 'shared'")
    if isinstance(task_weights, str):
        if task_weights not in ("equal", "energy"):
            problems.append(
                f"task_weights: got {task_weights!r}, expected 'equal', 'energy' or {experts.num_tasks} numbers"
            )
    elif len(task_weights) != experts.num_tasks or not all(
        0 < weight < float("inf") for weight in task_weights
    ):
        problems.append(
            f"task_weights: got {task_weights!r}, expected {experts.num_tasks} positive numbers"
        )
    if solver == "adam" and (budget is not None or task_weights != "equal"):
        problems.append("solver: 'adam' takes no budget and no task_weights")
    if problems:
        raise ValueError("\n".join(problems))


def _weights(
    experts: ExpertSet, merged: Params, given: Literal["equal", "energy"] | Sequence[float]
) -> np.ndarray:
    """[T], float64, of mean square 1."""
    if given == "equal":
        return np.ones(experts.num_tasks)
    weights = (
        np.asarray(given, np.float64)
        if not isinstance(given, str)
        else _inverse_norms(experts, merged)
    )
    return weights / np.sqrt(np.mean(weights**2))


def _inverse_norms(experts: ExpertSet, merged: Params) -> np.ndarray:
    base, energies = tree.flatten(merged), np.zeros(experts.num_tasks)
    for name in experts.float_leaves:
        squares = exact.difference_vectors(experts, base, name) ** 2
        energies += np.asarray(squares.reshape(experts.num_tasks, -1).sum(axis=1), np.float64)
    # A task without an offset needs nothing, whatever its weight.
    return 1 / np.sqrt(np.where(energies > 0, energies, energies.max() or 1.0))


def _spend(
    experts: ExpertSet,
    merged: Params,
    plans: dict[str, LeafPlan],
    weights: np.ndarray,
    budget: float,
    sharing: budgets.Sharing,
    options: Mapping[str, Any],
) -> dict[str, LeafPlan]:
    bits, vector_bits = options.get("bits", 32), options.get("vector_bits", 32)
    model_bytes, num_tasks = tree.param_bytes(merged), experts.num_tasks
    vectors = [experts.leaves[name].shape for name in experts.float_leaves if name not in plans]
    fixed = num_tasks * sum(coded_bytes(prod(shape), 1, vector_bits) for shape in vectors)
    total = num_tasks * (budget * model_bytes if budget < 1 else budget)
    if total <= fixed:
        raise ValueError(
            f"budget: got {budget!r}, {total:.0f} bytes in all, but the leaves below two axes take "
            f"{fixed} at vector_bits = {vector_bits}"
        )
    base = tree.flatten(merged)
    measured = {
        name: budgets.spectra(exact.difference_matrices(experts, base, name, plan), weights)
        for name, plan in plans.items()
    }
    return budgets.allocate(plans, measured, total - fixed, bits=bits, sharing=sharing)


def _check_options(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    known = set(inspect.signature(function).parameters) - {
        "experts",
        "merged",
        "plans",
        "key",
        "task_weights",
    }
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
