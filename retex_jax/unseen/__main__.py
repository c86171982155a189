"""Leaves out the experts of some tasks and evaluates on these what can be made of the others.

    python -m retex_jax.unseen --config=configs/minilm_text8.py
    python -m retex_jax.unseen --config=configs/minilm_text8.py --config.methods=weight_average,retex

Several splits of the tasks into seen and unseen (`config.unseen`), so that every task is left out equally often where
the numbers allow. All is fitted on seen experts only; every row has the same kind of head for unseen tasks (see
`retex_jax.unseen.transfer`), and beside it what the same rule gives on the seen tasks. The upper line is the unseen
task's own expert with such a head. Mergers have their published options, unsearched, and one seed.

The workdir (workdirs/NAME_unseen by default) receives results.json after every method; a run that was stopped goes on
where it was, with the rows whose hash is right. A method that fails is reported with its error, and the rest go on;
the exit status is then 1.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from retex_jax import (
    artifact,
    collection,
    command_line,
    evaluate,
    experiment,
    files,
    logging,
    metrics,
    preflight,
)
from retex_jax.unseen.case import Case, problems, splits
from retex_jax.unseen.rules import OWN, PRETRAINED, Rule, has_text, make_row, plan

_DECIDE = ("seed", "model", "tasks", "data", "finetune", "experts", "calibration", "identifier")
_FILE = "results.json"
_HASH = "sha256"


def identity(settings: experiment.Settings) -> str:
    """Identifies what rows depend on beside their split, method and options."""
    spec = settings["unseen"]
    return command_line.fingerprint(
        {name: settings[name] for name in _DECIDE}
        | {
            "checkpoint_set": experiment.checkpoint_set(settings),
            "offsets": {
                name: value for name, value in settings["offsets"].items() if name != "extra_ranks"
            },
            "unseen": {name: spec[name] for name in ("num_train", "num_test", "temperatures")},
            "search.num_inputs": settings["search"]["num_inputs"],
        }
    )


def evaluate_unseen(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Fits every rule on the seen tasks of every split, and evaluates it on all tasks.

    Args:
      config: the experiment.
      workdir: receives results.json, after every row; rows that are there are kept, if they are of the same
        `identity`, split and options, whatever the commit.

    Returns:
      The content of results.json; "failed" holds what went wrong, by split and rule.

    Raises:
      ValueError: if the settings cannot run, all problems being listed, rows that are there are of other experts,
        or no rule is there for all splits.
      RuntimeError: if something cannot be downloaded, or another run uses the workdir.
    """
    settings, workdir = command_line.as_dict(config), Path(workdir)
    preflight.check(settings, further=problems(settings))
    experiment.start()
    clock = logging.Clock()
    with logging.WorkdirLock(workdir):
        with clock("load"):
            experiment.fetch(settings, announce=logging.info)
            backbone, tasks = experiment.load(settings)
            preflight.check_tasks(settings, tasks)
        with clock("experts"):
            collected = collection.collect(settings, backbone, tasks)
        if not (text := has_text(backbone, collected)):
            logging.info("no text tower is at hand: rules with weights by class names are left out")
        rules = plan(settings, text=text)
        done = previous(workdir / _FILE, settings)
        if done:
            collection.check_kept(workdir / _FILE, collected.individual)
        failed: dict[str, str] = {}
        cases = [Case(settings, backbone, tasks, collected, unseen) for unseen in splits(settings)]
        for case in cases:
            case.check()
        with logging.progress(len(cases) * len(rules), "rules") as bar:
            for number, case in enumerate(cases):
                found = done.setdefault(case.name, {})
                for place, rule in enumerate(rules):
                    if rule.name not in found:
                        _attempt(case, rule, clock, found, failed)
                        _write(workdir, settings, rules, cases, done, failed, clock)
                    bar.update(
                        number * len(rules) + place + 1,
                        split=f"{number + 1}/{len(cases)}",
                        rule=rule.name,
                    )
                case.forget()
        results = _write(workdir, settings, rules, cases, done, failed, clock)
    print_results(results)
    logging.info(f"wrote {workdir / _FILE}")
    return results


def previous(path: Path, settings: experiment.Settings) -> dict[str, dict[str, Any]]:
    """What an earlier run of the same `identity` left: name of the split to rule to row."""
    if not path.is_file():
        return {}
    try:
        results = files.read_json(path)
    except ValueError:
        results = {}
    is_ours = isinstance(results, dict) and results.get("identity") == identity(settings)
    if not (is_ours and _is_whole(results)):
        logging.warning(f"{path} is of another experiment, or damaged, and is replaced")
        return {}
    kept = _by_split(results)
    logging.info(
        f"kept {sum(map(len, kept.values()))} rows of {path}; without that file they are made again"
    )
    return kept


