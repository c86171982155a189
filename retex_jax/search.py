"""Hyperparameter search on validation data, one function for all methods.

Every method is fitted with every combination of a grid, scored, and the best is kept. The score must be of
*validation* data: nothing here sees data, so it is the caller's to keep the test set out of `score`. A method
that says that it needs test inputs (AdaMerging) gets them through its own calibration, and its score must
still be of validation labels.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from retex_jax.typing import ProgressFn

Grid = Mapping[str, Sequence[Any]]
"""Option name to the values to try."""


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
      options: its values of the grid's options.
      score: what the score function returned, or the mean over tasks of it; None if it failed.
      task_scores: what it returned for each task; empty if it returned one number for all.
      error: the message of the ValueError that it raised, or None.
    """

    options: Mapping[str, Any]
    score: float | None
    task_scores: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
      options: the best candidate's values of the grid's options.
      score: its score.
      trials: all candidates, in the order of the grid.
    """

    options: Mapping[str, Any]
    score: float
    trials: tuple[Trial, ...]

    def per_task(self, option: str) -> tuple[Any, ...]:
        """The value of one option that scores best for each task, the others being the best's.

        For an option whose value for one task changes no other task, such as TALL-mask's mask_lambda, this
        is the search over all T-tuples of values. Ties go to the first in the order of the grid.

        Args:
          option: a name in the grid.

        Returns:
          One value a task.

        Raises:
          ValueError: if the grid has no such option, or the score function gave one number for all.
        """
        if option not in self.options:
            raise ValueError(f"option: got {option!r}, expected one of {sorted(self.options)}")
        rest = {name: value for name, value in self.options.items() if name != option}
        trials = [
            trial
            for trial in self.trials
            if trial.error is None
            and all(trial.options[name] is value for name, value in rest.items())
        ]
        if not all(trial.task_scores for trial in trials):
            raise ValueError("per_task: the score function gave one number, expected one a task")
        table = np.array([trial.task_scores for trial in trials])
        return tuple(trials[row].options[option] for row in table.argmax(axis=0))


def grid(
    method_fit: Callable[..., Any],
    experts: Any,
    values: Grid,
    score: Callable[[Any], float | Sequence[float]],
    *,
    key: jax.Array | None = None,
    fixed: Mapping[str, Any] | None = None,
    progress: ProgressFn | None = None,
) -> SearchResult:
    """Fits and scores every combination of options, and keeps the best.

    A candidate whose fit or score raises ValueError, or whose score is not finite, is recorded with the
    error and skipped. One state is held at a time; fit again with the best options to get it.

    Args:
      method_fit: (experts, *, key, ...) -> state.
      experts: what every fit gets first: an ExpertSet, or the features of an identifier.
      values: option name to the values to try; the last option varies fastest. Without options, the
        one candidate is the method's defaults.
      score: state -> validation score, higher is better; one number, or one a task, whose mean decides.
        It must not look at test data.
      key: given to every fit, so that candidates differ in their options only.
      fixed: further keywords of every fit, such as `calibration`.
      progress: called with (candidates done, candidates) after each.

    Returns:
      The best, where ties go to the first in the order of the grid, and the table of all.

    Raises:
      ValueError: if an option has no values or a string for values, an option is both fixed and in the
        grid, `score` returns numbers of different lengths, or no candidate could be scored.
    """
    fixed = {} if fixed is None else fixed
    problems = [
        f"values: {name} has {options!r}, expected a sequence of at least one value"
        for name, options in values.items()
        if isinstance(options, str) or len(options) == 0
    ]
    problems += [f"fixed: {name} is also in the grid" for name in values if name in {*fixed, "key"}]
    if problems:
        raise ValueError("\n".join(problems))
    candidates = [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]
    trials = []
    for done, options in enumerate(candidates, start=1):
        trials.append(_try(method_fit, experts, options, {"key": key, **fixed}, score))
        if progress:
            progress(done, len(candidates))
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        errors = [f"{dict(trial.options)}: {trial.error}" for trial in trials]
        raise ValueError("no candidate could be scored:\n  " + "\n  ".join(errors))
    lengths = sorted({len(trial.task_scores) for trial in scored})
    if len(lengths) > 1:
        raise ValueError(f"score: returned {lengths} numbers, expected as many for all candidates")
    best = max(scored, key=lambda trial: trial.score)  # the first of those that tie
    return SearchResult(best.options, float(best.score), tuple(trials))


def _try(
    method_fit: Callable[..., Any],
    experts: Any,
    options: Mapping[str, Any],
    fixed: Mapping[str, Any],
    score: Callable[[Any], float | Sequence[float]],
) -> Trial:
    try:
        result = score(method_fit(experts, **fixed, **options))
        scores = np.asarray(result, np.float64)
        if scores.ndim > 1 or not scores.size or not np.isfinite(scores).all():
            raise ValueError(f"score: got {result!r}, expected finite numbers: one, or one a task")
    except ValueError as error:
        return Trial(options, None, error=str(error))
    return Trial(options, float(scores.mean()), tuple(scores.tolist()) if scores.ndim else ())


def _steps(first: int, last: int, step: int = 1) -> tuple[float, ...]:
    """Numbers in tenths, each the nearest float: from 2 to 4 is (0.2, 0.3, 0.4)."""
    return tuple(tenths / 10 for tenths in range(first, last + 1, step))


def default_grids() -> dict[str, Grid]:
    """The published grids, by name in METHODS; a method that is not listed has none.

    Weight Averaging, EMR, DTS, SVD and T-Switch are published without a search: their settings are fixed
    numbers, or a size that the user chooses. AdaMerging learns what it needs.
    """
    return {
        # The TALL-mask code evaluates 0.1, 0.2, ..., 1; the ReTeX paper says 0 to 1 in steps of 0.1,
        # of which 0 is the pretrained model; the TIES code runs the same 0.1 to 1.
        "task_arithmetic": {"scaling": _steps(1, 10)},
        # For the mean over agreeing values: the TIES code runs 0.8, 0.9, ..., 2.5 with 20% kept. These are
        # not for merge="sum", which is scaled as Task Arithmetic is.
        "ties": {"scaling": _steps(8, 25)},
        # MergeLM's script for two tasks; it keeps the scaling that was best without dropping.
        "dare": {"drop": _steps(1, 9, 2)},
        # The paper and code choose mask_lambda a task (see `SearchResult.per_task` on "tall_mask"), then
        # scaling from 0.1 to 1 at k = 2. Here one mask_lambda is shared.
        "consensus": {"mask_lambda": _steps(2, 6), "scaling": _steps(1, 10)},
        "tall_mask": {"mask_lambda": _steps(2, 6)},
    }


PER_TASK: Mapping[str, str] = {"tall_mask": "mask_lambda"}
"""By method, the option that `SearchResult.per_task` chooses, as published."""


def published_grid(method: str, options: Mapping[str, Any], fixed: Iterable[str] = ()) -> Grid:
    """The published grid of a method with these options.

    Args:
      method: name in METHODS.
      options: of which TIES' `merge` decides: "sum" is scaled as Task Arithmetic is.
      fixed: names of options that are not to be searched.

    Returns:
      Option name to the values to try; empty where there is nothing to search.
    """
    grids = default_grids()
    if method == "ties" and options.get("merge") == "sum":
        method = "task_arithmetic"
    fixed = set(fixed)
    return {name: values for name, values in grids.get(method, {}).items() if name not in fixed}


def chosen_options(method: str, result: SearchResult) -> dict[str, Any]:
    """The best options of a method, with one value a task where `PER_TASK` has it so."""
    options = dict(result.options)
    option = PER_TASK.get(method)
    if option in options:
        options[option] = result.per_task(option)
    return options
