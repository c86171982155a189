"""Fits many methods on one experiment's experts and compares them in one table.

    python -m retex_jax.compare --config=configs/minilm_text8.py --config.methods=all
    python -m retex_jax.compare --config=configs/demo.py --config.methods=ties,emr,dts_t,retex

The task is known, but for methods that mix experts by input: these see shuffled inputs of all tasks, and each task's
own head predicts. Methods with a published grid have a further row with the options that are best on validation
inputs; what is random is fitted with several seeds.

The workdir (workdirs/NAME_compare by default) receives results.json after every method, and report.html with the
plot of accuracy against bytes. A run that was stopped goes on where it was: rows in results.json that are of the same
experts, data, options and seeds are kept, whatever the commit. A method that fails is reported with its error, and
the rest go on; the exit status is then 1.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from retex_jax import (
    artifact,
    collection,
    command_line,
    data,
    evaluate,
    experiment,
    logging,
    preflight,
    pretrained,
    protocols,
    report,
    search,
)
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS
from retex_jax.methods import METHODS, NEEDS
from retex_jax.typing import ProgressFn
from retex_jax.variants import Entry, plan, seeds

_DECIDE = ("seed", "model", "tasks", "data", "finetune", "experts", "calibration", "evaluate")

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

    def data_options(self, method: str) -> dict[str, Any]:
        """The keywords of a fit that needs data."""
        split = NEEDS[METHODS[method].needs]
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
        fixed={**entry.options, **bench.data_options(entry.method)},
        progress=candidate,
    )


def fit_row(
    bench: Bench, entry: Entry, chosen: Mapping[str, Any], update: Update
) -> dict[str, Any]:
    """Fits an entry with each of its seeds and evaluates it on test inputs; a row of results.json."""
    method, clock = METHODS[entry.method], bench.clock
    options = {**entry.options, **chosen, **bench.data_options(entry.method)}
    experts, numbers, rows = bench.experts(entry.origin), seeds(entry, bench.settings), []
    names = (bench.suite, entry.method, entry.variant(chosen))
    for done, seed in enumerate(numbers, start=1):
        before = clock.seconds.get("fit", 0.0)
        with clock("fit"):
            state = method.fit(experts, key=bench.key(seed), **options)
            jax.block_until_ready(method.recover(state, 0))
        seconds = clock.seconds["fit"] - before
        with clock("evaluate"):
            if method.predict is None:
                rows.append(evaluate.known_row(*names, state, seconds))
            else:
                count = bench.settings["evaluate"]["routed_inputs"]
                inputs = bench.calibrations["test"]
                rows.append(evaluate.routed_row(*names, state, inputs, count, seconds))
        leaves = method.leaves(state) if method.leaves else None
        del state  # some hold all experts
        update(entry.num_candidates + done, seed=f"{done}/{len(numbers)}")
    row = evaluate.over_seeds(rows, numbers, bench.suite.individual)
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


def identity(settings: experiment.Settings) -> str:
    """Identifies what rows depend on beside their method, options and seeds; the commit is no part of it."""
    return command_line.fingerprint(
        {name: settings[name] for name in _DECIDE}
        | {
            "checkpoint_set": experiment.checkpoint_set(settings),
            "search.num_inputs": settings["search"]["num_inputs"],
        }
    )


def previous(
    path: Path, entries: Sequence[Entry], settings: experiment.Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an earlier run left.

    Args:
      path: of results.json.
      entries: what is planned.
      settings: the experiment.

    Returns:
      Rows and searches, by entry, of the same `identity`: those of planned entries if the seeds are as planned, and
      those of other entries, which stay in the table.
    """
    if not path.is_file():
        return {}, {}
    try:
        results = json.loads(path.read_text())
    except ValueError:
        results = {}
    if results.get("identity") != identity(settings):
        logging.warning(f"{path} is of another experiment, or damaged, and is replaced")
        return {}, {}
    planned = {entry.name: seeds(entry, settings) for entry in entries}
    rows = {
        row["entry"]: row
        for row in results["rows"]
        if row["seeds"] == planned.get(row["entry"], row["seeds"])
    }
    if rows:
        logging.info(f"kept {len(rows)} rows of {path}; without that file they are fitted again")
    return rows, {name: found for name, found in results["searches"].items() if name in rows}


