"""What of a pretrained snapshot is fine-tuned: the vision tower of a CLIP, or a sequence classifier.

CLIP's head is made of the class names by its text tower, and does not change (arXiv:2212.04089). A classifier's head
is drawn as transformers draws it, kernels from N(0, initializer_range^2) and biases 0, and is trained with the rest.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from retex_jax import data, experiment, huggingface, models, tree
from retex_jax.classifiers import classifier_config
from retex_jax.convert.architectures import ARCHITECTURES, Architecture, identify
from retex_jax.convert.export import export
from retex_jax.experiment import Settings
from retex_jax.snapshot import Snapshot
from retex_jax.typing import Params

_INITIALIZER_RANGE = 0.02  # of transformers, where a config.json names none


class Trainable(NamedTuple):
    """A pretrained model on a task.

    Attributes:
      model: Linen module of the backbone.
      params: the trees that are trained, of "backbone" and "head".
      frozen: the others.
      task: with its splits.
      write: (folder, trained trees) -> None; writes the expert as a snapshot.
    """

    model: nn.Module
    params: Params
    frozen: Params
    task: data.Task
    write: Callable[[Path, Params], None]


def build_model(pretrained: Path, options: Mapping[str, Any]) -> nn.Module:
    """Builds the backbone without its weights.

    Args:
      pretrained: the snapshot's folder.
      options: fields of the model's configuration that differ from its config.json.

    Returns:
      Linen module, of images or texts.

    Raises:
      ValueError: if the folder holds no CLIPModel, and no model with a sequence classifier.
    """
    if _is_clip(pretrained):
        return huggingface.build_model(huggingface.Located(pretrained, {"": pretrained}), options)
    return _build_classifier(pretrained, 1, options)[0].backbone


def suits(name: str, model: nn.Module) -> bool:
    """Whether a model can be trained on a task: of images, or of texts that have classes or numbers."""
    if "input_ids" in model.example_batch():
        texts = {*data.TEXT_TASKS, *data.LANGUAGE_TASKS}
        return name in texts - data.QUESTIONS.keys()
    return name in {*data.VISION_TASKS, *data.DATA_SETS}


def load(settings: Settings, pretrained: Path) -> Trainable:
    """Loads the pretrained weights and settings["task"].

    Args:
      settings: checked, as configs/finetune_clip.py.
      pretrained: the snapshot's folder.

    Returns:
      What is trained.

    Raises:
      ValueError: if tensors or data do not fit.
    """
    if _is_clip(pretrained):
        return _load_tower(settings, pretrained)
    return _load_classifier(settings, pretrained)


def _is_clip(pretrained: Path) -> bool:
    return identify(Snapshot(pretrained).require_config()).name == "CLIPModel"


def _load_tower(settings: Settings, pretrained: Path) -> Trainable:
    name = settings["task"]
    located = huggingface.Located(pretrained, {name: pretrained})
    backbone = huggingface.load_backbone(located, settings["model"]["options"])
    task = experiment.load_task(settings, name, backbone.model, None)
    head = huggingface.zero_shot_heads(pretrained, [task], ())[name]

    def write(folder: Path, params: Params) -> None:
        export(folder, backbone.model, params["backbone"], ARCHITECTURES["CLIPVisionModel"])

    return Trainable(backbone.model, {"backbone": backbone.params}, {"head": head}, task, write)


def _load_classifier(settings: Settings, pretrained: Path) -> Trainable:
    spec = settings["model"]
    model = build_model(pretrained, spec["options"])
    tokenizer = huggingface.tokenizer_file(pretrained).read_bytes()
    encode = data.load_tokenizer(tokenizer, spec["max_length"])
    task = experiment.load_task(settings, settings["task"], model, encode)
    classifier, architecture = _build_classifier(pretrained, task.num_outputs, spec["options"])
    source = huggingface.pretrained_source(pretrained, classifier.backbone, architecture)
    hf_config = Snapshot(pretrained).require_config()
    scale = hf_config.get("initializer_range", _INITIALIZER_RANGE)
    params = {
        "backbone": tree.unflatten({name: source.read(name) for name in source.leaves}),
        "head": _draw_head(classifier, scale, settings["seed"]),
    }

    def write(folder: Path, params: Params) -> None:
        described = {**hf_config, "pad_token_id": encode.pad_id}
        export(folder, classifier, params, architecture, described)
        for name, content in huggingface.companion_files(pretrained).items():
            (folder / name).write_bytes(content)

    return Trainable(classifier.backbone, params, {}, task, write)


def _build_classifier(
    pretrained: Path, num_labels: int, options: Mapping[str, Any]
) -> tuple[models.SequenceClassifier, Architecture]:
    hf_config = Snapshot(pretrained).require_config()
    config = classifier_config(hf_config, num_labels)
    if not config["architectures"]:
        raise ValueError(
            f"{pretrained}: model_type {hf_config.get('model_type')!r} has no sequence classifier here, "
            "expected a CLIPModel or a model of texts"
        )
    architecture = identify(config)
    try:
        return architecture.from_hf(config, **options), architecture
    except TypeError as error:
        raise ValueError(f"model.options: {error}") from error


def _draw_head(classifier: models.SequenceClassifier, scale: float, seed: int) -> Params:
    leaves = tree.flatten(models.expected_params(classifier)["head"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        {
            name: jax.random.normal(key, leaf.shape, leaf.dtype) * (scale if leaf.ndim > 1 else 0.0)
            for key, (name, leaf) in zip(keys, leaves.items(), strict=True)
        }
    )
