"""Fits ReTeX's offsets (arXiv:2606.26902, section 4.1): merge, plan the ranks, solve."""

import contextlib
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from retex_jax import tree
from retex_jax.calibration import Calibration, require, require_linear_inputs
from retex_jax.experts import ExpertSet
from retex_jax.offsets import (
    activations,
    bases,
    differences,
    exact,
    factor_file,
    factor_writer,
    options,
    weighting,
)
from retex_jax.offsets import budget as budgets
from retex_jax.offsets.forms import Orientation
from retex_jax.offsets.generator import LearnedForm
from retex_jax.offsets.state import LeafPlan, OffsetState, RankRule, plan_leaves, recover
from retex_jax.typing import Array, Params, ProgressFn

# What a fit notes in its file, because it costs passes over the experts.
_RANKS = "ranks"
_WEIGHTS = "weights"
_LEAVES = "leaves"


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    rank: int | None = None,
    rank_rule: RankRule = "paper",
    orientation: Orientation | Literal["auto"] = "right",
    form: LearnedForm = "product",
    task_rank: int | None = None,
    d_emb: int | None = None,
    budget: float | None = None,
    sharing: budgets.Sharing = "shared",
    task_weights: weighting.Rule | Sequence[float] = "equal",
    leaf_weights: weighting.LeafRule = "equal",
    calibration: Calibration | None = None,
    shrinkage: float = 1.0,
    solver: Literal["exact", "adam"] = "exact",
    base: str | Params = "weight_average",
    base_options: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    **solver_options: Any,
) -> OffsetState:
    """Merges the experts and fits one offset a task and leaf, so that each expert can be recovered.

    Needs no data, but for task_weights "divergence", leaf_weights "fisher" or a `shrinkage` below 1. Leaves below
    two axes are recovered exactly (by "adam": as far as it gets; in few bits, with form "shape_shared" or a small
    `d_emb`: as well as these can). Size is given by `rank`, as in the paper, or by `budget`.

    Args:
      experts: the experts.
      key: typed PRNG key; needed by solver "adam" only, `jax.random.key(0)` when not given.
      rank: target rank r of the matrix leaves, 64 when not given; the paper uses 256. Not with `budget`.
      rank_rule: for leaves of min(a, b) <= rank: "paper" halves min(a, b), "clip" takes all of it,
        which recovers leaves of b <= a exactly. Without effect with `budget`.
      orientation: where the shared factor stands: "right" (ReTeX), "left" (ReTeX-Alt), or "auto": on the
        longer side of each leaf.
      form: of matrix leaves: "product" (ReTeX), "factorized" (ReTeX-E), "shape_shared" (ReTeX-S; of all leaves),
        or "affine" (Eq. 13, which stores theta_0 as well). All but "product" take no budget and no
        task_weights.
      task_rank: r_g of "factorized", 1 to rank - 1.
      d_emb: size of the task embeddings; T when not given. By "exact" with form "product" only: below T - 1
        embeddings are shared by all leaves (see `retex_jax.offsets.tucker`), and bytes grow with d_emb
        instead of T; from T - 1 on it is the closed form.
      budget: what the offsets may take a task: a fraction of the merged model's bytes below 1, or a number
        of bytes. Ranks are then chosen leaf by leaf (see `retex_jax.offsets.budget`). By "exact" only.
      sharing: with a budget, whether tasks share a factor: "shared" (ReTeX), "separate", or "auto",
        whichever leaves less error.
      task_weights: of the tasks' errors: "equal"; "energy": each task's error relative to its own offset, so
        that tasks of small offsets do not starve; "divergence": by what the tasks' predictions lose, so that none
        starves, for three fits more (see `retex_jax.offsets.weighting`); or T positive numbers. By "exact" only.
      leaf_weights: with a budget, of the leaves' errors where ranks are chosen: "equal"; or "fisher": by how far
        the experts' predictions depend on a leaf, for a few backward passes.
      calibration: unlabelled training inputs of every task, with `logits` and `heads` for "divergence" and "fisher" and
        `linear_inputs` for a `shrinkage` below 1; not used without them.
      shrinkage: above 0, at most 1. Below 1 the errors of a linear layer are weighed by what it reads, the less
        the nearer to 1 (see `retex_jax.offsets.activations`), when ranks are chosen, in the solution and in the
        report; 1 is plain L2. By "exact" with form "product" only.
      solver: "exact" (the closed form or, for "factorized", "affine" and a small d_emb, alternating exact
        steps that never raise the error) or "adam" (the paper's loop).
      base: name of a merger, or a merged model (nested dict like the pretrained one).
      base_options: keywords of that merger.
      file: path of a safetensors file that takes merged model and factors as they are solved; the state's arrays
        are then mapped from it (see `retex_jax.offsets.factor_file`), so that neither needs memory. By "exact"
        with form "product", without `d_emb`.
      resume: with `file`: any text that tells these experts, calibration and base from others. A fit that was killed
        is then kept beside `file`, and the same fit goes on from its last finished leaves, to the same bits; one
        that is finished is opened.
      **solver_options: keywords of `offsets.exact.fit` (such as `bits`), of the form's own module
        (`factorized`, `shape_shared`, `affine`, `tucker`; such as `sweeps`), or of `offsets.adam.fit` (such as
        `objective`).

    Returns:
      The state; `state.report` has residual, optimum and ratio.

    Raises:
      ValueError: if `rank` is not from 1 to the largest min(a, b) of any leaf, the budget is too small for
        the leaves below two axes, an option is unknown, out of range or without meaning beside the others
        (all such are listed), or `base` does not fit the experts.
    """
    form_options = {"form": form, "task_rank": task_rank, "d_emb": d_emb}
    options.check(
        experts,
        rank=rank,
        budget=budget,
        sharing=sharing,
        task_weights=task_weights,
        leaf_weights=leaf_weights,
        shrinkage=shrinkage,
        solver=solver,
        base=base,
        file=file,
        resume=resume,
        solver_options=solver_options,
        **form_options,
    )
    rank = options.default_rank(rank, budget)
    base_options = base_options or {}
    inputs = None
    if needing := options.needing_data(task_weights, leaf_weights, shrinkage):
        inputs = require(calibration, " and ".join(needing), experts.num_tasks)
    if inputs and shrinkage < 1:
        require_linear_inputs(inputs, activations.NAME)
    identity = None
    if file is not None and resume is not None:
        tasks = task_weights if isinstance(task_weights, str) else [*map(float, task_weights)]
        sizes = (rank, rank_rule, orientation, budget, sharing, tasks, leaf_weights, shrinkage)
        drawn = None if key is None else jax.random.key_data(key).tolist()
        merging = base if isinstance(base, str) else None, base_options, drawn
        given = {name: x for name, x in solver_options.items() if name != "progress"}
        identity = _identity(experts, resume, sizes, merging, given)
        if (known := factor_file.load_finished(file, identity)) is not None:
            return known
    key = jax.random.key(0) if key is None else key
    plans = plan_leaves(experts.leaves, experts.layout, rank, rank_rule, orientation)
    if budget is not None:
        model_bytes = tree.param_bytes(dict(experts.leaves) if isinstance(base, str) else base)
        _bytes_for_ranks(experts, plans, model_bytes, budget, solver_options)
    function = options.solver_function(form, solver, d_emb)
    if function is not exact.fit:
        accepted = inspect.signature(function).parameters
        own = {"key": key, **form_options}
        own = {name: value for name, value in own.items() if name in accepted}
        merged = bases.merge(experts, key, base, base_options)
        return function(experts, merged, plans, **own, **solver_options)
    opened = contextlib.nullcontext()
    if file is not None:
        num_ranks = 0 if sharing == "shared" else experts.num_tasks
        room = factor_writer.room_for_fit(experts.leaves, num_ranks)
        opened = factor_writer.writing(file, room, identity)
    with opened as factors:
        merged = bases.merge(experts, key, base, base_options, factors)
        roots, leaves = {}, {}
        if inputs and shrinkage < 1:
            roots = activations.roots(inputs, merged, plans, shrinkage)
        if inputs and leaf_weights == "fisher":
            measure = partial(weighting.by_fisher, experts, inputs, list(plans))
            leaves = _noted(factors, _LEAVES, measure)
        solve = partial(_solve, experts, merged, plans, leaves, roots, budget, sharing)
        weights = weighting.without_data(experts, merged, task_weights)
        if inputs and weighting.needs_data(task_weights):
            num_fits = weighting.ROUNDS + 1

            def attempt(weights: np.ndarray, number: int) -> weighting.Recover:
                shown = _part_of_progress(solver_options, number, num_fits)
                return partial(recover, solve(weights, shown))

            find = partial(weighting.by_divergence, experts, inputs, weights, attempt, leaves)
            weights = np.asarray(_noted(factors, _WEIGHTS, lambda: find().tolist()))
            solver_options = _part_of_progress(solver_options, num_fits - 1, num_fits)
        state = solve(weights, solver_options, factors)
        if factors is not None:
            factors.finish(state, identity)
    return state


