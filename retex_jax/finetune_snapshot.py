"""Fine-tunes a pretrained snapshot on one task, and writes the expert as a snapshot that configurations name.

So the papers' experts are made: the vision tower of a CLIP whose zero-shot head is frozen (configs/finetune_clip.py),
and classifiers of RoBERTa and GPT-2 (configs/finetune_roberta.py, configs/finetune_gpt2.py). `retex_jax.trainable` says
what is trained, `retex_jax.finetune_steps` how.
"""

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from retex_jax import (
    artifact,
    data,
    experiment,
    finetune_steps,
    language_checks,
    logging,
    metrics,
    preflight,
    recovery,
    trainable,
)
from retex_jax.convert import hub
from retex_jax.experiment import Settings
from retex_jax.typing import Params

RECORD = "finetune.json"
_UNFINISHED = ".unfinished"

_ENTRIES = (
    *(path for path in preflight.ENTRIES if not path.startswith("finetune.")),
    "task",
    "finetune.steps",
    "finetune.epochs",
    "finetune.batch_size",
    "finetune.accumulate",
    "finetune.bucket",
    "finetune.learning_rate",
    "finetune.learning_rates",
    "finetune.weight_decay",
    "finetune.decay_vectors",
    "finetune.schedule",
    "finetune.warmup",
    "finetune.keep_best",
    "finetune.checkpoint_every",
)


def problems(settings: Settings) -> list[str]:
    """Everything that would stop `run` later; nothing is downloaded."""
    found = preflight.unknown(settings, _ENTRIES)
    try:
        data.check_names([settings["task"]])
    except ValueError as error:
        found.append(f"task: {error}")
    found += data.data_set_problems(settings["task"], settings["data_sets"]["root"])
    workers = settings["data_sets"]["workers"]
    if workers < data.AUTOMATIC:
        found.append(f"data_sets.workers: got {workers}, expected {data.AUTOMATIC} or more")
    found += _range_problems(settings["finetune"])
    if not settings["experts"]["root"]:
        found.append("experts.root: got '', expected the folder that receives the expert")
    try:
        model = build_model(settings)
    except (ValueError, OSError) as error:
        return [*found, *(f"experts: {line.strip()}" for line in str(error).splitlines())]
    if not trainable.suits(settings["task"], model):
        what = "texts with classes or numbers" if _reads_texts(model) else "images"
        found.append(f"task: got {settings['task']!r}, expected a task of {what}")
    return found + _text_problems(settings, model)


def build_model(settings: Settings) -> nn.Module:
    """Builds the backbone without its weights; nothing is downloaded.

    Raises:
      ValueError: if its snapshot is missing or not understood.
    """
    return trainable.build_model(_pretrained(settings), settings["model"]["options"])


def keywords(settings: Settings) -> dict[str, Any]:
    """The keywords of `finetune_steps.finetune` that the settings hold."""
    spec = dict(settings["finetune"])
    del spec["keep_best"]
    rates = spec.pop("learning_rates")
    rate = rates.get(settings["task"], spec["learning_rate"])
    return {**spec, "learning_rate": rate, "seed": settings["seed"]}


