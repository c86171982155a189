"""The splits of an experiment's tasks into seen and unseen, and what is fitted on the seen tasks of one."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from retex_jax import (
    collection,
    data,
    experiment,
    identification,
    logging,
    offsets,
    pretrained,
    variants,
)
from retex_jax.bench import Bench
from retex_jax.identifier import weights as seen_weights
from retex_jax.methods import METHODS
from retex_jax.recovery import Identifier
from retex_jax.unseen import transfer


def problems(settings: experiment.Settings) -> list[str]:
    """What is wrong with the settings of this program alone."""
    spec = settings.get("unseen")
    names = ("num_unseen", "num_splits", "splits", "num_train", "num_test", "temperatures")
    if spec is None or (absent := [name for name in names if name not in spec]):
        lacking = ["unseen"] if spec is None else [f"unseen.{name}" for name in absent]
        return [f"the experiment lacks {', '.join(lacking)}; see configs/common.py"]
    found = [
        f"unseen.{name}: got {spec[name]!r}, expected 1 or more"
        for name in ("num_splits", "num_train", "num_test")
        if spec[name] < 1
    ]
    tasks = list(settings["tasks"])
    if not 1 <= spec["num_unseen"] < len(tasks):
        found.append(
            f"unseen.num_unseen: got {spec['num_unseen']}, expected 1 to {len(tasks) - 1}, as one of the "
            f"{len(tasks)} tasks has to be seen"
        )
    elif spec["num_splits"] > (most := math.comb(len(tasks), spec["num_unseen"])):
        found.append(f"unseen.num_splits: got {spec['num_splits']}, expected at most {most}")
    if len({frozenset(split) for split in spec["splits"]}) < len(spec["splits"]):
        found.append(f"unseen.splits: got {spec['splits']}, expected no two of the same tasks")
    for split in spec["splits"]:
        if isinstance(split, str) or not _leaves_some(split, tasks):
            found.append(
                f"unseen.splits: got {split!r}, expected different names, not all, of {tasks}"
            )
    if unfit := [name for name in tasks if name in data.WITHOUT_CLASSES]:
        found.append(f"tasks: {unfit} have no classes, expected tasks of classification")
    temperatures = spec["temperatures"]
    if not temperatures or not all(0 < value < float("inf") for value in temperatures):
        found.append(
            f"unseen.temperatures: got {temperatures}, expected one or more finite numbers above 0"
        )
    elif len(set(temperatures)) < len(temperatures):
        found.append(f"unseen.temperatures: got {temperatures}, expected different numbers")
    if settings["expert_seeds"]:
        found.append(
            f"expert_seeds: got {settings['expert_seeds']}, expected (): this program takes the experts of "
            "`seed`"
        )
    try:
        variants.plan(settings)
    except ValueError as error:
        found += str(error).splitlines()
    return found


def _leaves_some(split: Sequence[str], tasks: Sequence[str]) -> bool:
    return bool(split) and len(set(split)) == len(split) and set(split) < set(tasks)


def splits(settings: experiment.Settings) -> list[tuple[str, ...]]:
    """The tasks that each split leaves out, in the order of the experiment.

    Without explicit ones, the tasks in random order, of the experiment's seed, are dealt out in turn, and shuffled
    anew when there are none left; a split that was there is dealt again.

    Returns:
      Names; no two splits are equal.
    """
    spec, tasks = settings["unseen"], list(settings["tasks"])
    chosen = [set(split) for split in spec["splits"]]
    wanted = len(chosen) or spec["num_splits"]
    rng = np.random.default_rng([settings["seed"], len(tasks)])
    order: list[str] = []
    while len(chosen) < wanted:
        split: set[str] = set()
        while len(split) < spec["num_unseen"]:
            order = order or rng.permutation(sorted(tasks)).tolist()
            name = next(name for name in order if name not in split)
            order.remove(name)
            split.add(name)
        chosen += [split] if split not in chosen else []
    return [tuple(name for name in tasks if name in split) for split in chosen]


class Case:
    """One split: what rules are fitted and evaluated on; what several of them share is made once.

    Attributes:
      name: of the split: the unseen tasks.
      seen: names of the tasks whose experts may be used.
      unseen: names of the others.
      backbone: the pretrained model.
      collected: the experts of all tasks.
      settings: the experiment, of the seen tasks.
    """

    def __init__(
        self,
        settings: experiment.Settings,
        backbone: pretrained.Backbone,
        tasks: Sequence[data.Task],
        collected: collection.Collection,
        unseen: Sequence[str],
    ):
        self.unseen = tuple(unseen)
        self.name = ", ".join(unseen)
        self.seen = tuple(task.name for task in tasks if task.name not in unseen)
        self.backbone = backbone
        self.collected = collected
        self.settings = {**settings, "tasks": list(self.seen)}
        self._tasks = list(tasks)

    def forget(self) -> None:
        """Frees what was made for the rules."""
        for name in [
            name for name in self.__dict__ if isinstance(getattr(Case, name, None), cached_property)
        ]:
            del self.__dict__[name]

    def check(self) -> None:
        """Makes sure that every rule can be evaluated; as `transfer.make_world`."""
        _ = self.world
        self.forget()

    @cached_property
    def world(self) -> transfer.World:
        """All tasks, inputs parted from labels."""
        spec = self.settings["unseen"]
        return transfer.make_world(
            self.backbone.model,
            self._tasks,
            self.collected.heads,
            self.unseen,
            counts={
                "train": spec["num_train"],
                "val": self.settings["search"]["num_inputs"],
                "test": spec["num_test"],
            },
            batch_size=self.settings["evaluate"]["batch_size"],
        )

    @cached_property
    def bench(self) -> Bench:
        """The seen tasks with their experts, and nothing of the unseen ones."""
        places = [place for place, task in enumerate(self._tasks) if task.name in self.seen]
        whole = self.collected
        only = whole._replace(
            experts=whole.experts.take(places),
            heads={task: whole.heads[task] for task in self.seen},
            individual={task: whole.individual[task] for task in self.seen},
        )
        tasks = [self._tasks[place] for place in places]
        return Bench(self.settings, self.backbone, tasks, only, logging.Clock())

    def fit(self, entry: variants.Entry) -> tuple[Any, float]:
        """The state of a method, and the seconds that its fit took."""
        bench, started = self.bench, time.perf_counter()
        options = {**entry.options, **bench.data_options(entry)}
        state = METHODS[entry.method].fit(bench.experts(None), key=bench.key(0), **options)
        jax.block_until_ready(METHODS[entry.method].recover(state, 0))
        return state, time.perf_counter() - started

    @cached_property
    def offsets(self) -> tuple[offsets.OffsetState, float]:
        """The offsets of the experiment, and the seconds that their fit took."""
        spec = self.settings["offsets"]
        options = {
            "solver": spec["solver"],
            "base": spec["base"],
            "base_options": spec["base_options"],
            **experiment.offset_size(spec),
            **spec[spec["solver"]],
        }
        return self.fit(variants.Entry("retex", options))

    @cached_property
    def identifier(self) -> Identifier:
        """The experiment's, of the seen tasks."""
        bench, (state, _) = self.bench, self.offsets
        model, tasks = self.backbone.model, list(bench.suite.tasks)
        return identification.obtain(self.settings, model, state, tasks, bench.key(0))[0]

    @cached_property
    def scores(self) -> transfer.Features:
        """Scores over seen tasks of any task's inputs."""
        return transfer.identify(self.world, self.offsets[0], self.identifier)

    @cached_property
    def temperature(self) -> tuple[float, dict[float, float]]:
        """Of soft weights, and the accuracies of all that were tried, on validation inputs of seen tasks.

        Both in units of the spread of their scores; the first of equals, or the only one.
        """
        values = list(self.settings["unseen"]["temperatures"])
        if len(values) == 1 or len(self.seen) == 1:
            return values[0], {}
        mix = partial(offsets.mix, self.offsets[0])
        tried = [self.unit * value for value in values]
        found = transfer.choose_temperature(self.world, mix, self.scores, tried)
        scores = dict(zip(values, found.values(), strict=True))
        return max(scores, key=lambda value: scores[value]), scores

    @cached_property
    def unit(self) -> float:
        """The spread of the scores of seen tasks' inputs."""
        return transfer.score_spread([self.scores(task, "train") for task in self.seen])

    @cached_property
    def text_weights(self) -> Mapping[str, np.ndarray]:
        """Weights over seen tasks of each unseen one, by class names."""
        backbone = self.backbone
        found = transfer.text_embeddings(self.world, self._tasks, backbone.params, backbone.encode)
        assert found is not None
        others = [found[task] for task in self.seen]
        return {task: seen_weights.similarity(found[task], others) for task in self.unseen}