def _identity(experts: ExpertSet, *facts: Any) -> str:
    """Of what is known of a fit; numbers of NumPy are told apart as their texts are."""
    leaves = {name: (spec.shape, str(spec.dtype)) for name, spec in experts.leaves.items()}
    known = (experts.names, experts.layout, leaves, *facts)
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _solve(
    experts: ExpertSet,
    merged: Params,
    plans: dict[str, LeafPlan],
    leaf_weights: Mapping[str, float],
    roots: Mapping[str, Array],
    budget: float | None,
    sharing: budgets.Sharing,
    weights: np.ndarray,
    solver_options: Mapping[str, Any],
    factors: factor_writer.FactorFile | None = None,
) -> OffsetState:
    """Chooses the ranks, with a budget, and solves all leaves in closed form."""
    if budget is not None:
        sizes = (leaf_weights, roots, budget, sharing, weights, solver_options)
        spend = partial(_spend, experts, merged, plans, *sizes)
        plans = spend() if factors is None else _noted_ranks(factors, plans, spend)
    given = {**solver_options, "task_weights": weights, "roots": roots, "file": factors}
    return exact.fit(experts, merged, plans, **given)


def _part_of_progress(
    solver_options: Mapping[str, Any], number: int, num_fits: int
) -> dict[str, Any]:
    """The options of one of several fits, whose progress is told as a part of that of all."""
    progress: ProgressFn | None = solver_options.get("progress")
    if progress is None:
        return {**solver_options}

    def show(done: int, total: int) -> None:
        progress(number * total + done, num_fits * total)

    return {**solver_options, "progress": show}