def compare(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Fits and evaluates every planned method.

    Args:
      config: the experiment.
      workdir: receives results.json, after every method, and report.html; rows that are there are kept, see
        `previous`.

    Returns:
      The content of results.json; "failed" holds what went wrong, by entry.

    Raises:
      ValueError: if the settings cannot run, or every method failed.
      RuntimeError: if something cannot be downloaded, or another run uses the workdir.
    """
    settings, workdir = command_line.as_dict(config), Path(workdir)
    preflight.check(settings)
    entries = plan(settings)
    experiment.start()
    clock = logging.Clock()
    with logging.WorkdirLock(workdir):
        with clock("load"):
            experiment.fetch(settings, announce=logging.info)
            backbone, tasks = experiment.load(settings)
        with clock("experts"):
            collected = collection.collect(settings, backbone, tasks)
        bench = Bench(settings, backbone, tasks, collected, clock)
        path = workdir / "results.json"
        rows, searches = previous(path, entries, settings)
        failed = _fit_all(bench, entries, rows, searches, path)
        if not rows:
            raise ValueError(f"methods: all failed: {failed}")
        results = _write(path, bench, entries, rows, searches, failed)
        report.write(
            workdir / "report.html",
            results,
            seconds=results["seconds"],
            config_text=json.dumps(settings, indent=1),
        )
    evaluate.print_methods(results["rows"])
    logging.info(f"wrote {workdir / 'report.html'} and {path}")
    return results


def _fit_all(
    bench: Bench,
    entries: Sequence[Entry],
    rows: dict[str, Any],
    searches: dict[str, Any],
    path: Path,
) -> dict[str, str]:
    """Adds to `rows` and `searches` what they lack, writes them after each entry, and returns the failures."""
    failed: dict[str, str] = {}
    sizes = {
        entry.name: entry.num_candidates + len(seeds(entry, bench.settings)) for entry in entries
    }
    done = sum(size for name, size in sizes.items() if name in rows)
    with logging.progress(sum(sizes.values()), "fits") as bar:
        bar.update(done)
        for entry in entries:
            if entry.name in rows:
                continue

            update = partial(_show, bar, done, entry.method)
            logging.info(entry.name)
            try:
                chosen: dict[str, Any] = {}
                if entry.grid:
                    with bench.clock("search"):
                        found = choose(bench, entry, update)
                    chosen = search.chosen_options(entry.method, found)
                    searches[entry.name] = searched(entry, chosen, found)
                rows[entry.name] = fit_row(bench, entry, chosen, update)
            except Exception as error:  # whatever it is, the rows of the other methods are wanted
                failed[entry.name] = f"{type(error).__name__}: {error}"
                logging.warning(f"{entry.name} failed: {failed[entry.name]}")
            done += sizes[entry.name]
            if rows:
                _write(path, bench, entries, rows, searches, failed)
    return failed


def _show(bar: logging.Progress, start: int, method: str, count: int, **shown: str) -> None:
    bar.update(start + count, method=method, **shown)


def _write(
    path: Path,
    bench: Bench,
    entries: Sequence[Entry],
    rows: Mapping[str, Any],
    searches: Mapping[str, Any],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Writes results.json, with rows in the order of the plan, and returns its content."""
    order = dict.fromkeys([*(entry.name for entry in entries), *rows])
    results = {
        "schema": 1,
        "commit": logging.commit(),
        "checkpoint_set": experiment.checkpoint_set(bench.settings),
        "identity": identity(bench.settings),
        "seed": bench.settings["seed"],
        "device": logging.device(),
        "tasks": list(bench.collected.heads),
        "individual": bench.suite.individual,
        "linear_probe": bench.collected.linear_probe,
        "rows": [rows[name] for name in order if name in rows],
        "searches": {name: searches[name] for name in order if name in searches},
        "failed": dict(failed),
        "seconds": dict(bench.clock.seconds),
    }
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    artifact.write_json(path, results)
    return results


def main() -> None:
    """Compares the methods of the experiment file."""
    config = _CONFIG.value
    results = compare(config, _WORKDIR.value or Path("workdirs") / f"{config.name}_compare")
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "results; workdirs/NAME_compare if not given")
    command_line.run(main, required="config")
