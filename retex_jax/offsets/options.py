"""What is wrong with the options of `offsets.fit`: all of it, before any work."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, get_args

import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import (
    activations,
    adam,
    affine,
    alternating,
    bases,
    budget,
    exact,
    factorized,
    shape_shared,
    tucker,
    weighting,
)
from retex_jax.offsets.generator import LearnedForm
from retex_jax.offsets.state import OffsetState
from retex_jax.typing import Params

_RANK = 64

_EXACT = {
    "product": exact.fit,
    "factorized": factorized.fit,
    "shape_shared": shape_shared.fit,
    "affine": affine.fit,
}

_CHECKS = {
    exact.fit: exact.check_settings,
    adam.fit: adam.check_settings,
    **dict.fromkeys((factorized.fit, affine.fit, tucker.fit), alternating.check_settings),
}

# Of the functions that solve: what `offsets.fit` gives them, not its caller.
_GIVEN = {
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


def default_rank(rank: int | None, budget: float | None) -> int:
    """The rank that leaves are planned with: with a budget the least, which it then changes."""
    if rank is not None:
        return rank
    return _RANK if budget is None else 1


def solver_function(form: str, solver: str, d_emb: int | None) -> Callable[..., OffsetState]:
    """The function that solves all leaves."""
    if solver == "adam":
        return adam.fit
    return _EXACT[form] if d_emb is None else tucker.fit


def needing_data(task_weights: Any, leaf_weights: str, shrinkage: float) -> list[str]:
    """What needs inputs of every task, in words; it may be nothing."""
    is_used = {
        weighting.TASK_NAME: weighting.needs_data(task_weights),
        weighting.LEAF_NAME: leaf_weights == "fisher",
        activations.NAME: shrinkage < 1,
    }
    return [name for name, used in is_used.items() if used]


def check(
    experts: ExpertSet,
    *,
    rank: int | None,
    form: str,
    task_rank: int | None,
    d_emb: int | None,
    budget: float | None,
    sharing: str,
    task_weights: weighting.Rule | Sequence[float],
    leaf_weights: str,
    shrinkage: float,
    solver: str,
    base: str | Params,
    file: str | os.PathLike[str] | None,
    resume: str | None,
    solver_options: Mapping[str, Any],
) -> None:
    """Checks the options of `offsets.fit`, which says what they are.

    Raises:
      ValueError: listing all that are unknown, out of range or without meaning beside the others.
    """
    problems = [
        *_size_problems(rank, budget, sharing),
        *_task_weight_problems(task_weights, experts.num_tasks),
        *_leaf_weight_problems(leaf_weights, budget),
        *_solver_problems(solver, budget, task_weights),
        *_form_problems(form, task_rank, default_rank(rank, budget), budget, task_weights),
        *_embedding_problems(d_emb, form, solver, budget, task_weights),
        *_shrinkage_problems(shrinkage, form, d_emb, solver),
        *_file_problems(file, resume, form, d_emb, solver),
        *bases.problems(experts, base),
    ]
    objective = solver_options.get("objective", "l2") if solver == "adam" else "l2"
    if not experts.has_pretrained and (form == "affine" or objective != "l2"):
        problems.append(
            f"pretrained: got None, which form = {form!r} with objective = {objective!r} reads"
        )
    if form in _EXACT and solver in ("exact", "adam"):
        problems += _settings_problems(solver_function(form, solver, d_emb), d_emb, solver_options)
    if problems:
        raise ValueError("\n".join(problems))


def _size_problems(rank: Any, budget_: Any, sharing: str) -> list[str]:
    problems = []
    if sharing not in get_args(budget.Sharing):
        problems.append(f"sharing: got {sharing!r}, expected one of {get_args(budget.Sharing)}")
    if budget_ is None:
        if sharing != "shared":
            problems.append(f"sharing: got {sharing!r} without a budget, expected 'shared'")
        return problems
    if not 0 < budget_ < float("inf"):
        problems.append(
            f"budget: got {budget_!r}, expected a fraction of the model, or bytes, a task"
        )
    if rank is not None:
        problems.append(f"rank: got {rank!r} beside budget = {budget_!r}, expected one of the two")
    return problems


def _task_weight_problems(task_weights: Any, num_tasks: int) -> list[str]:
    if isinstance(task_weights, str):
        rules = get_args(weighting.Rule)
        is_known = task_weights in rules
        expected = f"{', '.join(map(repr, rules))} or {num_tasks} numbers"
    else:
        is_known = np.shape(task_weights) == (num_tasks,)
        is_known = is_known and all(0 < weight < float("inf") for weight in task_weights)
        expected = f"{num_tasks} positive numbers"
    return [] if is_known else [f"task_weights: got {task_weights!r}, expected {expected}"]


def _leaf_weight_problems(leaf_weights: Any, budget_: Any) -> list[str]:
    rules = get_args(weighting.LeafRule)
    if leaf_weights not in rules:
        return [f"leaf_weights: got {leaf_weights!r}, expected one of {rules}"]
    if leaf_weights != "equal" and budget_ is None:
        return [f"leaf_weights: got {leaf_weights!r} without a budget, expected 'equal'"]
    return []


def _form_problems(
    form: str, task_rank: Any, rank: int, budget_: Any, task_weights: Any
) -> list[str]:
    problems = []
    if form not in _EXACT:
        problems.append(f"form: got {form!r}, expected one of {get_args(LearnedForm)}")
    elif form != "product":
        if budget_ is not None:
            problems.append(f"budget: got {budget_!r} with form = {form!r}, expected 'product'")
        if _are_weighted(task_weights):
            problems.append(
                f"task_weights: got {task_weights!r} with form = {form!r}, expected 'equal'"
            )
    if form != "factorized" and task_rank is not None:
        problems.append(f"task_rank: got {task_rank!r} with form = {form!r}, expected 'factorized'")
    elif form == "factorized" and not (_is_count(task_rank) and task_rank < rank):
        problems.append(f"task_rank: got {task_rank!r}, expected an integer from 1 to {rank - 1}")
    return problems


def _solver_problems(solver: str, budget_: Any, task_weights: Any) -> list[str]:
    if solver not in ("exact", "adam"):
        return [f"solver: got {solver!r}, expected 'exact' or 'adam'"]
    if solver == "adam" and (budget_ is not None or _are_weighted(task_weights)):
        return ["solver: 'adam' takes no budget and no task_weights"]
    return []


def _embedding_problems(
    d_emb: Any, form: str, solver: str, budget_: Any, task_weights: Any
) -> list[str]:
    if d_emb is None or solver == "adam":
        return []
    problems = []
    if not _is_count(d_emb):
        problems.append(f"d_emb: got {d_emb!r}, expected an integer of 1 or more")
    if form != "product" or budget_ is not None or _are_weighted(task_weights):
        problems.append(
            f"d_emb: got {d_emb!r}, which solver 'exact' takes with form 'product', without a budget and "
            "task_weights"
        )
    return problems


def _shrinkage_problems(shrinkage: Any, form: str, d_emb: Any, solver: str) -> list[str]:
    if not 0 < shrinkage <= 1:
        return [f"shrinkage: got {shrinkage!r}, expected a number above 0, at most 1"]
    if shrinkage < 1 and not _is_closed_form(form, d_emb, solver):
        return [
            f"shrinkage: got {shrinkage!r}, which solver 'exact' takes with form 'product', without d_emb; "
            "expected 1"
        ]
    return []


def _file_problems(file: Any, resume: Any, form: str, d_emb: Any, solver: str) -> list[str]:
    if file is None:
        return [] if resume is None else [f"resume: got {resume!r} without a file"]
    if _is_closed_form(form, d_emb, solver):
        return []
    return [f"file: got {file!r}, which solver 'exact' takes with form 'product', without d_emb"]


def _settings_problems(
    function: Callable[..., OffsetState], d_emb: Any, solver_options: Mapping[str, Any]
) -> list[str]:
    """What is wrong with the keywords of the function that solves."""
    keywords = inspect.signature(function).parameters
    known = set(keywords) - _GIVEN
    problems = [
        f"{name}: no such option, expected {sorted(known)}{tree.did_you_mean(name, known)}"
        for name in solver_options
        if name not in known
    ]
    check_settings = _CHECKS.get(function)
    if check_settings is None:
        return problems
    accepted = inspect.signature(check_settings).parameters
    given = {"d_emb": d_emb, **solver_options}
    try:
        check_settings(**{name: x for name, x in given.items() if name in accepted})
    except ValueError as error:
        problems.append(str(error))
    return problems


def _is_closed_form(form: str, d_emb: Any, solver: str) -> bool:
    return form == "product" and d_emb is None and solver == "exact"


def _are_weighted(task_weights: Any) -> bool:
    return not isinstance(task_weights, str) or task_weights != "equal"


def _is_count(value: Any) -> TypeGuard[int]:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_integer and int(value) >= 1