def _noted(factors: factor_writer.FactorFile | None, name: str, find: Callable[[], Any]) -> Any:
    """A JSON value that the file's earlier fit has noted; or a new one, which it then notes."""
    if factors is None:
        return find()
    if name not in factors.notes:
        factors.note(name, find())
    return factors.notes[name]


def _noted_ranks(
    factors: factor_writer.FactorFile,
    plans: Mapping[str, LeafPlan],
    spend: Callable[[], dict[str, LeafPlan]],
) -> dict[str, LeafPlan]:
    """The plans with the ranks that the file's earlier fit has noted; or new ones, which it then notes."""
    if _RANKS in factors.notes:
        return {
            name: replace(plans[name], rank=own, orientation=side, task_ranks=ranks and (*ranks,))
            for name, (own, side, ranks) in factors.notes[_RANKS].items()
        }
    chosen = spend()
    ranks = {name: (plan.rank, plan.orientation, plan.task_ranks) for name, plan in chosen.items()}
    factors.note(_RANKS, ranks)
    return chosen


def _spend(
    experts: ExpertSet,
    merged: Params,
    plans: dict[str, LeafPlan],
    leaf_weights: Mapping[str, float],
    roots: Mapping[str, Array],
    budget: float,
    sharing: budgets.Sharing,
    weights: np.ndarray,
    solver_options: Mapping[str, Any],
) -> dict[str, LeafPlan]:
    total = _bytes_for_ranks(experts, plans, tree.param_bytes(merged), budget, solver_options)
    base = tree.flatten(merged)
    measured = {}
    for name, plan in plans.items():
        offsets = differences.matrices(experts, base, name, plan)
        offsets = activations.whiten(offsets, roots.get(name), plan.orientation)
        measured[name] = budgets.spectra(offsets, leaf_weights.get(name, 1) * weights, sharing)
    bits = solver_options.get("bits", 32)
    return budgets.allocate(plans, measured, total, bits=bits, sharing=sharing)


def _bytes_for_ranks(
    experts: ExpertSet,
    plans: Mapping[str, LeafPlan],
    model_bytes: int,
    budget: float,
    solver_options: Mapping[str, Any],
) -> float:
    """What a budget leaves for the factors of all tasks.

    Raises:
      ValueError: if that is nothing.
    """
    vector_bits, num_tasks = solver_options.get("vector_bits", 32), experts.num_tasks
    fixed = budgets.fixed_bytes(experts.leaves, plans, num_tasks, vector_bits)
    total = num_tasks * (budget * model_bytes if budget < 1 else budget)
    if total <= fixed:
        raise ValueError(
            f"budget: got {budget!r}, {total:.0f} bytes in all, but the leaves below two axes take "
            f"{fixed} at vector_bits = {vector_bits}"
        )
    return total - fixed
