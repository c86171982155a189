"""Which rules `retex_jax.unseen` compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import (
    collection,
    experiment,
    logging,
    offsets,
    pretrained,
    tree,
    variants,
)
from retex_jax.identifier import IDENTIFIERS
from retex_jax.identifier import weights as seen_weights
from retex_jax.mergers import MERGERS
from retex_jax.methods import METHODS
from retex_jax.unseen import transfer
from retex_jax.unseen.case import Case

PRETRAINED = "pretrained"
OWN = "own expert"
STATIC = (*MERGERS, "fisher", "regmean", "adamerging")
"""The methods of one model for all tasks."""

_MIXED = ("dts_t", "dts_d")
_CLASS_NAMES = "class names"
_TEXT = "weights by class names"
_INPUTS_OF_TASK = "unlabelled training inputs of the task"
_VALIDATION = "labelled validation inputs of seen tasks"


class Made(NamedTuple):
    """A rule that is fitted.

    Attributes:
      features: of any task's inputs.
      bytes_per_task: beside one model, divided by the number of seen tasks.
      seconds: of the fit of the merged model or of what is mixed.
      facts: what else the row tells.
    """

    features: transfer.Features
    bytes_per_task: float = 0.0
    seconds: float = 0.0
    facts: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
      method: name in METHODS, `PRETRAINED` or `OWN`.
      variant: options and weights in words.
      needs: the data that it takes, but for the training inputs that make the heads of unseen tasks.
      make: fits it on the seen tasks of a split.
    """

    method: str
    variant: str
    needs: str
    make: Callable[[Case], Made]

    @property
    def name(self) -> str:
        """Identifies the rule."""
        return f"{self.method} {self.variant}".strip()


def make_row(case: Case, rule: Rule, clock: logging.Clock) -> dict[str, Any]:
    """Fits a rule on a split's seen tasks and evaluates it on all tasks.

    Returns:
      What results.json has of it: "unseen" and "seen" are accuracies a task.
    """
    with clock("fit"):
        made = rule.make(case)
    with clock("evaluate"):
        accuracy = transfer.accuracies(case.world, made.features)
    return {
        "method": rule.method,
        "variant": rule.variant,
        "needs": rule.needs,
        "unseen": {task: accuracy[task] for task in case.unseen},
        "seen": {task: accuracy[task] for task in case.seen},
        "bytes_per_task": made.bytes_per_task,
        "model_bytes": tree.param_bytes(case.backbone.params),
        "seconds_fit": made.seconds,
        "commit": logging.commit(),
        **made.facts,
    }


def has_text(backbone: pretrained.Backbone, collected: collection.Collection) -> bool:
    """Whether class names can be embedded: the model reads texts, or every head was made of them."""
    return backbone.encode is not None or all(map(transfer.is_zero_shot, collected.heads.values()))


def plan(settings: experiment.Settings, *, text: bool = True) -> list[Rule]:
    """What is compared.

    Args:
      settings: `methods` and `method_options` as for `variants.plan`. Of a static merger's variants the last one is
        taken, on task vectors and unsearched. ReTeX and DTS come as the experiment's `offsets` and `identifier`
        have them.
      text: whether class names can be embedded; without, rules that do are left out.

    Returns:
      In the order of the table.

    Raises:
      ValueError: as `variants.plan`.
    """
    unsearched = {**settings, "search": {**settings["search"], "enabled": False}}
    entries = [entry for entry in variants.plan(unsearched) if entry.origin is None]
    static = {entry.method: entry for entry in entries if entry.method in STATIC}
    rules = [Rule(PRETRAINED, "", "none", _pretrained), *map(_static, static.values())]
    methods = {entry.method for entry in entries}
    if "retex" in methods:
        rules += _offset_rules(settings["identifier"]["kind"])
        rules += [Rule("retex", _TEXT, _CLASS_NAMES, _offsets_by_text)] if text else []
    if text:
        given = settings["method_options"]
        rules += [
            _mixed_by_text(variants.Entry(method, given.get(method, {})))
            for method in _MIXED
            if method in methods
        ]
    return [*rules, Rule(OWN, "", "the unseen task's own expert", _own)]


def _pretrained(case: Case) -> Made:
    params = case.bench.experts(None).pretrained_params()
    return Made(transfer.of_params(case.world, lambda _: params))


def _own(case: Case) -> Made:
    experts = case.collected.experts
    features = transfer.of_params(
        case.world, lambda task: experts.expert_params(experts.names.index(task))
    )
    return Made(features, tree.param_bytes(case.backbone.params))


