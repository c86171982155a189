"""From a Hugging Face snapshot to one of our models with its parameters; `export` leads back.

What a config.json names decides: one entry a class of transformers, in one explicit table.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import models
from retex_jax.convert import (
    bert,
    clip,
    clip_text,
    decoder,
    gpt2,
    hf_config,
    hf_config_decoder,
    roberta,
    vit,
)
from retex_jax.convert.engine import Table, to_flax
from retex_jax.models import stacking
from retex_jax.snapshot import Snapshot

_DEFAULT_LABELS = 2  # of a config.json that names none
_HEADS = (r"classifier\..*", r"score\..*", r"lm_head\..*", r"cls\..*", r"qa_outputs\..*")


class Architecture(NamedTuple):
    """One class of transformers and what it is here.

    Attributes:
      name: the class, as "architectures" in a config.json has it.
      model_type: as "model_type" there has it.
      from_hf: (parsed config.json, **fields that differ) -> our module.
      to_hf: our module -> the keys of a config.json, defaults included.
      table: our module -> the table of its parameters.
    """

    name: str
    model_type: str
    from_hf: Callable[..., nn.Module]
    to_hf: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]


class Loaded(NamedTuple):
    """A model that was read from a snapshot.

    Attributes:
      model: Linen module.
      params: its parameters, nested dict.
      architecture: what the snapshot holds.
      hf_config: the parsed config.json.
    """

    model: nn.Module
    params: dict
    architecture: Architecture
    hf_config: dict[str, Any]


def _base(name, model_type, module, from_hf, to_hf, table):
    """A backbone; heads that its file may hold are read past."""
    headless = replace(table, ignore=(*table.ignore, *_HEADS))
    return Architecture(
        name,
        model_type,
        lambda hf, **options: module(from_hf(hf, **options)),
        lambda model: to_hf(model.config),
        lambda model: headless,
    )


def _classifier(
    name, model_type, module, from_hf, to_hf, table, *, kind="linear", use_bias=True, **fields
):
    """A backbone with transformers' head for classes."""

    def build(hf: Mapping[str, Any], **options: Any) -> nn.Module:
        backbone = module(from_hf(hf, **fields, **options))
        return models.SequenceClassifier(backbone, _num_labels(hf), kind, use_bias)

    def keys(model: nn.Module) -> dict[str, Any]:
        names = [f"LABEL_{label}" for label in range(model.num_labels)]
        return {
            **to_hf(model.backbone.config),
            "id2label": {str(label): name for label, name in enumerate(names)},
            "label2id": {name: label for label, name in enumerate(names)},
        }

    return Architecture(name, model_type, build, keys, lambda model: table)


def _decoder(name, model_type, from_hf, to_hf, table):
    """A decoder, whose table depends on its head."""
    return Architecture(
        name,
        model_type,
        lambda hf, **options: models.Decoder(from_hf(hf, **options)),
        lambda model: to_hf(model.config),
        lambda model: decoder.decoder_table(
            replace(table, ignore=(*table.ignore, *_HEADS))
            if model.config.lm_head == "none"
            else table,
            model.config,
        ),
    )


_VISION_UNPROJECTED = replace(
    vit.CLIP_VISION, ignore=(*vit.CLIP_VISION.ignore, r"visual_projection\.weight", *_HEADS)
)


def _vision_table(model: models.ViT) -> Table:
    return _VISION_UNPROJECTED if model.config.projection_dim is None else vit.CLIP_VISION


def _num_labels(hf: Mapping[str, Any]) -> int:
    labels = hf.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else hf.get("num_labels", _DEFAULT_LABELS)
    if type(count) is not int or count < 1:
        raise ValueError(f"config.json: id2label={labels!r}, num_labels={count!r}: expected labels")
    return count


def _clip_from_hf(hf: Mapping[str, Any], **options: Any) -> models.Clip:
    return models.Clip(*hf_config.clip_from_hf(hf, **options))


