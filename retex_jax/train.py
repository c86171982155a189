"""Merges experts, recovers each from the merged model, identifies tasks, and evaluates all of it.

    python -m retex_jax.train --config=configs/demo.py

Load, preflight, merge, fit offsets, fit identifier, evaluate, write. Experts that the experiment lacks are fine-tuned
first and cached. The workdir (workdirs/NAME by default) receives results.json, report.html, artifact.safetensors with
manifest.json, and metrics.jsonl. The same command resumes an interrupted run. --dry_run only checks, downloads nothing,
says what the run takes (see `retex_jax.estimate`), and exits with 1 if something is wrong, or missing that the run does
not download.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from absl import flags

from retex_jax import (
    artifact,
    checkpoint,
    collection,
    command_line,
    distributed,
    estimate,
    evaluate,
    experiment,
    identification,
    logging,
    offsets,
    preflight,
    release,
    report,
)
from retex_jax.calibration import Calibration
from retex_jax.experts import ExpertSet
from retex_jax.methods import METHODS
from retex_jax.preemption import Guard

_UNFINISHED = "unfinished"


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Runs an experiment from experts to report.

    Args:
      config: the experiment, as configs/demo.py returns it.
      workdir: where results are written; one workdir holds one experiment.

    Returns:
      The content of results.json.

    Raises:
      ValueError: if the settings cannot run (all problems are listed), the workdir holds another
        experiment, or the experts do not fit the pretrained model.
      RuntimeError: if something cannot be downloaded, or another run uses the workdir.
    """
    settings, workdir = command_line.as_dict(config), Path(workdir)
    clock, key = logging.Clock(), jax.random.key(settings["seed"])
    preflight.check(settings)
    preflight.check_workdir(settings, workdir)
    experiment.start()
    with logging.WorkdirLock(workdir):
        with clock("load"):
            experiment.fetch(settings, announce=logging.info)
            backbone, tasks = experiment.load(settings)
            preflight.check_tasks(settings, tasks)
        artifact.write_json(workdir / "config.json", settings)
        writer = logging.MetricWriter(workdir, **settings["writers"])

        with clock("experts"):
            collected = collection.collect(settings, backbone, tasks)
        names, experts, heads = list(collected.heads), collected.experts, collected.heads
        suite = collection.make_suite(settings, backbone, tasks, collected)
        rows = []
        for method, variant, options in comparisons(settings):
            with clock(phase := f"fit {method} {variant}".strip()):
                fitted = METHODS[method].fit(experts, key=key, **options)
                jax.block_until_ready(METHODS[method].recover(fitted, 0))
            with clock("evaluate"):
                rows.append(
                    evaluate.known_row(suite, method, variant, fitted, clock.seconds[phase])
                )

        spec = settings["offsets"]
        size = f"budget={spec['budget']}" if spec["budget"] else f"r={spec['rank']}"
        variant = f"{spec['solver']} {size}"
        with clock(phase := f"fit retex {variant}"):
            inputs = collection.offset_calibration(settings, backbone, tasks, collected)
            state = fit_offsets(settings, experts, key, writer, workdir, inputs)
        with clock("fit identifier"):
            identifier, choice = identification.obtain(settings, backbone.model, state, tasks, key)
        seconds = clock.seconds[phase]
        with clock("evaluate"):
            rows.append(evaluate.known_row(suite, "retex", variant, state, seconds))
            unknown_rows, confusion = evaluate.unknown_rows(
                suite, variant, state, identifier, seconds
            )

        run = {
            "commit": logging.commit(),
            "checkpoint_set": experiment.checkpoint_set(settings),
            "individual": suite.individual,
        }
        results = {
            "schema": 1,
            **run,
            "seed": settings["seed"],
            "device": logging.device(),
            "tasks": names,
            "linear_probe": collected.linear_probe,
            "rows": rows + unknown_rows,
            "offsets": summary(settings, state.report, seconds),
            "identifier": choice,
            "seconds": dict(clock.seconds),
        }
        facts = {
            **run,
            "settings": settings,
            "variant": variant,
            "seconds_fit": seconds,
            "identifier_choice": choice,
            "architecture": backbone.architecture,
            "hf_config": experiment.hf_config(backbone),
            "classes": {task.name: list(task.classes) for task in tasks},
        }
        with clock("write"):
            released = release.Release(state, identifier, heads, facts)
            results = write(settings, workdir, results, released, confusion)
            shutil.rmtree(workdir / _UNFINISHED, ignore_errors=True)
        writer.resume(0, phase="seconds")
        writer.write(0, clock.seconds, phase="seconds")
        writer.close()
    evaluate.print_results(names, suite.individual, results["rows"])
    tell(workdir, results)
    return results


def comparisons(settings: experiment.Settings) -> list[tuple[str, str, dict[str, Any]]]:
    """What the recovered experts are compared with: (method, variant, options) of each fit."""
    spec = settings["offsets"]
    mergers = [
        (name, ", ".join(f"{key}={value}" for key, value in options.items()), options)
        for name, options in settings["baselines"].items()
    ]
    names = ("rank_rule", "orientation", "base", "base_options")
    common = {name: spec[name] for name in names}
    ranks = [
        ("retex", f"exact r={rank}", {"rank": rank, **common, **spec["exact"]})
        for rank in spec["extra_ranks"]
    ]
    return mergers + ranks


