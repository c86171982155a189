"""What `retex_jax.compare` fits: the variants of the methods, and what an experiment makes of them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retex_jax import data, search, tree
from retex_jax.experiment import Settings
from retex_jax.mergers.ties import DEFAULT_SCALING
from retex_jax.methods import METHODS, SEARCH_NEEDS

ALL = "all"
_TIES = {"density": 0.2, "merge": "mean", "scaling": 1.0}


@dataclass(frozen=True)
class Entry:
    """One row of the comparison, before it is fitted.

    Attributes:
      method: name in METHODS.
      options: of its fit.
      origin: name of the merger whose model takes the place of the pretrained one, so that difference
        vectors take the place of task vectors (`ExpertSet.rebased`); None for task vectors.
      grid: options that are chosen on validation data, and the values to try.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: str | None = None
    grid: search.Grid = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Identifies the entry: method, options, and which options are searched."""
        return f"{self.method} {self._told(', '.join(self.grid))}".strip()

    @property
    def num_candidates(self) -> int:
        """How many combinations of options are tried."""
        return math.prod(len(values) for values in self.grid.values()) if self.grid else 0

    @property
    def fit_needs(self) -> str:
        """What the fit needs with some of the options that are tried."""
        method = METHODS[self.method]
        needs = {
            method.needs_with({**self.options, **dict(zip(self.grid, values, strict=True))})
            for values in itertools.product(*self.grid.values())
        }
        return max(needs, key=lambda need: need != "none")

    @property
    def needs(self) -> str:
        """What the fit needs, and what the choice of options needs."""
        parts = [self.fit_needs, SEARCH_NEEDS if self.grid else "none"]
        return "; ".join(part for part in parts if part != "none") or "none"

    def variant(self, chosen: Mapping[str, Any] | None = None) -> str:
        """The options in words.

        Args:
          chosen: what the search chose.
        """
        return self._told(_words(chosen or {}))

    def _told(self, searched: str) -> str:
        parts = [
            _words(self.options),
            f"{searched} (validation)" if searched else "",
            f"from={self.origin}" if self.origin else "",
        ]
        return ", ".join(part for part in parts if part)


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={'/'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in options.items()
    )


# Beside the defaults of each method, or instead of them where they need a choice. Difference vectors as in
# the DTS paper, tables 15 to 18: Task Arithmetic, TIES, EMR and T-Switch from Weight Averaging. DTS-D takes a
# base of its own; what these tables call DTS-diff is the one from Weight Averaging (appendix D.5).
# With Weight Averaging differences sum to 0, so Task Arithmetic from it is Weight Averaging again.
VARIANTS: tuple[Entry, ...] = (
    Entry("weight_average"),
    Entry("task_arithmetic", {"scaling": 0.3}),
    Entry("task_arithmetic", {"scaling": 0.3}, "weight_average"),
    Entry("ties", _TIES),
    Entry("ties", _TIES, "weight_average"),
    Entry("dare", {"drop": 0.5, "merge": "weight_average"}),
    Entry("dare", {"drop": 0.5, "merge": "task_arithmetic"}),
    Entry("dare", {"drop": 0.5, "merge": "ties"}),
    Entry("consensus"),
    Entry("fisher", {"num_samples": 1}),
    Entry("regmean"),
    Entry("adamerging", {"granularity": "task"}),
    Entry("adamerging", {"granularity": "layer"}),
    Entry("adamerging", {"granularity": "layer", "plus_plus": True}),
    Entry("svd"),
    Entry("dts_t"),
    Entry("dts_t", {"amr": 0.01}),
    Entry("dts_d"),
    Entry("dts_d", {"base": "weight_average"}),
    Entry("tall_mask"),
    Entry("emr"),
    Entry("emr", {}, "weight_average"),
    Entry("t_switch"),
    Entry("t_switch", {}, "weight_average"),
    Entry("twin"),
    Entry("dawin"),
    Entry("smear_frozen"),
    Entry("wemoe"),
)


def plan(settings: Settings) -> list[Entry]:
    """What is fitted.

    An entry whose method has a published grid is followed by one whose options are searched, but for those
    that `method_options` sets. Entries on difference vectors keep their options. TIES is scaled as its `merge` is by
    default where that is set and `scaling` is not.

    Args:
      settings: `methods` is names joined by commas or "all", which are those that the tasks suit: methods that mix
        by input give features of inputs, and none of questions. `method_options` has options of a
        method that differ from its `VARIANTS`; ReTeX comes at `offsets.rank` and
        `offsets.extra_ranks`; then come `extra_variants`, those with a grid of their own if `search` is enabled.

    Returns:
      In the order of the table, no two of one name.

    Raises:
      ValueError: if a name is unknown or of a method that the tasks do not suit, or a number of `num_seeds` or
        `search` is below 1.
    """
    numbers = {
        "num_seeds": settings["num_seeds"],
        "search.num_inputs": settings["search"]["num_inputs"],
    }
    problems = [
        f"{name}: got {number!r}, expected 1 or more"
        for name, number in numbers.items()
        if number < 1
    ]
    names = _names(settings["methods"])
    known = f"expected {ALL!r} or some of {sorted(METHODS)}"
    given_names = {
        "methods": names,
        "method_options": settings["method_options"],
        "extra_variants": [method for method, *_ in settings["extra_variants"]],
    }
    for setting, given in given_names.items():
        if unknown := [name for name in given if name not in METHODS]:
            hint = tree.did_you_mean(unknown[0], METHODS)
            problems.append(f"{setting}: got {unknown}, {known}{hint}")
    if any(name in data.QUESTIONS for name in settings["tasks"]):
        routed = [name for name in names if name in METHODS and METHODS[name].predict is not None]
        if routed and settings["methods"] != ALL:
            problems.append(
                f"methods: {routed} give features of inputs, expected tasks with heads, not questions"
            )
        names = [name for name in names if name not in routed]
    if problems:
        raise ValueError("\n".join(problems))
    offsets = settings["offsets"]
    ranks = sorted({offsets["rank"], *offsets["extra_ranks"]})
    further = [Entry("retex", {"rank": rank}) for rank in ranks]
    is_searched = settings["search"]["enabled"]
    further += [
        Entry(method, options, grid=grid[0] if grid else {})
        for method, options, *grid in settings["extra_variants"]
        if is_searched or not grid
    ]
    entries: dict[str, Entry] = {}
    for variant in (*VARIANTS, *further):
        if variant.method not in names:
            continue
        given = settings["method_options"].get(variant.method, {})
        rest = {name: values for name, values in variant.grid.items() if name not in given}
        entry = replace(variant, options=_changed(variant.options, given), grid=rest)
        entries.setdefault(entry.name, entry)
        grid = search.published_grid(entry.method, entry.options, fixed=given)
        if grid and is_searched and entry.origin is None:
            rest = {name: value for name, value in entry.options.items() if name not in grid}
            searched = replace(entry, options=rest, grid=grid)
            entries.setdefault(searched.name, searched)
    return list(entries.values())


def _changed(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's options with those that are given."""
    changed = {**options, **given}
    if options is _TIES and "merge" in given and "scaling" not in given:
        changed["scaling"] = DEFAULT_SCALING.get(given["merge"], _TIES["scaling"])
    return changed


def seeds(entry: Entry, settings: Settings) -> list[int]:
    """The numbers that the experiment's key is folded by: one, but for methods that are random."""
    is_random = METHODS[entry.method].random(entry.options)
    return list(range(settings["num_seeds"] if is_random else 1))


def _names(methods: str) -> Sequence[str]:
    return list(METHODS) if methods == ALL else [name.strip() for name in methods.split(",")]
