"""Merges experts, recovers each from the merged model, identifies tasks, and evaluates all of it.

    python -m retex_jax.train --config=configs/demo.py

Load, preflight, merge, fit offsets, fit identifier, evaluate, write. Experts that the experiment lacks are fine-tuned
first and cached. The workdir (workdirs/NAME by default) receives results.json, report.html, artifact.safetensors with
manifest.json, and metrics.jsonl. The same command resumes an interrupted run. --dry_run only checks, downloads nothing,
and exits with 1 if something is missing.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from retex_jax import (
    artifact,
    checkpoint,
    command_line,
    data,
    evaluate,
    experiment,
    finetune,
    logging,
    offsets,
    recovery,
    release,
    report,
)
from retex_jax.experts import ExpertSet, read_safetensors
from retex_jax.identifier import subspace
from retex_jax.methods import METHODS


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
    clock, key = Clock(), jax.random.key(settings["seed"])
    experiment.start()
    experiment.check(settings)
    check_workdir(settings, workdir)
    with logging.WorkdirLock(workdir):
        artifact.write_json(workdir / "config.json", settings)
        writer = logging.MetricWriter(workdir)

        with clock("load"):
            experiment.fetch(settings, announce=logging.info)
            backbone, tasks = experiment.load(settings)

        with clock("fine-tune"):
            directory = experiment.experts_directory(settings)
            records = finetune.build_experts(
                backbone, tasks, directory, experiment.finetune_settings(settings)
            )
            individual = {name: record["accuracy"]["test"] for name, record in records.items()}

        with clock("read experts"):
            names = [task.name for task in tasks]
            paths = {name: directory / f"{name}.safetensors" for name in names}
            experts = ExpertSet.from_safetensors(
                directory / f"{finetune.PRETRAINED}.safetensors",
                list(paths.values()),
                names=names,
                layout="flax",
                exclude=["^head/"],
            )
            heads = {name: read_safetensors(paths[name], "^head/")["head"] for name in names}

        rows = []
        batch_size = settings["evaluate"]["batch_size"]
        for method, variant, options in comparisons(settings):
            phase = f"fit {method} {variant}".strip()
            with clock(phase):
                fitted = METHODS[method].fit(experts, key=key, **options)
                jax.block_until_ready(METHODS[method].recover(fitted, 0))
            with clock("evaluate"):
                rows.append(
                    evaluate.known_row(
                        method,
                        variant,
                        fitted,
                        backbone.model,
                        tasks,
                        list(heads.values()),
                        individual,
                        batch_size,
                        clock.seconds[phase],
                    )
                )

        solver, rank = settings["offsets"]["solver"], settings["offsets"]["rank"]
        variant = f"{solver} r={rank}"
        phase = f"fit retex {variant}"
        with clock(phase):
            state = fit_offsets(settings, experts, key, writer, workdir)

        with clock("fit identifier"):
            identifier = fit_identifier(settings, backbone.model, state, tasks)

        released = release.Release(
            state,
            identifier,
            heads,
            {
                "settings": settings,
                "individual": individual,
                "checkpoint_set": experiment.checkpoint_set(settings),
                "commit": commit(),
                "variant": variant,
                "seconds_fit": clock.seconds[phase],
            },
        )
        with clock("evaluate"):
            recovered, confusion = evaluate.evaluate_release(
                backbone.model,
                released,
                tasks,
                individual,
                variant=variant,
                batch_size=batch_size,
                seed=settings["seed"],
                seconds_fit=clock.seconds[phase],
            )

        results = {
            "schema": 1,
            "commit": commit(),
            "checkpoint_set": experiment.checkpoint_set(settings),
            "seed": settings["seed"],
            "device": device(),
            "tasks": names,
            "individual": individual,
            "linear_probe": {
                name: record["linear_probe"]["test"] for name, record in records.items()
            },
            "rows": rows + recovered,
            "offsets": {
                "solver": solver,
                "rank": rank,
                "residual": state.report.residual,
                "optimum": state.report.optimum,
                "ratio": state.report.ratio,
                "energy": state.report.energy,
                "seconds": clock.seconds[phase],
            },
            "seconds": clock.seconds,
        }
        with clock("write"):
            write(settings, workdir, results, released, confusion)
        writer.write(0, clock.seconds, phase="seconds")
        writer.close()
    evaluate.print_results(names, individual, results["rows"])
    tell(workdir, results)
    return results


class Clock:
    """Wall-clock seconds by phase; phases of one name add up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times its block, and announces a phase when it first begins."""
        if phase not in self.seconds:
            logging.info(phase)
            self.seconds[phase] = 0.0
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started


def comparisons(settings: experiment.Settings) -> list[tuple[str, str, dict[str, Any]]]:
    """What the recovered experts are compared with: (method, variant, options) of each fit."""
    spec = settings["offsets"]
    mergers = [
        (name, ", ".join(f"{key}={value}" for key, value in options.items()), options)
        for name, options in settings["baselines"].items()
    ]
    common = {"rank_rule": spec["rank_rule"], "base": spec["base"]}
    common["base_options"] = spec["base_options"]
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
) -> offsets.OffsetState:
    """Fits the offsets with progress; an unfinished Adam fit is kept in the workdir and resumed."""
    spec = settings["offsets"]
    solver, options = spec["solver"], dict(spec[spec["solver"]])
    steps = options["steps"] if solver == "adam" else len(experts.leaves)
    with logging.progress(steps, f"fit offsets, {solver}, rank {spec['rank']}") as bar:
        if solver == "adam":
            kept = checkpoint.Checkpointer(workdir / "unfinished")
            writer.resume(kept.latest() or 0, phase="offsets")

            def show(done: int, _: int, loss: float) -> None:
                bar.update(done, loss=loss)
                writer.write(done, {"loss": loss}, phase="offsets")

            options.update(checkpoints=kept, progress=show)
        else:
            options.update(progress=lambda done, _: bar.update(done))
        state = offsets.fit(
            experts,
            key=key,
            rank=spec["rank"],
            rank_rule=spec["rank_rule"],
            solver=solver,
            base=spec["base"],
            base_options=spec["base_options"],
            **options,
        )
        return jax.block_until_ready(state)


def fit_identifier(
    settings: experiment.Settings,
    model: Any,
    state: offsets.OffsetState,
    tasks: Sequence[data.Task],
) -> recovery.Identifier:
    """Fits one signature a task on the merged model's features of unlabelled training inputs."""
    spec = settings["identifier"]
    features = [
        recovery.run(
            model,
            state.merged,
            data.take(task.splits["train"], np.arange(spec["num_calibration"])),
            settings["evaluate"]["batch_size"],
            layer=spec["layer"],
        )
        for task in tasks
    ]
    signatures = subspace.fit(
        features, spec["rank"], center=spec["center"], normalize=spec["normalize"]
    )
    return recovery.Identifier(signatures, spec["layer"])


