"""Fits many methods on one experiment's experts and compares them in one table.

    python -m retex_jax.compare --config=configs/minilm_text8.py --config.methods=all
    python -m retex_jax.compare --config=configs/demo.py --config.methods=ties,emr,dts_t,retex

The task is known, but for methods that mix experts by input: these see shuffled inputs of all tasks, and each task's
own head predicts. The workdir (workdirs/NAME_compare by default) receives results.json and report.html with the plot of
accuracy against bytes. A method that fails is reported with its error, and the rest go on; the exit status is then 1.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from retex_jax import (
    artifact,
    collection,
    command_line,
    evaluate,
    experiment,
    logging,
    preflight,
    report,
    tree,
)
from retex_jax.methods import METHODS, NEEDS

ALL = "all"

# Beside the defaults of each method, or instead of them where they need a choice: (method, options).
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("weight_average", {}),
    ("task_arithmetic", {"scaling": 0.3}),
    ("ties", {"density": 0.2, "merge": "mean", "scaling": 1.0}),
    ("dare", {"drop": 0.5, "merge": "task_arithmetic"}),
    ("dare", {"drop": 0.5, "merge": "ties"}),
    ("consensus", {}),
    ("fisher", {"num_samples": 1}),
    ("regmean", {}),
    ("adamerging", {"granularity": "task"}),
    ("adamerging", {"granularity": "layer"}),
    ("adamerging", {"granularity": "layer", "plus_plus": True}),
    ("svd", {}),
    ("dts_t", {}),
    ("dts_t", {"amr": 0.01}),
    ("dts_d", {}),
    ("tall_mask", {}),
    ("emr", {}),
    ("t_switch", {}),
    ("twin", {}),
    ("dawin", {}),
    ("smear_frozen", {}),
    ("wemoe", {}),
)


def plan(settings: experiment.Settings) -> list[tuple[str, str, dict[str, Any]]]:
    """What is fitted: (method, variant, options) of each.

    Args:
      settings: `methods` is "all" or names joined by commas; `method_options` has options of a
        method that differ from its `VARIANTS`; ReTeX comes at `offsets.rank` and
        `offsets.extra_ranks`.

    Returns:
      In the order of the table.

    Raises:
      ValueError: if a name is unknown.
    """
    offsets = settings["offsets"]
    ranks = sorted({offsets["rank"], *offsets["extra_ranks"]})
    entries = [*VARIANTS, *(("retex", {"rank": rank}) for rank in ranks)]
    chosen = settings["methods"]
    names = list(METHODS) if chosen == ALL else [name.strip() for name in chosen.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        hint = tree.did_you_mean(unknown[0], METHODS)
        raise ValueError(
            f"methods: got {unknown}, expected {ALL!r} or some of {sorted(METHODS)}{hint}"
        )
    return [
        (method, ", ".join(f"{key}={value}" for key, value in options.items()), dict(options))
        for method, options in (
            (method, {**options, **settings["method_options"].get(method, {})})
            for method, options in entries
        )
        if method in names
    ]


def compare(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Fits and evaluates every planned method.

    Args:
      config: the experiment.
      workdir: receives results.json and report.html.

    Returns:
      The content of results.json; "failed" holds what went wrong, by method and variant.

    Raises:
      ValueError: if the settings cannot run, or every method failed.
      RuntimeError: if something cannot be downloaded, or another run uses the workdir.
    """
    settings, workdir = command_line.as_dict(config), Path(workdir)
    clock, key = logging.Clock(), jax.random.key(settings["seed"])
    preflight.check(settings)
    entries = plan(settings)
    experiment.start()
    with logging.WorkdirLock(workdir):
        with clock("load"):
            experiment.fetch(settings, announce=logging.info)
            backbone, tasks = experiment.load(settings)
        with clock("experts"):
            collected = collection.collect(settings, backbone, tasks)
        suite = collection.make_suite(settings, backbone, tasks, collected)
        calibrations = collection.calibrate(settings, backbone, tasks, collected)
        rows, failed = [], {}
        with logging.progress(len(entries), "methods") as bar:
            for done, (method, variant, options) in enumerate(entries):
                name = f"{method} {variant}".strip()
                try:
                    if split := NEEDS[METHODS[method].needs]:
                        options["calibration"] = calibrations[split]
                    with clock(phase := f"fit {name}"):
                        state = METHODS[method].fit(collected.experts, key=key, **options)
                        jax.block_until_ready(METHODS[method].recover(state, 0))
                    with clock("evaluate"):
                        seconds = clock.seconds[phase]
                        if METHODS[method].predict is None:
                            row = evaluate.known_row(suite, method, variant, state, seconds)
                        else:
                            row = evaluate.routed_row(
                                suite,
                                method,
                                variant,
                                state,
                                calibrations["test"],
                                settings["evaluate"]["routed_inputs"],
                                seconds,
                            )
                        rows.append(row)
                except (ValueError, TypeError, RuntimeError, FloatingPointError) as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    logging.warning(f"{name} failed: {failed[name]}")
                bar.update(done + 1)
        if not rows:
            raise ValueError(f"methods: all failed: {failed}")
        results = {
            "schema": 1,
            "commit": logging.commit(),
            "checkpoint_set": experiment.checkpoint_set(settings),
            "seed": settings["seed"],
            "device": logging.device(),
            "tasks": list(collected.heads),
            "individual": suite.individual,
            "linear_probe": collected.linear_probe,
            "rows": rows,
            "failed": failed,
            "seconds": dict(clock.seconds),
        }
        results = json.loads(json.dumps(results), parse_constant=lambda _: None)
        artifact.write_json(workdir / "results.json", results)
        report.write(
            workdir / "report.html",
            results,
            seconds=results["seconds"],
            config_text=json.dumps(settings, indent=1),
        )
    evaluate.print_methods(results["rows"])
    logging.info(f"wrote {workdir / 'report.html'} and {workdir / 'results.json'}")
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