def _by_split(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of the split to rule to row, of the splits of the run and of others."""
    return {split["name"]: split["rows"] for split in results["splits"]} | results["others"]


def _is_whole(results: Mapping[str, Any]) -> bool:
    """Whether rows are what was written; those of before they were hashed are believed."""
    splits, others = results.get("splits"), results.get("others")
    if not (isinstance(splits, list) and isinstance(others, dict)):
        return False
    if not all(isinstance(split, dict) and {"name", "rows"} <= split.keys() for split in splits):
        return False
    if not all(isinstance(split["name"], str) for split in splits):
        return False
    found = _by_split(results)
    if not all(isinstance(rows, dict) for rows in found.values()):
        return False
    digest = files.json_hash(found)
    return results.get(_HASH, digest) == digest


def _attempt(
    case: Case, rule: Rule, clock: logging.Clock, found: dict[str, Any], failed: dict[str, str]
) -> None:
    logging.info(f"without {case.name}: {rule.name}")
    try:
        found[rule.name] = make_row(case, rule, clock)
    except Exception as error:  # whatever it is, the rows of the other rules are wanted
        failed[f"without {case.name}: {rule.name}"] = f"{type(error).__name__}: {error}"
        logging.warning(f"{rule.name} failed: {type(error).__name__}: {error}")


def _write(
    workdir: Path,
    settings: experiment.Settings,
    rules: Sequence[Rule],
    cases: Sequence[Case],
    done: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    clock: logging.Clock,
) -> dict[str, Any]:
    """Writes results.json with the rows so far; the means are of rules that are there for every split.

    Rows of splits that this run does not have stay in "others".
    """
    by_split = [done.get(case.name, {}) for case in cases]
    names = [rule.name for rule in rules if all(rule.name in found for found in by_split)]
    results = {
        "schema": 1,
        "commit": logging.commit(),
        "checkpoint_set": experiment.checkpoint_set(settings),
        "identity": identity(settings),
        "seed": settings["seed"],
        "device": logging.device(),
        "tasks": list(settings["tasks"]),
        "individual": cases[0].collected.individual,
        "rows": summaries({name: [found[name] for found in by_split] for name in names}),
        "splits": [
            {"name": case.name, "seen": case.seen, "unseen": case.unseen, "rows": found}
            for case, found in zip(cases, by_split, strict=True)
        ],
        "others": {name: done[name] for name in done if name not in {case.name for case in cases}},
        "failed": dict(failed),
        "seconds": dict(clock.seconds),
    }
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    results[_HASH] = files.json_hash(_by_split(results))
    artifact.write_json(workdir / _FILE, results)
    return results


def summaries(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row a rule for all splits.

    Args:
      rows: rule to its rows, one a split, of which "unseen" and "seen" are accuracies a task.

    Returns:
      As `evaluate.over_seeds`, of the unseen tasks' accuracies, relative to those of their own experts with such a
      head, with, each of the splits' means, "unseen_accuracy", "gain" over the pretrained model and
      "seen_normalized_accuracy", relative to the seen experts' own; the first two with "_interval", half the
      width of the 95% confidence interval of the mean over splits. What needs a row that is not there is None.
    """
    return [
        _summary(name, parts, rows.get(OWN), rows.get(PRETRAINED)) for name, parts in rows.items()
    ]


def _summary(
    name: str,
    parts: Sequence[Mapping[str, Any]],
    own: Sequence[Mapping[str, Any]] | None,
    pretrained: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    told = ("method", "variant", "needs", "bytes_per_task", "model_bytes", "seconds_fit")
    rows = [
        evaluate.result_row(
            **{key: part[key] for key in told},
            accuracy=part["unseen"],
            individual=own[place]["unseen"] if own else dict.fromkeys(part["unseen"], 0.0),
            task_known=False,
            head_known=True,
        )
        for place, part in enumerate(parts)
    ]
    row = evaluate.over_seeds(rows, range(len(parts)))
    del row["seeds"], row["peak_rss_bytes"]  # of this call, whatever the rows took
    means = [_mean(part["unseen"]) for part in parts]
    floors = [_mean(part["unseen"]) for part in pretrained or ()]
    gains = [mean - floor for mean, floor in zip(means, floors, strict=False)]
    kept = [
        metrics.normalized_accuracy(part["seen"], best["seen"])
        for part, best in zip(parts, own or (), strict=False)
        if min(best["seen"].values()) > 0
    ]
    return {
        **row,
        "rule": name,
        "unseen_accuracy": float(np.mean(means)),
        "unseen_accuracy_interval": evaluate.spread(means)[1],
        "gain": float(np.mean(gains)) if gains else None,
        "gain_interval": evaluate.spread(gains)[1],
        "seen_accuracy": float(np.mean([_mean(part["seen"]) for part in parts])),
        "seen_normalized_accuracy": float(np.mean(kept)) if len(kept) == len(parts) else None,
    }


def _mean(accuracy: Mapping[str, float]) -> float:
    return float(np.mean(list(accuracy.values())))


def print_results(results: Mapping[str, Any]) -> None:
    """Prints what every rule gives on unseen and on seen tasks, and the accuracies a task, as two tables."""
    rows = results["rows"]
    logging.table(
        f"unseen tasks, {len(results['splits'])} splits; +- 95% interval of the mean over splits",
        ["rule", "unseen", "over pretrained", "of own expert", "seen, of own", "KiB/task", "fit s"],
        [
            [
                row["rule"],
                _told(row["unseen_accuracy"], row["unseen_accuracy_interval"]),
                _told(row["gain"], row["gain_interval"], "+"),
                _told(row["normalized_accuracy"], row["normalized_accuracy_interval"]),
                row["seen_normalized_accuracy"],
                round(row["bytes_per_task"] / 1024),
                f"{row['seconds_fit']:.1f}",
            ]
            for row in rows
        ],
    )
    tasks = [task for task in results["tasks"] if rows and task in rows[0]["accuracy"]]
    logging.table(
        "test accuracy of tasks while unseen",
        ["rule", *tasks],
        [[row["rule"], *(row["accuracy"][task] for task in tasks)] for row in rows],
    )


def _told(mean: float | None, half_width: float | None, sign: str = "") -> str | None:
    if mean is None:
        return None
    return f"{mean:{sign}.3f}" + ("" if half_width is None else f" +- {half_width:.3f}")


def main() -> None:
    """Evaluates the experiment file's tasks as unseen ones."""
    config = _CONFIG.value
    results = evaluate_unseen(config, _WORKDIR.value or Path("workdirs") / f"{config.name}_unseen")
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "results; workdirs/NAME_unseen if not given")
    command_line.run(main, required="config")
