"""Experts that lie in Hugging Face snapshots: the backbone that they share, their leaves, and their heads.

The settings' `experts` name a pretrained repository (or folder) and one a task. An expert is a sequence
classifier, whose head travels with its task; a PEFT adapter of the pretrained model; or a vision tower of a
CLIP, whose head is made of class names by the pretrained text tower (arXiv:2103.00020, section 3.1).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from retex_jax import convert, data, lora, models, tree
from retex_jax.classifiers import AdapterTensors, adapter_config
from retex_jax.convert import hub
from retex_jax.convert.architectures import ARCHITECTURES, Architecture, identify, load
from retex_jax.convert.inspection import is_adapter
from retex_jax.experts import ExpertSet
from retex_jax.pretrained import Backbone, Encode
from retex_jax.recovery import Head
from retex_jax.snapshot import Snapshot
from retex_jax.sources import SafetensorsSource, Source

MODEL_NAME = "huggingface"
"""What settings call a model that comes from a snapshot."""

_CLIP_TEXT_LENGTH = 77
_TEMPLATES = ("a photo of a {}.",)


class Located(NamedTuple):
    """Where the snapshots lie.

    Attributes:
      pretrained: folder.
      experts: task name to folder.
    """

    pretrained: Path
    experts: dict[str, Path]


class Expert(NamedTuple):
    """One opened expert.

    Attributes:
      leaves: the backbone's, in Flax naming and layout.
      head: of a sequence classifier, else None.
    """

    leaves: Source
    head: Head | None


def locate(settings: Mapping[str, Any], *, offline: bool) -> Located:
    """Finds the snapshot folders, and downloads those that are nowhere.

    Args:
      settings: `experts` with "root", "pretrained", "repositories" and "revisions"; `tasks`.
      offline: whether the network may not be used.

    Returns:
      The folders.

    Raises:
      ValueError: naming every snapshot that cannot be had, with the command that gets it.
    """
    spec, names = settings["experts"], settings["tasks"]
    if len(spec["repositories"]) != len(names):
        raise ValueError(
            f"experts.repositories: got {len(spec['repositories'])}, "
            f"expected one for each of the {len(names)} tasks"
        )
    folders, problems = [], []
    for repository in (spec["pretrained"], *spec["repositories"]):
        revision = spec["revisions"].get(repository)
        try:
            folders.append(hub.find(repository, spec["root"], revision, offline))
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"experts: {error}")
    if problems:
        raise ValueError("\n  ".join(problems))
    return Located(folders[0], dict(zip(names, folders[1:], strict=True)))


def build_model(located: Located, options: Mapping[str, Any]) -> nn.Module:
    """Builds the backbone that the experts share, without weights.

    Raises:
      ValueError: as `architectures.identify`, or if an option is unknown.
    """
    return _backbone(_describe(located), options)


def load_backbone(
    located: Located, options: Mapping[str, Any], *, max_length: int = 64
) -> Backbone:
    """Loads the pretrained backbone.

    Args:
      located: the folders.
      options: fields of the model's configuration that differ from its config.json.
      max_length: tokens a text, for text models.

    Returns:
      The backbone; text models need a tokenizer.json beside the pretrained weights.

    Raises:
      ValueError: if a config.json is missing or describes what is not known, tensors do not fit, or
        there is no tokenizer.
    """
    architecture, hf_config = _describe(located)
    model = _backbone((architecture, hf_config), options)
    source = pretrained_source(located.pretrained, model, architecture)
    params = tree.unflatten({name: source.read(name) for name in source.leaves})
    encode = load_encoder(located, model, max_length)
    return Backbone(model, params, encode, f"snapshot {located.pretrained}", architecture.name)


def load_encoder(located: Located, model: nn.Module, max_length: int) -> Encode | None:
    """Loads the pretrained backbone's tokenizer; None for models that read no texts.

    Args:
      located: the folders.
      model: from `build_model`.
      max_length: tokens a text.

    Raises:
      ValueError: if there is no tokenizer.json.
    """
    reads_texts = "input_ids" in model.example_batch()
    return _tokenizer(located.pretrained, max_length) if reads_texts else None


def open_experts(located: Located, backbone: Backbone) -> tuple[ExpertSet, dict[str, Head | None]]:
    """Opens the experts, headers only but for their heads and the check for NaN.

    Args:
      located: the folders.
      backbone: from `load_backbone`.

    Returns:
      The experts in Flax naming, and task name to head (None where it has none).

    Raises:
      ValueError: listing every tensor that does not fit.
    """
    opened = {
        task: open_expert(folder, located.pretrained, backbone.model)
        for task, folder in located.experts.items()
    }
    experts = ExpertSet.from_sources(
        open_pretrained(located, backbone.model),
        [expert.leaves for expert in opened.values()],
        names=list(opened),
        layout="flax",
    )
    return experts, {task: expert.head for task, expert in opened.items()}


def open_pretrained(located: Located, backbone: nn.Module) -> Source:
    """Opens the pretrained backbone, headers only.

    Raises:
      ValueError: listing every tensor that does not fit.
    """
    return pretrained_source(located.pretrained, backbone, _describe(located)[0])


def num_outputs(head: Head) -> int:
    """The outputs of a head of a classifier; 0 of none."""
    last = head.get("classifier") or head.get("out_proj") or head
    return last["kernel"].shape[1] if last else 0


def check_zero_shot(pretrained: Path) -> None:
    """Makes sure that a snapshot can make heads of class names.

    Raises:
      ValueError: if the folder holds no CLIPModel or no tokenizer.
    """
    if identify(Snapshot(pretrained).require_config()).name != "CLIPModel":
        raise ValueError(
            f"{pretrained}: expected a CLIPModel, whose text tower makes the heads of experts that "
            "have none"
        )
    tokenizer_file(pretrained)


def zero_shot_heads(
    pretrained: Path, tasks: Sequence[data.Task], templates: Sequence[str]
) -> dict[str, Head]:
    """Makes a head a task from its class names, by the text tower of a CLIP.

    Args:
      pretrained: the folder of a CLIPModel, with tokenizer.json.
      tasks: their classes name the labels.
      templates: prompts with "{}" for the class name; (): each task's own.

    Returns:
      Task name to head: "projection" (of the vision tower, frozen), "kernel" and "bias".

    Raises:
      ValueError: if the folder holds no CLIPModel or no tokenizer, or a template has no "{}".
    """
    check_zero_shot(pretrained)
    clip = load(pretrained)
    encode = _tokenizer(pretrained, _CLIP_TEXT_LENGTH)
    projection = {"kernel": np.asarray(clip.params["vision"]["projection"]["kernel"])}
    text = models.ClipText(clip.model.text_config)
    return {
        task.name: {
            "projection": projection,
            **models.zero_shot_head(
                text,
                clip.params["text"],
                clip.params["logit_scale"],
                task.classes,
                templates or task.templates or _TEMPLATES,
                encode,
            ),
        }
        for task in tasks
    }


def companion_files(pretrained: Path) -> dict[str, bytes]:
    """The tokenizer's and the image processor's files of a snapshot, by name."""
    kept = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "preprocessor_config")
    return {
        path.name: path.read_bytes()
        for path in sorted(pretrained.iterdir())
        if path.is_file() and path.name.startswith(kept)
    }


def _describe(located: Located) -> tuple[Architecture, dict[str, Any]]:
    """What the first expert is."""
    _, architecture, hf_config = _read(next(iter(located.experts.values())), located.pretrained)
    return architecture, hf_config


def _read(folder: Path, pretrained: Path) -> tuple[Mapping[str, Any], Architecture, dict[str, Any]]:
    """An expert's tensors in torch naming, and what they are."""
    if not is_adapter(folder):
        snapshot = Snapshot(folder)
        return snapshot, *_identify(snapshot)
    tensors = AdapterTensors(lora.LoraSource(folder, SafetensorsSource(pretrained)))
    hf_config = adapter_config(Snapshot(pretrained).require_config(), tensors)
    return tensors, identify(hf_config), hf_config