def run(settings: Settings) -> Path:
    """Fine-tunes the expert of settings["task"].

    Args:
      settings: as configs/finetune_clip.py.

    Returns:
      The folder, ROOT/own/PRETRAINED_TASK; what lies there already, whole, is not made again.

    Raises:
      ValueError: if the settings cannot run (all problems are listed), or the folder was begun with others.
      FloatingPointError: if the loss is not finite.
      RuntimeError: if another run makes the same expert.
    """
    if found := problems(settings):
        raise ValueError(f"{settings['name']!r} cannot run as it is:\n  " + "\n  ".join(found))
    experiment.start()
    name, size = settings["task"], settings["evaluate"]["batch_size"]
    pretrained = _pretrained(settings)
    base = Path(settings["experts"]["pretrained"]).name
    folder = Path(settings["experts"]["root"], "own", f"{base}_{name}")
    if (folder / RECORD).is_file():
        return folder
    with logging.WorkdirLock(folder):
        _check_begun(folder / _UNFINISHED / "settings.json", settings)
        started = time.perf_counter()
        model, start, frozen, task, write = trainable.load(settings, pretrained)

        def score(split: str, params: Params) -> float:
            whole, examples = jax.device_put({**params, **frozen}), task.splits[split]
            outputs = recovery.outputs(model, whole["backbone"], whole["head"], examples, size)
            return metrics.score(task.metric, outputs, examples["label"])

        params = finetune_steps.finetune(
            model,
            start,
            frozen,
            task,
            folder / _UNFINISHED / "steps",
            **keywords(settings),
            measure=partial(score, "val") if settings["finetune"]["keep_best"] else None,
        )
        accuracy = {
            when: {split: score(split, own) for split in ("val", "test")}
            for when, own in (("pretrained", start), ("fine_tuned", params))
        }
        write(folder, params)
        record = {
            "settings": settings,
            "classes": list(task.classes),
            "metric": task.metric,
            "source": task.source,
            "licence": task.licence,
            "pretrained": f"snapshot {pretrained}",
            "examples": {split: len(arrays["label"]) for split, arrays in task.splits.items()},
            "accuracy": accuracy,
            "seconds": time.perf_counter() - started,
        }
        artifact.write_json(folder / RECORD, record)
        shutil.rmtree(folder / _UNFINISHED)
    logging.table(
        f"expert in {folder}",
        ["task", "metric", "test inputs", "expert", "before", "seconds"],
        [
            [
                name,
                task.metric,
                record["examples"]["test"],
                accuracy["fine_tuned"]["test"],
                accuracy["pretrained"]["test"],
                round(record["seconds"], 1),
            ]
        ],
    )
    return folder


def _range_problems(spec: Mapping[str, Any]) -> list[str]:
    found = [
        f"finetune.{entry}: got {spec[entry]}, expected 1 or more"
        for entry in ("batch_size", "accumulate", "bucket", "checkpoint_every")
        if spec[entry] < 1
    ]
    if spec["steps"] < 0 or not (spec["steps"] or spec["epochs"] > 0):
        found.append(
            f"finetune.steps: got {spec['steps']} and epochs {spec['epochs']}, expected steps of 1 or "
            "more, or 0 and epochs above 0"
        )
    rates = {"learning_rate": spec["learning_rate"]} | {
        f"learning_rates.{task}": rate for task, rate in spec["learning_rates"].items()
    }
    found += [
        f"finetune.{entry}: got {rate}, expected above 0"
        for entry, rate in rates.items()
        if not 0 < rate < float("inf")
    ]
    warmup, most = spec["warmup"], spec["steps"] or float("inf")
    if not 0 <= warmup < max(most, 1) or (warmup >= 1 and warmup % 1):
        found.append(
            f"finetune.warmup: got {warmup}, expected a fraction below 1, or a whole number of steps "
            "below finetune.steps"
        )
    if spec["schedule"] not in finetune_steps.SCHEDULES:
        found.append(
            f"finetune.schedule: got {spec['schedule']!r}, expected one of {finetune_steps.SCHEDULES}"
        )
    if spec["batch_size"] % (max(spec["accumulate"], 1) * jax.device_count()):
        found.append(
            f"finetune.batch_size: got {spec['batch_size']}, expected a multiple of finetune.accumulate "
            f"times the {jax.device_count()} devices"
        )
    return found


def _text_problems(settings: Settings, model: nn.Module) -> list[str]:
    if not _reads_texts(model):
        return []
    names = list({settings["task"]: None, **settings["language"]["metrics"]})
    pretrained = [settings["experts"]["pretrained"]] * len(names)
    experts = {**settings["experts"], "repositories": pretrained}
    return language_checks.problems({**settings, "tasks": names, "experts": experts}, model)


def _reads_texts(model: nn.Module) -> bool:
    return "input_ids" in model.example_batch()


def _pretrained(settings: Settings) -> Path:
    spec = settings["experts"]
    name = spec["pretrained"]
    return hub.find(name, spec["root"], spec["revisions"].get(name), True)


def _check_begun(path: Path, settings: Settings) -> None:
    """Makes sure that checkpoints are of these settings; how many processes decode does not matter."""
    if path.is_file():
        begun = json.loads(path.read_text())
        begun["data_sets"]["workers"] = settings["data_sets"]["workers"]
        if begun != settings:
            raise ValueError(f"{path.parent}: begun with other settings; remove it, or give those")
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path, settings)
