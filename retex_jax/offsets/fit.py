"""Fits ReTeX's offsets (arXiv:2606.26902, section 4.1): merge, plan the ranks, solve."""

import contextlib
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal, get_args

import jax
import numpy as np

from retex_jax import tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.mergers import LEAFWISE, MERGERS
from retex_jax.offsets import (
    activations,
    adam,
    affine,
    alternating,
    differences,
    exact,
    factor_file,
    factor_writer,
    factorized,
    shape_shared,
    tucker,
)
from retex_jax.offsets import budget as budgets
from retex_jax.offsets.coding import coded_bytes
from retex_jax.offsets.forms import Orientation
from retex_jax.offsets.generator import LearnedForm
from retex_jax.offsets.state import LeafPlan, OffsetState, RankRule, plan_leaves
from retex_jax.typing import Array, Params

_RANK = 64
# What a fit with a budget notes in its file, because it costs a pass over the experts.
_RANKS = "ranks"
# Of leaves that are merged before they go into the file.
_MERGED_BYTES = 1 << 26

_EXACT = {
    "product": exact.fit,
    "factorized": factorized.fit,
    "shape_shared": shape_shared.fit,
    "affine": affine.fit,
}


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
    task_weights: Literal["equal", "energy"] | Sequence[float] = "equal",
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

    Needs no data, but for a `shrinkage` below 1. Leaves below two axes are recovered exactly (by "adam": as far as
    it gets; in few bits, with form "shape_shared" or a small `d_emb`: as well as these can). Size is given by
    `rank`, as in the paper, or by `budget`.

    Args:
      experts: the experts.
      key: typed PRNG key; needed by solver "adam" only, `jax.random.key(0)` when not given.
      rank: target rank r of the matrix leaves, 64 when not given; the paper uses 256. Not with `budget`.
      rank_rule: for leaves of min(a, b) <= rank: "paper" halves min(a, b), "clip" takes all of it,
        which recovers leaves of b <= a exactly.
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
        that tasks of small offsets do not starve; or T positive numbers. By "exact" only.
      calibration: unlabelled training inputs of every task, and `linear_inputs`; not used at shrinkage 1.
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
    problems = _problems(experts, rank, budget, sharing, task_weights, solver)
    if rank is None:
        rank = _RANK if budget is None else 1
    problems += _form_problems(form, task_rank, d_emb, rank, budget, task_weights, solver)
    problems += _shrinkage_problems(shrinkage, form, d_emb, solver)
    if file is not None and (solver == "adam" or form != "product" or d_emb is not None):
        problems.append(
            f"file: got {file!r}, which solver 'exact' takes with form 'product', without d_emb"
        )
    if resume is not None and file is None:
        problems.append(f"resume: got {resume!r} without a file")
    if problems:
        raise ValueError("\n".join(problems))
    weighing = None if shrinkage == 1 else require(calibration, activations.NAME, experts.num_tasks)
    is_tucker = solver == "exact" and d_emb is not None
    function = adam.fit if solver == "adam" else tucker.fit if is_tucker else _EXACT[form]
    _check_options(solver_options, function)
    if function is exact.fit:
        settings = ("precision", "bits", "vector_bits")
        given = {name: solver_options[name] for name in settings if name in solver_options}
        exact.check_settings(**given)
    if "sweeps" in inspect.signature(function).parameters:
        alternating.check_settings(
            solver_options.get("sweeps", alternating.SWEEPS),
            solver_options.get("tolerance", alternating.TOLERANCE),
        )
    identity = None
    if file is not None and resume is not None:
        tasks = task_weights if isinstance(task_weights, str) else [*map(float, task_weights)]
        sizes = (rank, rank_rule, orientation, budget, sharing, tasks, shrinkage)
        drawn = None if key is None else jax.random.key_data(key).tolist()
        bases = base if isinstance(base, str) else None, base_options, drawn
        options = {name: x for name, x in solver_options.items() if name != "progress"}
        identity = _identity(experts, resume, sizes, bases, options)
        if (known := factor_file.load_finished(file, identity)) is not None:
            return known
    key = jax.random.key(0) if key is None else key
    plans = plan_leaves(experts.leaves, experts.layout, rank, rank_rule, orientation)
    leafwise = base if file is not None and isinstance(base, str) and base in LEAFWISE else None
    merged = {} if leafwise else _merge(experts, key, base, base_options or {})
    if solver == "adam":
        sizes = {"form": form, "task_rank": task_rank, "d_emb": d_emb}
        return adam.fit(experts, merged, plans, key=key, **sizes, **solver_options)
    if d_emb is not None:
        return tucker.fit(experts, merged, plans, d_emb=d_emb, **solver_options)
    if task_rank is not None:
        return factorized.fit(experts, merged, plans, task_rank=task_rank, **solver_options)
    if form != "product":
        return _EXACT[form](experts, merged, plans, **solver_options)
    opened = contextlib.nullcontext()
    if file is not None:
        opened = factor_writer.writing(file, experts.leaves, identity)
    with opened as factors:
        if factors is not None and leafwise:
            merged = _merge_into(factors, experts, key, leafwise, base_options or {})
        elif factors is not None:
            merged = factors.put_merged(merged)
        weights = _weights(experts, merged, task_weights)
        roots = activations.roots(weighing, merged, plans, shrinkage) if weighing else {}
        if budget is not None and factors is not None and _RANKS in factors.notes:
            plans = {
                name: replace(
                    plans[name], rank=own, orientation=side, task_ranks=ranks and (*ranks,)
                )
                for name, (own, side, ranks) in factors.notes[_RANKS].items()
            }
        elif budget is not None:
            plans = _spend(experts, merged, plans, weights, roots, budget, sharing, solver_options)
            if factors is not None:
                chosen = {
                    name: (plan.rank, plan.orientation, plan.task_ranks)
                    for name, plan in plans.items()
                }
                factors.note(_RANKS, chosen)
        given = {**solver_options, "task_weights": weights, "roots": roots, "file": factors}
        state = exact.fit(experts, merged, plans, **given)
        if factors is not None:
            factors.finish(state, identity)
    return state


