"""The experts of an experiment, wherever they come from, with their heads and accuracies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retex_jax import (
    data,
    experiment,
    files,
    finetune,
    huggingface,
    pretrained,
    protocols,
    recovery,
)
from retex_jax.calibration import Calibration
from retex_jax.experts import ExpertSet, read_safetensors
from retex_jax.methods import METHODS


class Collection(NamedTuple):
    """Experts with what belongs to each, by task name.

    Attributes:
      experts: their backbones.
      heads: their classifiers.
      individual: their test accuracies.
      linear_probe: test accuracies of the pretrained features; empty where it was not fitted.
    """

    experts: ExpertSet
    heads: dict[str, recovery.Head]
    individual: dict[str, float]
    linear_probe: dict[str, float]


def collect(
    settings: experiment.Settings, backbone: pretrained.Backbone, tasks: Sequence[data.Task]
) -> Collection:
    """Obtains the experts of an experiment: fine-tunes those that are missing, or opens snapshots.

    Raises:
      ValueError: as `finetune.build_experts`, or as `huggingface.open_experts`.
      RuntimeError: as `finetune.build_experts`.
    """
    obtain = _open if experiment.from_snapshots(settings) else _finetune
    return obtain(settings, backbone, tasks)


def check_kept(path: Path, individual: Mapping[str, float]) -> None:
    """Checks that rows that an earlier run left are of these experts; of those of before this was noted it is believed.

    Args:
      path: of results.json.
      individual: the experts' accuracies, by task.

    Raises:
      ValueError: if they are relative to other experts, as another machine may make them of the same settings.
    """
    known = files.read_json(path).get("individual", {})
    other = {task: own for task, own in known.items() if own != individual.get(task, own)}
    if other:
        here = {task: individual[task] for task in other}
        raise ValueError(
            f"{path}: got rows relative to experts of accuracies {other}, expected those of the experts here, {here}: "
            "another machine or version made others of the same settings. Give another --workdir, or remove the file"
        )


def _finetune(
    settings: experiment.Settings, backbone: pretrained.Backbone, tasks: Sequence[data.Task]
) -> Collection:
    """Fine-tunes the experts that are missing, and opens all of them."""
    directory = experiment.experts_directory(settings)
    records = finetune.build_experts(
        backbone,
        tasks,
        directory,
        experiment.finetune_settings(settings),
        checkpoint_set=experiment.checkpoint_set(settings),
    )
    paths = {task.name: directory / f"{task.name}.safetensors" for task in tasks}
    experts = ExpertSet.from_safetensors(
        directory / f"{finetune.PRETRAINED}.safetensors",
        list(paths.values()),
        names=list(paths),
        layout="flax",
        exclude=["^head/"],
    )
    return Collection(
        experts,
        {name: read_safetensors(path, "^head/")["head"] for name, path in paths.items()},
        {name: record["accuracy"]["test"] for name, record in records.items()},
        {name: record["linear_probe"]["test"] for name, record in records.items()},
    )


def _open(
    settings: experiment.Settings, backbone: pretrained.Backbone, tasks: Sequence[data.Task]
) -> Collection:
    """Opens the experts of Hugging Face snapshots, and evaluates each."""
    located = huggingface.locate(settings, offline=True)
    experts, heads = huggingface.open_experts(located, backbone)
    heads |= {task.name: {} for task in tasks if heads[task.name] is None and task.num_outputs == 0}
    headless = [task for task in tasks if heads[task.name] is None]
    if headless:
        templates = settings["experts"]["templates"]
        heads |= huggingface.zero_shot_heads(located.pretrained, headless, templates)
    _check_heads(tasks, heads)
    collection = Collection(experts, heads, {}, {})
    suite = make_suite(settings, backbone, tasks, collection)
    return collection._replace(individual=protocols.known(suite, experts.expert_params))


def _check_heads(tasks: Sequence[data.Task], heads: dict[str, recovery.Head]) -> None:
    """Makes sure that heads have as many outputs as their tasks.

    Raises:
      ValueError: naming each head that has not.
    """
    problems = []
    for task in tasks:
        found = huggingface.num_outputs(heads[task.name])
        if found != task.num_outputs:
            problems.append(
                f"experts: the head of {task.name} has {found} outputs, expected {task.num_outputs}"
            )
    if problems:
        raise ValueError("\n".join(problems))


def make_suite(
    settings: experiment.Settings,
    backbone: pretrained.Backbone,
    tasks: Sequence[data.Task],
    collection: Collection,
) -> protocols.Suite:
    """What methods are evaluated on."""
    return protocols.Suite(
        backbone.model,
        tasks,
        list(collection.heads.values()),
        collection.individual,
        settings["evaluate"]["batch_size"],
        settings["seed"],
    )


def offset_calibration(
    settings: experiment.Settings,
    backbone: pretrained.Backbone,
    tasks: Sequence[data.Task],
    collected: Collection,
) -> Calibration | None:
    """The inputs that the experiment's offsets are fitted with; None where they need none."""
    size = experiment.offset_size(settings["offsets"])
    if METHODS["retex"].needs_with(size) == "none":
        return None
    return calibrate(settings, backbone, tasks, collected)["train"]


def calibrate(
    settings: experiment.Settings,
    backbone: pretrained.Backbone,
    tasks: Sequence[data.Task],
    collected: Collection,
) -> dict[str, Calibration]:
    """Inputs without labels of each task, and the model, for methods that need data.

    Args:
      settings: `calibration` says how many inputs a task, and the batch size.
      backbone: the model.
      tasks: with splits "train" and "test".
      collected: the heads.

    Returns:
      "train"; and "test", for methods that are defined on the inputs that they predict: batches of the
      first inputs of the split, which are in random order; what does not fill a batch is left out. Both have
      the same functions, so that what is compiled for one serves the other.
    """
    model, spec = backbone.model, settings["calibration"]
    read = (*model.example_batch(), *recovery.CHOICES)

    def batches(task: data.Task, split: str) -> list[dict[str, np.ndarray]]:
        inputs = {name: array for name, array in task.splits[split].items() if name in read}
        count = min(spec["num_inputs"], len(task.splits[split]["label"]))
        size = min(spec["batch_size"], count)
        return [
            data.materialize(data.take(inputs, np.arange(start, start + size)))
            for start in range(0, count - size + 1, size)
        ]

    train, test = ([batches(task, split) for task in tasks] for split in ("train", "test"))
    calibration = recovery.make_calibration(model, train, list(collected.heads.values()))
    return {"train": calibration, "test": replace(calibration, batches=test)}