def write(
    settings: experiment.Settings,
    workdir: Path,
    results: Mapping[str, Any],
    released: release.Release,
    confusion: np.ndarray,
) -> None:
    """Writes the artefact, results.json and report.html, each beside and then renamed."""
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


def grouped_spectra(fit_report: offsets.FitReport) -> dict[str, np.ndarray]:
    """Singular values of the stacked offsets by kind of leaf, squares summed over the blocks."""
    kinds: dict[str, np.ndarray] = {}
    for name, squared in fit_report.spectra.items():
        kind = re.sub(r"_\d+(?=/|$)", "", name)
        kinds[kind] = kinds.get(kind, 0) + np.asarray(squared)
    return {kind: np.sqrt(squared) for kind, squared in kinds.items() if squared.sum() > 0}


def check_workdir(settings: experiment.Settings, workdir: Path) -> None:
    """Makes sure that a workdir in use holds this experiment.

    Raises:
      ValueError: if it holds another one; the entries that differ are named.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return
    try:
        existing = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --workdir") from error
    if existing == settings:
        return
    ours, theirs = _entries(settings), _entries(existing)
    differing = [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    raise ValueError(
        f"workdir {workdir} holds another experiment; choose another --workdir. They differ in:\n  "
        + "\n  ".join(differing)
    )


def _entries(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    entries = {}
    for name, child in value.items():
        entries.update(_entries(child, f"{prefix}.{name}" if prefix else name))
    return entries


def commit() -> str:
    """The commit of the checkout that this package lies in, "+" if it is changed; or "unknown"."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def device() -> str:
    """What the run computes on, such as "8 x NVIDIA H100"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def tell(workdir: Path, results: Mapping[str, Any]) -> None:
    """Says what came out and where it lies."""
    fit = results["offsets"]
    logging.info(
        f"offsets: residual {fit['residual']:.6g}, optimum {fit['optimum']:.6g}, "
        f"ratio {fit['ratio']:.6f}, {fit['seconds']:.1f} s"
    )
    for name, what in (
        ("report.html", "open this first"),
        ("results.json", "every figure"),
        ("artifact.safetensors", "merged model, offsets, signatures, heads; with manifest.json"),
    ):
        logging.info(f"wrote {workdir / name}: {what}")


def dry_run(settings: experiment.Settings) -> None:
    """Checks an experiment without downloading or computing anything; exits with 1 if it cannot run."""
    problems = experiment.missing(settings)
    for line in problems or ["everything that this experiment needs is here"]:
        print(line)
    sys.exit(1 if problems else 0)


def main() -> None:
    """Runs the experiment file, or checks it."""
    config = _CONFIG.value
    if _DRY_RUN.value:
        dry_run(command_line.as_dict(config))
    train(config, _WORKDIR.value or Path("workdirs") / config.name)


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "results; workdirs/NAME when not given")
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "only check what is missing; downloads nothing")
    command_line.run(main, required="config")
