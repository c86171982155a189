"""What would stop mergers and offsets later; for `retex_jax.preflight`."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from retex_jax import models, offsets, tree, variants
from retex_jax.experiment import Settings
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS, adamerging
from retex_jax.methods import METHODS
from retex_jax.offsets import adam, coding, exact
from retex_jax.offsets import budget as budgets
from retex_jax.offsets import options as offset_options
from retex_jax.offsets.state import plan_leaves

_GIVEN_BY_THE_PROGRAM = {
    "key",
    "calibration",
    "checkpoints",
    "progress",
    "task_weights",
    "roots",
    "file",
    "preempted",
    "mesh",
}


def problems(settings: Settings, model: Any) -> list[str]:
    """Looks at baselines, offsets and what is planned to be compared; options are tried on the smallest experts.

    Args:
      settings: the experiment.
      model: Linen module; None where it is not known, nor then what depends on its shapes.

    Returns:
      One line each.
    """
    found = []
    for name, options in settings["baselines"].items():
        found += _merger_problems("baselines", name, f"baselines.{name}", options)
    spec = settings["offsets"]
    found += _merger_problems(
        "offsets.base", spec["base"], "offsets.base_options", spec["base_options"]
    )
    leaves: Mapping[str, Any] = _toy_experts().leaves
    ranks = (1,)
    if model is not None:
        leaves = tree.flatten(models.expected_params(model))
        ranks = (spec["rank"], *spec["extra_ranks"])
    for rank in ranks:
        try:
            plan_leaves(leaves, "flax", rank, spec["rank_rule"], spec["orientation"])
        except ValueError as error:
            found.append(f"offsets.{error}")
    if spec["solver"] not in ("exact", "adam"):
        found.append(f"offsets.solver: got {spec['solver']!r}, expected 'exact' or 'adam'")
    if spec["solver"] == "adam" and (spec["budget"] or spec["task_weights"] != "equal"):
        found.append("offsets.solver: 'adam' takes no offsets.budget and no offsets.task_weights")
    found += _unknown_options("offsets.exact", spec["exact"], exact.fit) or _failure(
        "offsets.exact", lambda: offsets.fit(_toy_experts(), rank=1, **spec["exact"])
    )
    # The toy experts are smaller than any fraction of them: what is positive counts as bytes enough.
    budget = 1e6 if 0 < spec["budget"] < float("inf") else spec["budget"]
    size: dict[str, Any] = {"budget": budget} if budget else {"rank": 1}
    further = ("sharing", "task_weights", "leaf_weights")
    size |= {name: spec[name] for name in further if name in spec}
    found += _failure("offsets", lambda: _fit_without_data(offsets.fit, _toy_experts(), size))
    if model is not None:
        found += _budget_problems(spec, leaves, len(settings["tasks"]))
    found += _unknown_options("offsets.adam", spec["adam"], adam.fit) or _failure(
        "offsets.adam", lambda: adam.check_settings(**spec["adam"])
    )
    return found + _variant_problems(settings, leaves)


def _variant_problems(settings: Settings, leaves: Mapping[str, Any]) -> list[str]:
    """Tries the planned entries of methods whose options the experiment sets, as far as that takes no data."""
    try:
        entries = variants.plan(settings)
    except ValueError as error:
        return str(error).splitlines()
    experts = _toy_experts(max(1, len(settings["tasks"])))
    changed = {*settings["method_options"], *(name for name, *_ in settings["extra_variants"])}
    found: dict[str, str] = {}  # by what is wrong: one of the entries where it is
    for entry in entries:
        if entry.method not in changed or entry in variants.VARIANTS:
            continue
        where = f"methods: {entry.method}"
        searched = {name: values[0] for name, values in entry.grid.items() if len(values)}
        if entry.method == "retex":
            options = {**entry.options, **searched}
            lines = _failure(
                entry.name, lambda options=options: _try_offsets(experts, leaves, options)
            )
        else:
            lines = _unknown_options(where, {**entry.options, **searched}, *_takers(entry.method))
            lines = lines or _failure(entry.name, lambda entry=entry: _try_method(experts, entry))
        for line in lines:
            found.setdefault(line.removeprefix(entry.name), line)
    return [line if line.startswith("methods") else f"methods: {line}" for line in found.values()]


def _takers(method: str) -> list[Callable[..., Any]]:
    """The functions that take a method's options between them."""
    further = [adamerging.fit_coefficients] if method == "adamerging" else []
    return [METHODS[method].fit, *further]