def _decoders(model_type, prefix, from_hf, to_hf, table, classifier):
    headless = partial(from_hf, lm_head=False)
    return (
        _decoder(f"{prefix}ForCausalLM", model_type, from_hf, to_hf, table),
        _decoder(f"{prefix}Model", model_type, headless, to_hf, table),
        _classifier(
            f"{prefix}ForSequenceClassification",
            model_type,
            models.Decoder,
            headless,
            to_hf,
            classifier,
            use_bias=False,
        ),
    )


_BERT = ("bert", models.Bert, hf_config.bert_from_hf, hf_config.bert_to_hf)
_ROBERTA = ("roberta", models.Bert, hf_config.roberta_from_hf, hf_config.roberta_to_hf)
_GPT2 = ("gpt2", models.Gpt2, hf_config_decoder.gpt2_from_hf, hf_config_decoder.gpt2_to_hf)

ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            "CLIPModel",
            "clip",
            _clip_from_hf,
            lambda model: hf_config.clip_to_hf(model.vision_config, model.text_config),
            lambda model: clip.CLIP,
        ),
        Architecture(
            "CLIPVisionModelWithProjection",
            "clip_vision_model",
            lambda hf, **options: models.ViT(hf_config.clip_vision_from_hf(hf, **options)),
            lambda model: hf_config.clip_vision_to_hf(model.config),
            _vision_table,
        ),
        Architecture(
            "CLIPVisionModel",
            "clip_vision_model",
            lambda hf, **options: models.ViT(
                hf_config.clip_vision_from_hf(hf, projection=False, **options)
            ),
            lambda model: hf_config.clip_vision_to_hf(model.config),
            _vision_table,
        ),
        _base(
            "CLIPTextModelWithProjection",
            "clip_text_model",
            models.ClipText,
            hf_config.clip_text_from_hf,
            hf_config.clip_text_to_hf,
            clip_text.CLIP_TEXT,
        ),
        _base(
            "Dinov2Model",
            "dinov2",
            models.ViT,
            hf_config.dinov2_from_hf,
            hf_config.dinov2_to_hf,
            vit.DINOV2,
        ),
        _classifier(
            "Dinov2ForImageClassification",
            "dinov2",
            models.ViT,
            hf_config.dinov2_from_hf,
            hf_config.dinov2_to_hf,
            vit.DINOV2_CLASSIFIER,
            pool="cls_mean",
        ),
        _base("BertModel", *_BERT, bert.BERT),
        _classifier(
            "BertForSequenceClassification", *_BERT, bert.BERT_CLASSIFIER, kind="bert", pool="cls"
        ),
        _base("RobertaModel", *_ROBERTA, roberta.ROBERTA),
        _classifier(
            "RobertaForSequenceClassification",
            *_ROBERTA,
            roberta.ROBERTA_CLASSIFIER,
            kind="roberta",
            pool="cls",
        ),
        _base("GPT2LMHeadModel", *_GPT2, gpt2.GPT2),
        _base("GPT2Model", *_GPT2, gpt2.GPT2),
        _classifier("GPT2ForSequenceClassification", *_GPT2, gpt2.GPT2_CLASSIFIER, use_bias=False),
        *_decoders(
            "llama",
            "Llama",
            hf_config_decoder.llama_from_hf,
            hf_config_decoder.llama_to_hf,
            decoder.LLAMA,
            decoder.LLAMA_CLASSIFIER,
        ),
        *_decoders(
            "qwen2",
            "Qwen2",
            hf_config_decoder.qwen2_from_hf,
            hf_config_decoder.qwen2_to_hf,
            decoder.QWEN2,
            decoder.QWEN2_CLASSIFIER,
        ),
        _decoder(
            "QWenLMHeadModel",
            "qwen",
            hf_config_decoder.qwen_from_hf,
            hf_config_decoder.qwen_to_hf,
            decoder.QWEN,
        ),
    )
}
"""What can be read, by the name of transformers' class."""