def _identity(experts: ExpertSet, *facts: Any) -> str:
    """Of what is known of a fit; numbers of NumPy are told apart as their texts are."""
    leaves = {name: (spec.shape, str(spec.dtype)) for name, spec in experts.leaves.items()}
    known = (experts.names, experts.layout, leaves, *facts)
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _problems(
    experts: ExpertSet, rank: Any, budget: Any, sharing: str, task_weights: Any, solver: str
) -> list[str]:
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
    if solver == "adam" and (budget is not None or _weighted(task_weights)):
        problems.append("solver: 'adam' takes no budget and no task_weights")
    return problems


def _form_problems(
    form: str, task_rank: Any, d_emb: Any, rank: Any, budget: Any, task_weights: Any, solver: str
) -> list[str]:
    problems = []
    if form not in get_args(LearnedForm):
        problems.append(f"form: got {form!r}, expected one of {get_args(LearnedForm)}")
    elif form != "product":
        if budget is not None:
            problems.append(f"budget: got {budget!r} with form = {form!r}, expected 'product'")
        if _weighted(task_weights):
            problems.append(
                f"task_weights: got {task_weights!r} with form = {form!r}, expected 'equal'"
            )
    if form != "factorized" and task_rank is not None:
        problems.append(f"task_rank: got {task_rank!r} with form = {form!r}, expected 'factorized'")
    elif form == "factorized" and not (_is_count(task_rank) and task_rank < rank):
        problems.append(f"task_rank: got {task_rank!r}, expected an integer from 1 to {rank - 1}")
    if d_emb is None or solver == "adam":
        return problems
    if not _is_count(d_emb):
        problems.append(f"d_emb: got {d_emb!r}, expected an integer of 1 or more")
    if form != "product" or budget is not None or _weighted(task_weights):
        problems.append(
            f"d_emb: got {d_emb!r}, which solver 'exact' takes with form 'product', without a budget and "
            "task_weights"
        )
    return problems


