"""From an experiment's settings to a backbone, tasks and the place of its experts.

The settings are an experiment file (configs/) as plain values, checked by `retex_jax.preflight`.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from retex_jax import command_line, data, huggingface, pretrained, tree
from retex_jax.convert.architectures import ARCHITECTURES, headless
from retex_jax.identifier import IDENTIFIERS

Settings = Mapping[str, Any]


def fetch(settings: Settings, announce: Any = None) -> None:
    """Downloads what is not in the cache yet, the backbone's weights and the tasks' data.

    Raises:
      ValueError: if a file's hash is wrong.
      RuntimeError: if something cannot be downloaded; all of it is named.
    """
    data.fetch_all(wheels(settings), announce=announce)
    if from_snapshots(settings):
        huggingface.locate(settings, offline=False)


def from_snapshots(settings: Settings) -> bool:
    """Whether the model and its experts are Hugging Face snapshots."""
    return settings["model"]["name"] == huggingface.MODEL_NAME


def build_model(settings: Settings, *, offline: bool) -> nn.Module:
    """Builds the backbone's module without its weights; snapshots are found, or downloaded.

    Args:
      settings: the experiment.
      offline: whether nothing may be downloaded.

    Returns:
      The Linen module.

    Raises:
      ValueError: if the name or an option is unknown, or snapshots are missing or not understood.
    """
    spec = settings["model"]
    if from_snapshots(settings):
        return huggingface.build_model(
            huggingface.locate(settings, offline=offline), spec["options"]
        )
    return pretrained.build_model(spec["name"], spec["options"])


def load_encoder(
    settings: Settings, model: nn.Module, *, offline: bool
) -> pretrained.Encode | None:
    """Loads what turns texts into a model's inputs, without any weights; None for models that read none.

    Args:
      settings: the experiment.
      model: from `build_model`.
      offline: whether nothing may be downloaded.
    """
    spec = settings["model"]
    if from_snapshots(settings):
        located = huggingface.locate(settings, offline=offline)
        return huggingface.load_encoder(located, model, spec["max_length"])
    return pretrained.load_encoder(spec["name"], spec["max_length"])


def check_tokenizer(settings: Settings) -> None:
    """Makes sure that what turns texts into a model's inputs can be loaded; nothing is downloaded.

    Raises:
      ImportError: if `tokenizers` is not installed.
      ValueError: if the pretrained snapshot has no tokenizer.json.
    """
    if not importlib.util.find_spec("tokenizers"):
        raise ImportError("text tasks need tokenizers: pip install 'retex_jax[language]'")
    if from_snapshots(settings):
        huggingface.tokenizer_file(huggingface.locate(settings, offline=True).pretrained)


def load(settings: Settings) -> tuple[pretrained.Backbone, list[data.Task]]:
    """Loads the backbone and the tasks of a checked experiment."""
    spec = settings["model"]
    if from_snapshots(settings):
        located = huggingface.locate(settings, offline=True)
        backbone = huggingface.load_backbone(
            located, spec["options"], max_length=spec["max_length"]
        )
    else:
        backbone = pretrained.load_backbone(
            spec["name"], spec["options"], max_length=spec["max_length"], seed=settings["seed"]
        )
    return backbone, [
        load_task(settings, name, backbone.model, backbone.encode) for name in settings["tasks"]
    ]


def load_task(
    settings: Settings, name: str, model: nn.Module, encode: pretrained.Encode | None
) -> data.Task:
    """Loads a task for a model.

    Args:
      settings: a checked experiment.
      name: of the task.
      model: the backbone, whose image size is taken.
      encode: what turns texts into its inputs, if it reads any.
    """
    options = dict(settings["language"])
    metric = options.pop("metrics").get(name, "")
    return data.load_task(
        name,
        image_size=getattr(model.config, "image_size", None),
        encode=encode,
        **settings["data_sets"],
        language={"metric": metric, **options},
        **settings["data"],
    )


def hf_config(backbone: pretrained.Backbone) -> dict[str, Any]:
    """The config.json of a backbone's shape; empty where transformers has no such model."""
    if not backbone.architecture:
        return {}
    return headless(ARCHITECTURES[backbone.architecture]).to_hf(backbone.model)


