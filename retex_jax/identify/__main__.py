"""Compares identifiers on an experiment's experts: accuracy, cost, unknown tasks, and what the recovered experts reach.

    python -m retex_jax.identify --config=configs/minilm_text8.py
    python -m retex_jax.identify --config=configs/demo.py --config.identify.experts=False

The experts are merged (`offsets.base`), and the merged model runs once over calibration inputs (`identifier.
num_calibration` unlabelled training inputs a task), validation inputs and test inputs. Of each identifier layers and
options are chosen on the validation inputs, and the test inputs are identified: without a limit on what the forward
pass costs, and within `identify.max_forward`. The best within it is recommended: with an exact fit of the experiment's
offsets it routes the test inputs, beside the oracle that knows their tasks. Tasks are held out as unknown in turn.

The workdir (workdirs/NAME_identify by default) receives results.json and report.html.
"""

import json
from collections.abc import Mapping, Sequence
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
    identification,
    logging,
    offsets,
    preflight,
    recovery,
    search,
    task_features,
)
from retex_jax.calibration import Calibration
from retex_jax.collection import Collection
from retex_jax.identification import Candidate
from retex_jax.identifier import IDENTIFIERS, held_out, selection
from retex_jax.identify import report
from retex_jax.pretrained import Backbone
from retex_jax.task_features import TaskFeatures