def _shrinkage_problems(shrinkage: Any, form: str, d_emb: Any, solver: str) -> list[str]:
    if not 0 < shrinkage <= 1:
        return [f"shrinkage: got {shrinkage!r}, expected a number above 0, at most 1"]
    if shrinkage < 1 and (solver == "adam" or form != "product" or d_emb is not None):
        return [
            f"shrinkage: got {shrinkage!r}, which solver 'exact' takes with form 'product', without d_emb; "
            "expected 1"
        ]
    return []


def _weighted(task_weights: Any) -> bool:
    return not isinstance(task_weights, str) or task_weights != "equal"


def _is_count(value: Any) -> bool:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_integer and int(value) >= 1


def _weights(
    experts: ExpertSet, merged: Params, given: Literal["equal", "energy"] | Sequence[float]
) -> np.ndarray:
    """[T], float64, of mean square 1."""
    if isinstance(given, str):
        ones = np.ones(experts.num_tasks)
        weights = ones if given == "equal" else _inverse_norms(experts, merged)
    else:
        weights = np.asarray(given, np.float64)
    return weights / np.sqrt(np.mean(weights**2))


def _inverse_norms(experts: ExpertSet, merged: Params) -> np.ndarray:
    base, energies = tree.flatten(merged), np.zeros(experts.num_tasks)
    for name in experts.float_leaves:
        squares = differences.vectors(experts, base, name) ** 2
        energies += np.asarray(squares.reshape(experts.num_tasks, -1).sum(axis=1), np.float64)
    # A task without an offset needs nothing, whatever its weight.
    return 1 / np.sqrt(np.where(energies > 0, energies, energies.max() or 1.0))


def _spend(
    experts: ExpertSet,
    merged: Params,
    plans: dict[str, LeafPlan],
    weights: np.ndarray,
    roots: Mapping[str, Array],
    budget: float,
    sharing: budgets.Sharing,
    options: Mapping[str, Any],
) -> dict[str, LeafPlan]:
    bits, vector_bits = options.get("bits", 32), options.get("vector_bits", 32)
    model_bytes, num_tasks = tree.param_bytes(merged), experts.num_tasks
    vectors = [experts.leaves[name].shape for name in experts.float_leaves if name not in plans]
    # What does not depend on ranks: embeddings, offsets and shared scalars of vectors, the last byte of codes.
    fixed = 4 * num_tasks**2 + 4 * len(vectors) + 2 * len(plans)
    fixed += sum(
        coded_bytes(num_tasks * prod(shape), num_tasks, vector_bits if shape else 32)
        for shape in vectors
    )
    total = num_tasks * (budget * model_bytes if budget < 1 else budget)
    if total <= fixed:
        raise ValueError(
            f"budget: got {budget!r}, {total:.0f} bytes in all, but the leaves below two axes take "
            f"{fixed} at vector_bits = {vector_bits}"
        )
    base = tree.flatten(merged)
    measured = {}
    for name, plan in plans.items():
        offsets = differences.matrices(experts, base, name, plan)
        offsets = activations.whiten(offsets, roots.get(name), plan.orientation)
        measured[name] = budgets.spectra(offsets, weights, sharing)
    return budgets.allocate(plans, measured, total - fixed, bits=bits, sharing=sharing)


def _check_options(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    known = set(inspect.signature(function).parameters) - {
        "experts",
        "merged",
        "plans",
        "key",
        "task_weights",
        "roots",
        "form",
        "task_rank",
        "d_emb",
        "file",
    }
    for name in options:
        if name not in known:
            suggestion = tree.did_you_mean(name, known)
            raise ValueError(f"{name}: no such option, expected {sorted(known)}{suggestion}")


def _merge_into(
    factors: factor_writer.FactorFile,
    experts: ExpertSet,
    key: jax.Array,
    base: str,
    options: Mapping[str, Any],
) -> Params:
    """As `_merge` of one of LEAFWISE, some leaves at a time, which go into the file: no whole model is in memory."""
    merged: dict[str, Array] = {}
    for names in _by_bytes(experts):
        part = _merge(experts.only(names), key, base, options)
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
