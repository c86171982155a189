"""Fits entries of a comparison on one set of experts, evaluates them, and chooses their options on validation data."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax

from retex_jax import collection, data, evaluate, experiment, logging, pretrained, protocols, search
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS
from retex_jax.methods import METHODS, NEEDS
from retex_jax.typing import ProgressFn
from retex_jax.variants import Entry, seeds

Update = Callable[..., None]
"""(fits done, **what is shown beside them); a fit is of a candidate or of a seed."""


class Bench:
    """What entries are fitted and evaluated on; what several of them share is made once."""

    def __init__(
        self,
        settings: experiment.Settings,
        backbone: pretrained.Backbone,
        tasks: Sequence[data.Task],
        collected: collection.Collection,
        clock: logging.Clock,
    ):
        self.settings = settings
        self.collected = collected
        self.suite = collection.make_suite(settings, backbone, tasks, collected)
        self.calibrations = collection.calibrate(settings, backbone, tasks, collected)
        self.clock = clock
        self._rebased: dict[str, ExpertSet] = {}

    def key(self, seed: int) -> jax.Array:
        """The experiment's key, folded by the number of a seed."""
        return jax.random.fold_in(jax.random.key(self.settings["seed"]), seed)

    def experts(self, origin: str | None) -> ExpertSet:
        """The experts; with the model of a merger in place of the pretrained one, if `origin` names it."""
        if origin is None:
            return self.collected.experts
        if origin not in self._rebased:
            merged = MERGERS[origin](self.collected.experts, key=self.key(0))
            self._rebased[origin] = self.collected.experts.rebased(merged)
        return self._rebased[origin]

    @cached_property
    def validation(self) -> protocols.Suite:
        """What options are chosen on."""
        count = self.settings["search"]["num_inputs"]
        return protocols.validation(self.suite, count, self.collected.experts.expert_params)

    @cached_property
    def routed(self) -> protocols.Suite:
        """What methods that mix experts by input are evaluated on."""
        count = self.settings["evaluate"]["routed_inputs"]
        return protocols.first_tests(self.suite, count, self.collected.experts.expert_params)

    def data_options(self, entry: Entry) -> dict[str, Any]:
        """The keywords of a fit that needs data."""
        split = NEEDS[entry.fit_needs]
        return {"calibration": self.calibrations[split]} if split else {}


def validation_score(
    suite: protocols.Suite, method: str, progress: ProgressFn | None = None
) -> Callable[[Any], list[float]]:
    """The score of a search.

    Args:
      suite: from `protocols.validation`.
      method: name in METHODS.
      progress: called with (tasks done, tasks) after each.

    Returns:
      state -> one number a task, with the task and so its head known: accuracy on validation inputs divided by
      the expert's own, so that their mean is the normalized accuracy; plain where an expert has none right.
    """
    recover = METHODS[method].recover
    divisors = suite.individual if min(suite.individual.values()) > 0 else {}

    def score(state: Any) -> list[float]:
        accuracy = protocols.known(suite, lambda task: recover(state, task), "val", progress)
        return [value / divisors.get(task, 1.0) for task, value in accuracy.items()]

    return score


def choose(bench: Bench, entry: Entry, update: Update) -> search.SearchResult:
    """Searches an entry's grid on validation inputs, with the first seed."""
    done = 0

    def candidate(count: int, total: int) -> None:
        nonlocal done
        done = count
        update(done, candidate=f"{done}/{total}")

    def task(count: int, total: int) -> None:
        shown = f"{done + 1}/{entry.num_candidates}"
        update(done, candidate=shown, task=f"{count}/{total}")

    return search.grid(
        METHODS[entry.method].fit,
        bench.experts(entry.origin),
        entry.grid,
        validation_score(bench.validation, entry.method, task),
        key=bench.key(0),
        fixed={**entry.options, **bench.data_options(entry)},
        progress=candidate,
    )


def fit_row(
    bench: Bench, entry: Entry, chosen: Mapping[str, Any], update: Update
) -> dict[str, Any]:
    """Fits an entry with each of its seeds and evaluates it on test inputs; a row of results.json."""
    method, clock = METHODS[entry.method], bench.clock
    options = {**entry.options, **chosen, **bench.data_options(entry)}
    experts, numbers, rows = bench.experts(entry.origin), seeds(entry, bench.settings), []
    names = (entry.method, entry.variant(chosen))
    for done, seed in enumerate(numbers, start=1):
        before = clock.seconds.get("fit", 0.0)
        with clock("fit"):
            state = method.fit(experts, key=bench.key(seed), **options)
            jax.block_until_ready(method.recover(state, 0))
        seconds = clock.seconds["fit"] - before
        with clock("evaluate"):
            if method.predict is None:
                rows.append(evaluate.known_row(bench.suite, *names, state, seconds))
            else:
                inputs = bench.calibrations["test"]
                rows.append(evaluate.routed_row(bench.routed, *names, state, inputs, seconds))
        leaves = method.leaves(state) if method.leaves else None
        del state  # some hold all experts
        update(entry.num_candidates + done, seed=f"{done}/{len(numbers)}")
    row = evaluate.over_seeds(rows, numbers)
    facts = {"needs": entry.needs, "entry": entry.name, "commit": logging.commit()}
    return {**row, **facts, **({"leaves": leaves} if leaves else {})}


def searched(entry: Entry, chosen: Mapping[str, Any], found: search.SearchResult) -> dict[str, Any]:
    """What results.json tells of a search: what was chosen, and all trials."""
    return {
        "entry": entry.name,
        "method": entry.method,
        "chosen": dict(chosen),
        "score": found.score,
        "trials": [
            {
                "options": dict(trial.options),
                "score": trial.score,
                "task_scores": list(trial.task_scores),
                "error": trial.error,
            }
            for trial in found.trials
        ],
    }