def identify(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Compares identifiers and writes what came out.

    Args:
      config: the experiment, as configs/demo.py returns it.
      workdir: receives results.json and report.html.

    Returns:
      The content of results.json.

    Raises:
      ValueError: if the settings cannot run; all problems are listed.
      RuntimeError: if something cannot be downloaded, or another run uses the workdir.
    """
    settings, workdir = command_line.as_dict(config), Path(workdir)
    preflight.check(settings, identifies=True)
    experiment.start()
    clock, key = logging.Clock(), jax.random.key(settings["seed"])
    with logging.WorkdirLock(workdir):
        with clock("load"):
            experiment.fetch(settings, announce=logging.info)
            backbone, tasks = experiment.load(settings)
            preflight.check_tasks(settings, tasks)
        with clock("experts"):
            collected = collection.collect(settings, backbone, tasks)
        with clock("fit offsets"):
            inputs = collection.offset_calibration(settings, backbone, tasks, collected)
            state = fit_offsets(settings, collected, key, inputs)
        with clock("features"):
            features = extract(settings, backbone, tasks, state)
        with clock("choose"):
            found = choose(settings, features, backbone.model.config.num_layers, key)
        with clock("identify"):
            rows, recommended = rank(settings, tasks, features, found, backbone, key)
            sweep = calibration_sweep(settings, tasks, features, rows, key)
        with clock("unknown tasks"):
            detections = detect(settings, tasks, features, rows, key)
        with clock("evaluate"):
            routed = route(
                settings, backbone, tasks, collected, state, features, recommended, clock, key
            )
        results = {
            "schema": 1,
            "commit": logging.commit(),
            "checkpoint_set": experiment.checkpoint_set(settings),
            "seed": settings["seed"],
            "device": logging.device(),
            "tasks": list(collected.heads),
            "individual": collected.individual,
            "linear_probe": collected.linear_probe,
            "num_layers": backbone.model.config.num_layers,
            "target": settings["identify"]["target"],
            "identifiers": rows,
            "calibration_sizes": sweep,
            "out_of_distribution": [
                report.detection_row(kind, detection, list(collected.heads))
                for kind, detection in detections
            ],
            **routed,
            "trials": {kind: report.trials(result) for kind, result in found.items()},
            "seconds": dict(clock.seconds),
        }
        results = json.loads(json.dumps(results), parse_constant=lambda _: None)
        artifact.write_json(workdir / "results.json", results)
        report.write(workdir / "report.html", results, detections, settings)
    report.print_results(results)
    logging.info(f"wrote {workdir / 'report.html'} and {workdir / 'results.json'}")
    return results


def fit_offsets(
    settings: experiment.Settings,
    collected: Collection,
    key: jax.Array,
    calibration: Calibration | None,
) -> offsets.OffsetState:
    """Merges the experts and fits the experiment's offsets exactly."""
    spec = settings["offsets"]
    state = offsets.fit(
        collected.experts,
        key=key,
        solver="exact",
        **experiment.offset_size(spec),
        base=spec["base"],
        base_options=spec["base_options"],
        calibration=calibration,
        **spec["exact"],
    )
    return jax.block_until_ready(state)


def extract(
    settings: experiment.Settings,
    backbone: Backbone,
    tasks: Sequence[data.Task],
    state: offsets.OffsetState,
) -> dict[bool, TaskFeatures]:
    """Features by whether they are the recovered experts' (only if an identifier needs them) or the merged model's."""
    spec, num_layers = settings["identify"], backbone.model.config.num_layers
    count = max([settings["identifier"]["num_calibration"], *spec["calibration_sizes"]])
    needed = {IDENTIFIERS[kind].needs_experts for kind in experiment.identifier_kinds(spec)}
    features = {}
    for experts in sorted(needed):
        model = "recovered experts" if experts else "merged model"
        total = task_features.num_inputs(tasks, count, experts=experts)
        with logging.progress(total, f"features of the {model}") as bar:

            def params(task: int, experts: bool = experts) -> Any:
                return offsets.recover(state, task) if experts else state.merged

            def show(done: int, _: int, bar: logging.Progress = bar) -> None:
                bar.update(done)

            features[experts] = task_features.extract(
                backbone.model,
                params,
                tasks,
                range(num_layers + 1),
                count,
                settings["evaluate"]["batch_size"],
                experts=experts,
                progress=show,
            )
    return features


def choose(
    settings: experiment.Settings,
    features: Mapping[bool, TaskFeatures],
    num_layers: int,
    key: jax.Array,
) -> dict[str, search.SearchResult]:
    """Searches layers and options of each identifier on validation inputs."""
    count = settings["identifier"]["num_calibration"]
    kinds = experiment.identifier_kinds(settings["identify"])
    own = {kind: _first(features[IDENTIFIERS[kind].needs_experts], count) for kind in kinds}
    sizes = {kind: identification.num_candidates(kind, own[kind], num_layers) for kind in kinds}
    found, done = {}, 0
    with logging.progress(sum(sizes.values()), "candidates on validation inputs") as bar:
        for kind in kinds:

            def show(count: int, _: int, before: int = done, kind: str = kind) -> None:
                bar.update(before + count, identifier=kind)

            found[kind] = identification.choose(kind, own[kind], num_layers, key=key, progress=show)
            done += sizes[kind]
    return found


def rank(
    settings: experiment.Settings,
    tasks: Sequence[data.Task],
    features: Mapping[bool, TaskFeatures],
    found: Mapping[str, search.SearchResult],
    backbone: Backbone,
    key: jax.Array,
) -> tuple[list[dict[str, Any]], Candidate]:
    """Identifies test inputs by the best of each kind, whatever it costs and within the limit.

    Returns:
      Rows, "limit" being the limit or None; that of the recommended candidate, the best on validation inputs of those
      within the limit, has "recommended" True. And that candidate.
    """
    limit, num_layers = settings["identify"]["max_forward"], backbone.model.config.num_layers
    chosen: list[tuple[float | None, Candidate]] = []
    for kind, result in found.items():
        for bound in (None, limit):
            most = {} if bound is None else {"max_forward": bound}
            best = identification.best(kind, result, num_layers, len(tasks), **most)
            if best is not None:
                chosen.append((bound, best))
    within = [candidate for bound, candidate in chosen if bound is not None]
    recommended = max(within, key=lambda candidate: candidate.validation_accuracy or 0.0)
    count, names = settings["identifier"]["num_calibration"], [task.name for task in tasks]
    rows = []
    for bound, candidate in chosen:
        own = features[IDENTIFIERS[candidate.kind].needs_experts]
        row = identification.row(candidate, own, names, num_calibration=count, key=key)
        is_best = bound is not None and candidate is recommended
        rows.append({**row, "limit": bound, "recommended": is_best})
    return rows, recommended


def calibration_sweep(
    settings: experiment.Settings,
    tasks: Sequence[data.Task],
    features: Mapping[bool, TaskFeatures],
    rows: Sequence[Mapping[str, Any]],
    key: jax.Array,
) -> list[dict[str, Any]]:
    """Accuracy of each row's identifier, with its layers and options, fitted to other numbers of inputs.

    A rank, or a number of neighbours, that a number of inputs does not allow is lowered to what it allows.
    """
    sizes, names = settings["identify"]["calibration_sizes"], [task.name for task in tasks]
    swept = []
    for row in rows:
        own = features[IDENTIFIERS[row["identifier"]].needs_experts]
        accuracy = {}
        for size in sizes:
            options = dict(row["options"])
            if "rank" in options:
                options["rank"] = min(options["rank"], size - 1)
            if "k" in options:
                options["k"] = min(options["k"], size * len(names))
            candidate = Candidate(
                row["identifier"],
                row["layer"],
                options,
                row["validation_accuracy"],
                row["forward"],
            )
            found = identification.row(candidate, own, names, num_calibration=size, key=key)
            accuracy[str(size)] = found["accuracy"]
        facts = {name: row[name] for name in ("identifier", "layer", "limit")}
        swept.append({**facts, "accuracy": accuracy})
    return swept if sizes else []


def detect(
    settings: experiment.Settings,
    tasks: Sequence[data.Task],
    features: Mapping[bool, TaskFeatures],
    rows: Sequence[Mapping[str, Any]],
    key: jax.Array,
) -> list[tuple[str, held_out.Detection]]:
    """Holds out tasks for the best of each kind within the limit: (kind, detection) of each split and measure.

    The held-out tasks' validation inputs had a part in the choice of layers and options, but in nothing else.
    """
    spec, names = settings["identify"], [task.name for task in tasks]
    splits = [[task] for task in names] if not spec["unseen"] else spec["unseen"]
    count = settings["identifier"]["num_calibration"]
    within = [row for row in rows if row["limit"] is not None]
    detections = []
    with logging.progress(len(within) * len(splits), "tasks held out") as bar:
        for row in within:
            kind = row["identifier"]
            own = _first(features[IDENTIFIERS[kind].needs_experts], count)
            calibration, validation, test = (selection.stacked(part, row["layer"]) for part in own)
            for split in splits:
                held = [split] if isinstance(split, str) else split
                found = held_out.detect(
                    kind,
                    row["options"],
                    calibration,
                    validation,
                    test,
                    [names.index(name) for name in held],
                    target=spec["target"],
                    key=key,
                )
                detections += [(kind, detection) for detection in found]
                bar.update(len(detections) // len(held_out.MEASURES), identifier=kind)
    return detections


def route(
    settings: experiment.Settings,
    backbone: Backbone,
    tasks: Sequence[data.Task],
    collected: Collection,
    state: offsets.OffsetState,
    features: Mapping[bool, TaskFeatures],
    recommended: Candidate,
    clock: logging.Clock,
    key: jax.Array,
) -> dict[str, Any]:
    """The recovered experts with the task known and unknown: "rows" of results.json, and where the "gap" comes from."""
    count = settings["identifier"]["num_calibration"]
    own = _first(features[IDENTIFIERS[recommended.kind].needs_experts], count)
    fitted = identification.fit(recommended, own.calibration, key=key)
    identifier = recovery.Identifier(fitted, recommended.layer, recommended.kind)
    suite = collection.make_suite(settings, backbone, tasks, collected)
    spec, seconds = settings["offsets"], clock.seconds["fit offsets"]
    size = f"budget={spec['budget']}" if spec["budget"] else f"r={spec['rank']}"
    variant = f"exact {size}"
    oracle = evaluate.known_row(suite, "retex", variant, state, seconds)
    rows, _ = evaluate.unknown_rows(suite, variant, state, identifier, seconds)
    return {"rows": [oracle, *rows], "gap": report.gap(oracle, *rows)}


def _first(features: TaskFeatures, count: int) -> TaskFeatures:
    """With the first calibration inputs only."""
    cut = {layer: [task[:count] for task in tasks] for layer, tasks in features.calibration.items()}
    return features._replace(calibration=cut)


def main() -> None:
    """Compares identifiers on the experiment file's experts."""
    config = _CONFIG.value
    identify(config, _WORKDIR.value or Path("workdirs") / f"{config.name}_identify")


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "results; workdirs/NAME_identify if not given")
    command_line.run(main, required="config")
