"""Fits many methods on one experiment's experts and compares them in one table.

    python -m retex_jax.compare --config=configs/minilm_text8.py --config.methods=all
    python -m retex_jax.compare --config=configs/demo.py --config.methods=ties,emr,dts_t,retex

The task is known, but for methods that mix experts by input: these see shuffled inputs of all tasks, and each task's
own head predicts. Methods with a published grid have a further row with the options that are best on validation
inputs; what is random is fitted with several seeds. With `expert_seeds` the whole comparison is run on experts of
each of these seeds, and the table is of the means.

The workdir (workdirs/NAME_compare by default) receives results.json after every method, and report.html with the
plot of accuracy against bytes. A run that was stopped goes on where it was: rows in results.json that are of the same
experts, data, options and seeds are kept, whatever the commit; where nothing is left to fit, the table is printed and
neither data nor experts are read. A method that fails is reported with its error, and the rest go on; the exit status
is then 1.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from retex_jax import (
    artifact,
    collection,
    command_line,
    evaluate,
    experiment,
    files,
    logging,
    preflight,
    report,
    search,
)
from retex_jax.bench import Bench, choose, fit_row, searched
from retex_jax.variants import Entry, plan, seeds

_HASH = "sha256"
_DECIDE = ("seed", "model", "tasks", "data", "finetune", "experts", "calibration", "evaluate")


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
      those of other entries, which stay in the table. Rows that lack a measure are of before there was such a one,
      and are not kept.
    """
    if not path.is_file():
        return {}, {}
    try:
        results = files.read_json(path)
    except ValueError:
        results = {}
    is_ours = isinstance(results, dict) and results.get("identity") == identity(settings)
    if not (is_ours and _is_whole(results)):
        logging.warning(f"{path} is of another experiment, or damaged, and is replaced")
        return {}, {}
    planned = {entry.name: seeds(entry, settings) for entry in entries}
    rows = {
        row["entry"]: row
        for row in results["rows"]
        if row["seeds"] == planned.get(row["entry"], row["seeds"])
        and evaluate.MEASURES.keys() <= row.keys()
    }
    if rows:
        logging.info(f"kept {len(rows)} rows of {path}; without that file they are fitted again")
    return rows, {name: found for name, found in results["searches"].items() if name in rows}


def _is_whole(results: Mapping[str, Any]) -> bool:
    """Whether rows and searches are what was written; those of before they were hashed are believed."""
    rows, searches = results.get("rows"), results.get("searches")
    if not (isinstance(searches, dict) and isinstance(rows, list)):
        return False
    if not all(isinstance(row, dict) and "seeds" in row for row in rows):
        return False
    if not all(isinstance(row.get("entry"), str) for row in rows):
        return False
    digest = files.json_hash([rows, searches])
    return results.get(_HASH, digest) == digest


def compare(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    entries: Sequence[Entry] | None = None,
) -> dict[str, Any]:
    """Fits and evaluates every planned method.

    Args:
      config: the experiment; with `expert_seeds`, it is run with experts of each of these seeds.
      workdir: receives results.json, after every method, and report.html; rows that are there are kept, see
        `previous`. With `expert_seeds`, each has a folder of its own, seed_NUMBER, and the workdir receives
        the means, see `over_experts`.
      entries: what is fitted instead of the experiment's own plan, no two of one name.

    Returns:
      The content of results.json; "failed" holds what went wrong, by entry.

    Raises:
      ValueError: if the settings cannot run, rows that are there are of other experts, or every method failed.
      RuntimeError: if something cannot be downloaded, or another run uses the workdir.
    """
    settings, workdir = command_line.as_dict(config), Path(workdir)
    preflight.check(settings)
    entries = plan(settings) if entries is None else list(entries)
    if not (numbers := settings["expert_seeds"]):
        return _compare(settings, workdir, entries)
    repeats = {}
    for seed in numbers:
        logging.info(f"experts of seed {seed}")
        own = {**settings, "seed": seed, "expert_seeds": ()}
        repeats[seed] = _compare(own, workdir / f"seed_{seed}", entries)
    results = over_experts(repeats)
    with logging.WorkdirLock(workdir):
        _report(workdir, settings, results)
    return results


