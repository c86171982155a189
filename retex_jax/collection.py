"""The experts of an experiment, wherever they come from, with their heads and accuracies."""

from collections.abc import Sequence
from typing import NamedTuple

from retex_jax import data, evaluate, experiment, finetune, pretrained, recovery, snapshots
from retex_jax.experts import ExpertSet, read_safetensors


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
      ValueError: as `finetune.build_experts`, or as `snapshots.open_experts`.
      RuntimeError: as `finetune.build_experts`.
    """
    obtain = _open if experiment.from_snapshots(settings) else _finetune
    return obtain(settings, backbone, tasks)


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
    located = snapshots.locate(settings, offline=True)
    experts, heads = snapshots.open_experts(located, backbone)
    headless = [task for task in tasks if heads[task.name] is None]
    if headless:
        templates = settings["experts"]["templates"]
        heads |= snapshots.zero_shot_heads(located.pretrained, headless, templates)
    collection = Collection(experts, heads, {}, {})
    suite = make_suite(settings, backbone, tasks, collection)
    return collection._replace(individual=evaluate.known(suite, experts.expert_params))


def make_suite(
    settings: experiment.Settings,
    backbone: pretrained.Backbone,
    tasks: Sequence[data.Task],
    collection: Collection,
) -> evaluate.Suite:
    """What methods are evaluated on."""
    return evaluate.Suite(
        backbone.model,
        tasks,
        list(collection.heads.values()),
        collection.individual,
        settings["evaluate"]["batch_size"],
        settings["seed"],
    )