def _static(entry: variants.Entry) -> Rule:
    def make(case: Case) -> Made:
        params, seconds = case.fit(entry)
        return Made(transfer.of_params(case.world, lambda _: params), 0.0, seconds)

    return Rule(entry.method, entry.variant(), entry.fit_needs, make)


def _offset_rules(kind: str) -> list[Rule]:
    """ReTeX with weights from its identifier, and with the same for every task."""
    known = IDENTIFIERS[kind].needs
    by_task = f"{known}; {_INPUTS_OF_TASK}"
    return [
        Rule("retex", "hard weights, each input", known, _hard_by_input),
        Rule("retex", "hard weights, each task", by_task, partial(_by_task, is_soft=False)),
        Rule("retex", "soft weights, each input", f"{known}; {_VALIDATION}", _soft_by_input),
        Rule(
            "retex",
            "soft weights, each task",
            f"{by_task}; {_VALIDATION}",
            partial(_by_task, is_soft=True),
        ),
        Rule("retex", "uniform weights", "none", _uniform),
    ]


def _offsets_made(
    case: Case, features: transfer.Features, *, is_identified: bool, **facts: Any
) -> Made:
    state, seconds = case.offsets
    stored = offsets.offset_bytes(state)
    if is_identified:
        stored += IDENTIFIERS[case.identifier.kind].bytes(case.identifier.state)
    return Made(features, stored / len(case.seen), seconds, facts)


def _hard_by_input(case: Case) -> Made:
    features = transfer.routed_features(case.world, case.offsets[0], case.scores)
    return _offsets_made(case, features, is_identified=True)


def _soft(case: Case, task: str, split: str) -> jax.Array:
    return seen_weights.soft(case.scores(task, split), case.unit * case.temperature[0])


def _soft_facts(case: Case) -> dict[str, Any]:
    chosen, scores = case.temperature
    return {"temperature": chosen, "unit": case.unit, "temperature_scores": scores}


def _soft_by_input(case: Case) -> Made:
    features = transfer.of_inputs(case.world, case.offsets[0], partial(_soft, case))
    return _offsets_made(case, features, is_identified=True, **_soft_facts(case))


def _by_task(case: Case, *, is_soft: bool) -> Made:
    """Weights of unseen tasks from their training inputs; of seen ones, to which these calibrate, from validation."""
    state = case.offsets[0]
    weights = {}
    for task in (*case.seen, *case.unseen):
        split = "val" if task in case.seen else "train"
        each = _soft(case, task, split) if is_soft else seen_weights.hard(case.scores(task, split))
        weights[task] = seen_weights.of_task(each)
    features = transfer.of_params(case.world, lambda task: offsets.mix(state, weights[task]))
    facts = _soft_facts(case) if is_soft else {}
    told = {task: np.asarray(weights[task]).tolist() for task in case.unseen}
    return _offsets_made(case, features, is_identified=True, weights=told, **facts)


def _uniform(case: Case) -> Made:
    size = len(case.seen)
    params = offsets.mix(case.offsets[0], jnp.full(size, 1 / size, jnp.float32))
    features = transfer.of_params(case.world, lambda _: params)
    return _offsets_made(case, features, is_identified=False)


def _by_text(case: Case, method: str, state: Any) -> transfer.Features:
    """The rule of weights by class names; a seen task is known by its own, and is recovered."""
    recover, mix = METHODS[method].recover, METHODS[method].mix
    assert mix is not None

    def params(task: str) -> Any:
        if task in case.seen:
            return recover(state, case.seen.index(task))
        return mix(state, case.text_weights[task])

    return transfer.of_params(case.world, params)


def _told_weights(case: Case) -> dict[str, Any]:
    return {"weights": {task: weights.tolist() for task, weights in case.text_weights.items()}}


def _offsets_by_text(case: Case) -> Made:
    features = _by_text(case, "retex", case.offsets[0])
    return _offsets_made(case, features, is_identified=False, **_told_weights(case))


def _mixed_by_text(entry: variants.Entry) -> Rule:
    def make(case: Case) -> Made:
        state, seconds = case.fit(entry)
        stored = METHODS[entry.method].extra_bytes(state) / len(case.seen)
        return Made(_by_text(case, entry.method, state), stored, seconds, _told_weights(case))

    variant = ", ".join(part for part in (entry.variant(), _TEXT) if part)
    return Rule(entry.method, variant, _CLASS_NAMES, make)