def _compare(
    settings: experiment.Settings, workdir: Path, entries: Sequence[Entry]
) -> dict[str, Any]:
    """Compares on the experts of one seed."""
    path = workdir / "results.json"
    with logging.WorkdirLock(workdir):
        rows, searches = previous(path, entries, settings)
        if rows and all(entry.name in rows for entry in entries):
            results = _results(files.read_json(path), entries, rows, searches, {})
            evaluate.print_methods(results["rows"])
            return results
        bench = _load(settings)
        if rows:
            collection.check_kept(path, bench.suite.individual)
        failed = _fit_all(bench, entries, rows, searches, path)
        if not rows:
            raise ValueError(f"methods: all failed: {failed}")
        results = _results(_about(bench), entries, rows, searches, failed)
        _report(workdir, settings, results)
    return results


def _load(settings: experiment.Settings) -> Bench:
    """Data, models and experts."""
    experiment.start()
    clock = logging.Clock()
    with clock("load"):
        experiment.fetch(settings, announce=logging.info)
        backbone, tasks = experiment.load(settings)
    with clock("experts"):
        collected = collection.collect(settings, backbone, tasks)
    return Bench(settings, backbone, tasks, collected, clock)


def _report(workdir: Path, settings: experiment.Settings, results: dict[str, Any]) -> None:
    """Writes results.json and report.html, and prints the table."""
    path = workdir / "results.json"
    artifact.write_json(path, results)
    report.write(
        workdir / "report.html",
        results,
        seconds=results["seconds"],
        config_text=json.dumps(settings, indent=1),
    )
    evaluate.print_methods(results["rows"])
    logging.info(f"wrote {workdir / 'report.html'} and {path}")


def over_experts(repeats: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The results of experts of several seeds in one.

    Args:
      repeats: the seed of the experts to the content of results.json.

    Returns:
      The means, as `evaluate.over_seeds` has them, of the rows that all have, with the commits of all, without their
      searches, which choose for each seed; "expert_seeds" are the seeds, and "failed" tells them.
    """
    first = next(iter(repeats.values()))
    by_entry = [{row["entry"]: row for row in results["rows"]} for results in repeats.values()]
    shared = [name for name in by_entry[0] if all(name in rows for rows in by_entry)]

    def over_seeds(name: str) -> dict[str, Any]:
        found = [rows[name] for rows in by_entry]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
        return {**evaluate.over_seeds(found, list(repeats)), "commit": commits}

    def mean(name: str) -> dict[str, float]:
        return {
            task: sum(results[name][task] for results in repeats.values()) / len(repeats)
            for task in first[name]
        }

    return {
        **{name: value for name, value in first.items() if name != _HASH},
        "checkpoint_set": ", ".join(results["checkpoint_set"] for results in repeats.values()),
        "identity": [results["identity"] for results in repeats.values()],
        "seed": None,
        "expert_seeds": list(repeats),
        "individual": mean("individual"),
        "linear_probe": mean("linear_probe"),
        "rows": [over_seeds(name) for name in shared],
        "searches": {},
        "failed": {
            f"seed {seed}: {name}": error
            for seed, results in repeats.items()
            for name, error in results["failed"].items()
        },
        "seconds": {
            phase: sum(results["seconds"].get(phase, 0.0) for results in repeats.values())
            for phase in first["seconds"]
        },
    }


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
                results = _results(_about(bench), entries, rows, searches, failed)
                artifact.write_json(path, results)
    return failed


def _show(bar: logging.Progress, start: int, method: str, count: int, **shown: str) -> None:
    bar.update(start + count, method=method, **shown)


def _about(bench: Bench) -> dict[str, Any]:
    """What results.json says of the run as a whole."""
    return {
        "schema": 1,
        "commit": logging.commit(),
        "checkpoint_set": experiment.checkpoint_set(bench.settings),
        "identity": identity(bench.settings),
        "seed": bench.settings["seed"],
        "device": logging.device(),
        "tasks": list(bench.collected.heads),
        "individual": bench.suite.individual,
        "linear_probe": bench.collected.linear_probe,
        "seconds": dict(bench.clock.seconds),
    }


def _results(
    about: Mapping[str, Any],
    entries: Sequence[Entry],
    rows: Mapping[str, Any],
    searches: Mapping[str, Any],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The content of results.json, with rows in the order of the plan; `about` is as `_about` or an earlier content."""
    order = dict.fromkeys([*(entry.name for entry in entries), *rows])
    results = {
        **about,
        "rows": [rows[name] for name in order if name in rows],
        "searches": {name: searches[name] for name in order if name in searches},
        "failed": dict(failed),
    }
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    return {**results, _HASH: files.json_hash([results["rows"], results["searches"]])}


def main() -> None:
    """Compares the methods of the experiment file."""
    config = _CONFIG.value
    results = compare(config, _WORKDIR.value or Path("workdirs") / f"{config.name}_compare")
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "results; workdirs/NAME_compare if not given")
    command_line.run(main, required="config")