def _identify(snapshot: Snapshot) -> tuple[Architecture, dict[str, Any]]:
    """What a snapshot is merged as: of a CLIPModel, the vision tower."""
    hf_config = snapshot.require_config()
    architecture = identify(hf_config)
    if architecture.name != "CLIPModel":
        return architecture, hf_config
    tower = {
        **(hf_config.get("vision_config") or {}),
        **(hf_config.get("vision_config_dict") or {}),
    }
    return ARCHITECTURES["CLIPVisionModel"], tower


def _backbone(described: tuple[Architecture, dict[str, Any]], options: Mapping[str, Any]) -> Any:
    architecture, hf_config = described
    try:
        model = architecture.from_hf(hf_config, **options)
    except TypeError as error:
        raise ValueError(f"model.options: {error}") from error
    return model.backbone if isinstance(model, models.SequenceClassifier) else model


def pretrained_source(pretrained: Path, model: nn.Module, architecture: Architecture) -> Source:
    """The leaves of the pretrained backbone.

    Args:
      pretrained: its folder; a head that it may have is read past.
      model: the backbone.
      architecture: of the experts.

    Raises:
      ValueError: listing every tensor that does not fit.
    """
    snapshot = Snapshot(pretrained)
    own, hf_config = _identify(snapshot)
    if architecture.name.endswith("Classification"):
        own = identify(hf_config, "none")
    return convert.ConvertedSource(snapshot, own.table(model), models.expected_params(model))


def open_expert(folder: Path, pretrained: Path, backbone: nn.Module) -> Expert:
    """Opens one expert, headers only but for its head.

    Args:
      folder: the expert's.
      pretrained: the folder of the pretrained model.
      backbone: from `build_model`.

    Raises:
      ValueError: listing every tensor that does not fit.
    """
    tensors, architecture, hf_config = _read(folder, pretrained)
    model = architecture.from_hf(hf_config)
    if not isinstance(model, models.SequenceClassifier):
        expected = models.expected_params(backbone)
        return Expert(
            convert.ConvertedSource(tensors, architecture.table(backbone), expected), None
        )
    model = model.clone(backbone=backbone)
    source = convert.ConvertedSource(
        tensors, architecture.table(model), models.expected_params(model)
    )
    head = _Part(source, "head/")
    return Expert(
        _Part(source, "backbone/"),
        tree.unflatten({name: head.read(name) for name in head.leaves}),
    )


class _Part:
    """The leaves of a source below a prefix, without it."""

    def __init__(self, source: Source, prefix: str):
        self._source, self._prefix = source, prefix
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {
            name.removeprefix(prefix): spec
            for name, spec in source.leaves.items()
            if name.startswith(prefix)
        }

    def read(self, name: str) -> Any:
        return self._source.read(self._prefix + name)


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer of a snapshot.

    Raises:
      ValueError: if there is no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it is needed to encode texts")
    return path


def _tokenizer(folder: Path, max_length: int) -> data.Encoder:
    return data.load_tokenizer(tokenizer_file(folder).read_bytes(), max_length)