def fit_offsets(
    settings: experiment.Settings,
    experts: ExpertSet,
    key: jax.Array,
    writer: logging.MetricWriter,
    workdir: Path,
    calibration: Calibration | None = None,
) -> offsets.OffsetState:
    """Fits the offsets with progress; an unfinished fit is kept in the workdir and resumed."""
    spec = settings["offsets"]
    solver, options = spec["solver"], dict(spec[spec["solver"]])
    matrices = [name for name in experts.float_leaves if len(experts.leaves[name].shape) > 1]
    steps = options["steps"] if solver == "adam" else len(matrices)
    unfinished = workdir / _UNFINISHED
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(logging.progress(steps, f"fit offsets, {solver}"))
        if solver == "adam":
            kept = checkpoint.Checkpointer(unfinished)
            latest = kept.latest()
            writer.resume(0 if latest is None else latest + 1, phase="offsets")
            if latest is not None:
                logging.info(f"fit offsets: resumed at step {latest}")

            def show(done: int, _: int, loss: float) -> None:
                bar.update(done, loss=loss)
                writer.write(done, {"loss": loss}, phase="offsets")

            guard = stack.enter_context(Guard())
            options.update(
                checkpoints=kept,
                progress=show,
                preempted=lambda: distributed.any_process(guard.is_called),
            )
        else:
            unfinished.mkdir(parents=True, exist_ok=True)
            options.update(
                progress=lambda done, total: bar.update(done * steps // total),
                file=unfinished / "offsets.safetensors",
                resume=experiment.checkpoint_set(settings),
            )
        state = offsets.fit(
            experts,
            key=key,
            solver=solver,
            **experiment.offset_size(spec),
            base=spec["base"],
            base_options=spec["base_options"],
            calibration=calibration,
            **options,
        )
        return jax.block_until_ready(state)


def summary(
    settings: experiment.Settings, fit_report: offsets.FitReport, seconds: float
) -> dict[str, Any]:
    """The certificate of the fit, for results.json."""
    return {
        "solver": settings["offsets"]["solver"],
        "rank": None if settings["offsets"]["budget"] else settings["offsets"]["rank"],
        "budget": settings["offsets"]["budget"] or None,
        "residual": fit_report.residual,
        "optimum": fit_report.optimum,
        "ratio": fit_report.ratio,
        "energy": fit_report.energy,
        "seconds": seconds,
    }


def write(
    settings: experiment.Settings,
    workdir: Path,
    results: Mapping[str, Any],
    released: release.Release,
    confusion: np.ndarray,
) -> dict[str, Any]:
    """Writes the artefact, results.json and report.html, each beside and then renamed.

    Returns:
      The results as they are written: numbers that JSON lacks (NaN, infinity) are None.
    """
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    release.save(workdir, released)
    artifact.write_json(workdir / "results.json", results)
    report.write(
        workdir / "report.html",
        results,
        spectra=grouped_spectra(released.state.report),
        confusion=[("Identified task of unlabelled mixed inputs", confusion)],
        seconds=results["seconds"],
        config_text=json.dumps(settings, indent=1),
    )
    return results


def grouped_spectra(fit_report: offsets.FitReport) -> dict[str, np.ndarray]:
    """Singular values of the stacked offsets by kind of leaf, squares summed over the blocks."""
    kinds: dict[str, np.ndarray] = {}
    for name, squared in fit_report.spectra.items():
        # Of a leaf that is too large only the stored directions are known.
        known = np.asarray(squared)
        sums = kinds.setdefault(offsets.kind_of(name), np.zeros(len(known)))
        size = min(len(sums), len(known))
        kinds[offsets.kind_of(name)] = sums[:size] + known[:size]
    return {kind: np.sqrt(squared) for kind, squared in kinds.items() if squared.sum() > 0}


def tell(workdir: Path, results: Mapping[str, Any]) -> None:
    """Says what came out and where it lies."""
    fit = results["offsets"]
    logging.info(
        f"offsets: residual {fit['residual']}, optimum {fit['optimum']}, ratio {fit['ratio']}, "
        f"{fit['seconds']:.1f} s"
    )
    for name, what in (
        ("report.html", "open this first"),
        ("results.json", "every figure"),
        ("artifact.safetensors", "merged model, offsets, signatures, heads; with manifest.json"),
    ):
        logging.info(f"wrote {workdir / name}: {what}")


def dry_run(settings: experiment.Settings, workdir: Path) -> NoReturn:
    """Checks an experiment and its workdir without downloading or running anything, and says what it takes.

    Exits with 1 if it cannot run.
    """
    takes = [] if preflight.lacking(settings) else estimate.lines(settings)
    command_line.end_dry_run(
        preflight.missing(settings, workdir), preflight.downloads(settings), takes
    )


def main() -> None:
    """Runs the experiment file, or checks it."""
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("workdirs") / config.name)
    if _DRY_RUN.value:
        dry_run(command_line.as_dict(config), workdir)
    train(config, workdir)


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "results; workdirs/NAME when not given")
    _DRY_RUN = command_line.define_dry_run()
    command_line.run(main, required="config")