def checkpoint_set(settings: Settings) -> str:
    """Identifies the experts: all that they depend on but for which tasks there are."""
    if from_snapshots(settings):
        spec = settings["experts"]
        identity = {name: spec[name] for name in ("pretrained", "repositories", "revisions")}
        return f"{Path(spec['pretrained']).name}-{command_line.fingerprint(identity)}"
    identity = {
        name: value
        for name, value in settings.items()
        if name in ("seed", "model", "data", "finetune")
    }
    wheels = pretrained.required_wheels(settings["model"]["name"])
    identity["weights"] = [data.WHEELS[name].sha256 for name in wheels]
    return f"{settings['model']['name']}-{command_line.fingerprint(identity)}"


def experts_directory(settings: Settings) -> Path:
    """Where the experts lie: `experts.root`, or experts/CHECKPOINT_SET in the cache folder."""
    root = settings["experts"]["root"]
    return Path(root) if root else data.cache_dir() / "experts" / checkpoint_set(settings)


def missing_experts(directory: Path, names: Sequence[str]) -> list[str]:
    """The tasks whose expert, fine-tuned here, is not complete in the directory."""
    return [name for name in names if not (directory / f"{name}.json").is_file()]


def offset_size(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `offsets.fit` for how large offsets are and what they are for.

    Args:
      spec: settings["offsets"].
    """
    size = {"budget": spec["budget"]} if spec["budget"] else {"rank": spec["rank"]}
    names = ("rank_rule", "orientation", "sharing", "task_weights", "leaf_weights")
    return {**size, **{name: spec[name] for name in names if name in spec}}


def identifier_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of the identifier's fit; those of its own win.

    Args:
      spec: settings["identifier"].
    """
    names = ("rank", "center", "normalize") if spec["kind"] == "subspace" else ("normalize",)
    return {**{name: spec[name] for name in names}, **spec["options"]}


def identifier_layer(spec: Mapping[str, Any]) -> int | tuple[int, ...]:
    """The layers of settings["identifier"]: several, or one."""
    return tuple(spec["layers"]) or spec["layer"]


def identifier_kinds(spec: Mapping[str, Any]) -> list[str]:
    """The identifiers of settings["identify"], in the order of IDENTIFIERS.

    Raises:
      ValueError: if a name is unknown.
    """
    names = [name.strip() for name in spec["kinds"].split(",")]
    wanted = list(IDENTIFIERS) if names == ["all"] else names
    if unknown := [name for name in wanted if name not in IDENTIFIERS]:
        hint = tree.did_you_mean(unknown[0], IDENTIFIERS)
        raise ValueError(
            f"identify.kinds: got {unknown}, expected 'all' or some of {list(IDENTIFIERS)}{hint}"
        )
    return [
        name
        for name, method in IDENTIFIERS.items()
        if name in wanted and (spec["experts"] or not method.needs_experts)
    ]


def finetune_settings(settings: Settings) -> dict[str, Any]:
    """The keywords of `finetune.finetune`."""
    return {**settings["finetune"], "seed": settings["seed"]}


def start() -> None:
    """Prepares JAX for a program: compiled programs are kept in the cache folder."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(data.cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def wheels(settings: Settings) -> list[str]:
    """The names of the wheels that hold the backbone's weights and the tasks' data."""
    specs = {**data.VISION_TASKS, **data.TEXT_TASKS}
    packaged = [specs[name] for name in settings["tasks"] if name in specs]
    names = {wheel for spec in packaged for wheel in spec.wheels}
    return sorted(names | set(pretrained.required_wheels(settings["model"]["name"])))
