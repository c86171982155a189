"""What would stop mergers and offsets later; for `retex_jax.preflight`."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from retex_jax import models, offsets, tree
from retex_jax.experiment import Settings
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS
from retex_jax.offsets import adam, coding, exact
from retex_jax.offsets import budget as budgets
from retex_jax.offsets.state import plan_leaves

_GIVEN_BY_THE_PROGRAM = {
    "key",
    "checkpoints",
    "progress",
    "task_weights",
    "roots",
    "file",
    "preempted",
    "mesh",
}


def problems(settings: Settings, model: Any) -> list[str]:
    """Looks at settings["baselines"] and settings["offsets"]; options are tried on the smallest experts.

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
    size |= {name: spec[name] for name in ("sharing", "task_weights")}
    found += _failure("offsets", lambda: offsets.fit(_toy_experts(), **size))
    if model is not None:
        found += _budget_problems(spec, leaves, len(settings["tasks"]))
    found += _unknown_options("offsets.adam", spec["adam"], adam.fit) or _failure(
        "offsets.adam", lambda: adam.check_settings(**spec["adam"])
    )
    return found


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


def _toy_experts() -> ExpertSet:
    """The smallest experts, to try options on."""
    pretrained_params = {"kernel": np.eye(2, dtype=np.float32)}
    return ExpertSet.from_trees(pretrained_params, [{"kernel": np.ones((2, 2), np.float32)}])


def _failure(where: str, attempt: Callable[[], Any]) -> list[str]:
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return [f"{where}: {line}" for line in str(error).splitlines()]
    return []


def _unknown_options(where: str, options: Mapping[str, Any], function: Any) -> list[str]:
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _GIVEN_BY_THE_PROGRAM
    ]
    return [
        f"{where}.{name}: unknown, expected some of {known}"
        for name in options
        if name not in known
    ]