def _try_method(experts: ExpertSet, entry: variants.Entry) -> None:
    """Fits an entry with room enough."""
    room = {
        name: 1e6
        for name in ("amr", "bytes_per_task")
        if 0 < (entry.options.get(name) or 0) < float("inf")
    }
    _fit_without_data(METHODS[entry.method].fit, experts, {**entry.options, **room})


def _fit_without_data(
    fit: Callable[..., Any], experts: ExpertSet, options: Mapping[str, Any]
) -> None:
    """What needs data is fitted as far as to where that is asked for."""
    try:
        fit(experts, **options)
    except ValueError as error:
        if not str(error).startswith("calibration: got None"):
            raise


def _try_offsets(experts: ExpertSet, leaves: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Checks options of `offsets.fit`, and ranks on the model's own leaves."""
    given = {
        name: options.get(name, parameter.default)
        for name, parameter in inspect.signature(offsets.fit).parameters.items()
        if parameter.default is not parameter.empty
    }
    rest = {name: value for name, value in options.items() if name not in given}
    checked = inspect.signature(offset_options.check).parameters
    known = {name: value for name, value in given.items() if name in checked}
    offset_options.check(experts, **known, solver_options=rest)
    rank = offset_options.default_rank(given["rank"], given["budget"])
    plan_leaves(leaves, "flax", rank, given["rank_rule"], given["orientation"])


def _budget_problems(
    spec: Mapping[str, Any], leaves: Mapping[str, Any], num_tasks: int
) -> list[str]:
    """Whether offsets.budget has room for what is stored at any rank."""
    budget, bits = spec["budget"], spec["exact"].get("vector_bits", 32)
    if budget <= 0 or not num_tasks or bits not in coding.BITS:
        return []
    plans, model_bytes = plan_leaves(leaves, "flax", 1), tree.param_bytes(leaves)
    least = budgets.fixed_bytes(leaves, plans, num_tasks, bits) / num_tasks
    if (budget * model_bytes if budget < 1 else budget) > least:
        return []
    given = "" if budget < 1 else ", which is in bytes"
    return [
        f"offsets.budget: got {budget}{given}, expected {_rounded_up(least / model_bytes)} of the model or "
        f"more: the leaves below two axes take that at offsets.exact.vector_bits = {bits}"
    ]


def _rounded_up(value: float) -> float:
    """To three digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{(math.floor(value / unit) + 1) * unit:.3g}")


def _merger_problems(what: str, name: str, where: str, options: Mapping[str, Any]) -> list[str]:
    if name not in MERGERS:
        hint = tree.did_you_mean(name, MERGERS)
        return [f"{what}: got {name!r}, expected one of {sorted(MERGERS)}{hint}"]
    return _unknown_options(where, options, MERGERS[name]) or _failure(
        where, lambda: MERGERS[name](_toy_experts(), **options)
    )


def _toy_experts(num_tasks: int = 1) -> ExpertSet:
    """The smallest experts, to try options on."""
    pretrained_params = {"kernel": np.eye(2, dtype=np.float32)}
    expert = {"kernel": np.ones((2, 2), np.float32)}
    return ExpertSet.from_trees(pretrained_params, [expert] * num_tasks)


def _failure(where: str, attempt: Callable[[], Any]) -> list[str]:
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return [f"{where}: {line}" for line in str(error).splitlines()]
    return []


def _unknown_options(where: str, options: Mapping[str, Any], *functions: Any) -> list[str]:
    known = dict.fromkeys(
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _GIVEN_BY_THE_PROGRAM
    )
    return [
        f"{where}.{name}: unknown, expected some of {list(known)}{tree.did_you_mean(name, known)}"
        for name in options
        if name not in known
    ]