# Classes of which the head is not read, but the rest is.
_SAME_AS = {
    "BertForMaskedLM": "BertModel",
    "BertForPreTraining": "BertModel",
    "RobertaForMaskedLM": "RobertaModel",
}
_BACKBONES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "clip_text_model": "CLIPTextModelWithProjection",
    "dinov2": "Dinov2Model",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "gpt2": "GPT2Model",
    "llama": "LlamaModel",
    "qwen2": "Qwen2Model",
    "qwen": "QWenLMHeadModel",
}


def identify(hf: Mapping[str, Any], head: str = "auto") -> Architecture:
    """Says what a config.json describes.

    Args:
      hf: the parsed config.json.
      head: "auto" for the class that it names, or the backbone where it names none; "none" for the
        backbone in any case.

    Returns:
      The entry of `ARCHITECTURES`.

    Raises:
      ValueError: if `head` is unknown, or the config names neither a class nor a model type that is
        known; the known ones are listed.
    """
    if head not in ("auto", "none"):
        raise ValueError(f"head={head!r}: expected 'auto' or 'none'")
    model_type, named = hf.get("model_type"), hf.get("architectures") or []
    if head == "auto":
        for name in named if isinstance(named, list) else [named]:
            entry = ARCHITECTURES.get(_SAME_AS.get(name, name)) if isinstance(name, str) else None
            if entry is not None and model_type in (None, entry.model_type):
                return entry
    if (head == "none" or not named) and isinstance(model_type, str) and model_type in _BACKBONES:
        return ARCHITECTURES[_BACKBONES[model_type]]
    raise ValueError(
        f"config.json: architectures={named!r} with model_type={model_type!r}, expected one of "
        f"{', '.join(sorted({*ARCHITECTURES, *_SAME_AS}))}; or head='none' for the backbone of one "
        f"of the model types {', '.join(_BACKBONES)}"
    )


def headless(architecture: Architecture) -> Architecture:
    """The class of the backbone of a classifier; of anything else, itself."""
    if architecture.name.endswith("Classification"):
        return ARCHITECTURES[_BACKBONES[architecture.model_type]]
    return architecture


def load(
    source: str | os.PathLike[str] | Snapshot,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    sharding: jax.sharding.Sharding | Callable[..., jax.sharding.Sharding] | None = None,
    head: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Reads a snapshot into one of our models.

    Args:
      source: a snapshot folder, or an open `Snapshot`.
      dtype: of the activations.
      param_dtype: of the parameters; the tensors are cast to it.
      sharding: as for `to_flax`.
      head: as for `identify`; with "none" a head in the file is read past.
      options: further fields of the model's configuration. With `scan` the blocks are stacked after
        they are read, which takes their memory a second time. With another `image_size` DINOv2's
        position embeddings are resized as transformers does.

    Returns:
      The model and its parameters.

    Raises:
      FileNotFoundError: as `Snapshot`.
      ValueError: as `Snapshot`, `identify` and `to_flax`; if there is no config.json, an option is
        unknown, or the config has what our models do not.
    """
    snapshot = source if isinstance(source, Snapshot) else Snapshot(source)
    hf = snapshot.require_config()
    fields = {**(options or {}), "dtype": dtype, "param_dtype": param_dtype}
    try:
        architecture = identify(hf, head)
        wanted = architecture.from_hf(hf, **fields)
        model = architecture.from_hf(hf, **{**fields, "scan": False})
        tensors: Mapping[str, np.ndarray] = snapshot
        if architecture.model_type == "dinov2":
            vision = model.backbone if isinstance(model, models.SequenceClassifier) else model
            tensors = vit.with_grid(snapshot, vision.config.grid_side)
        params = to_flax(
            tensors, architecture.table(model), models.expected_params(model), sharding
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{snapshot.where}: {error}") from error
    if fields.get("scan"):
        params = stacking.stack_blocks(params)
    return Loaded(wanted, params, architecture, hf)
