"""Hugging Face's config.json <-> our configurations.

A config.json may leave out what equals transformers' default, so each default is repeated here. What our
models do not have (another activation, a sliding window, ...) is an error, never ignored; dropout and
what only matters in training or generation is ignored.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from retex_jax import models
from retex_jax.models.vit_config import CLIP_MEAN, CLIP_STD

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
_ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}


class Schema(NamedTuple):
    """How the keys of one kind of config.json become the fields of one of our configurations.

    Attributes:
      fields: our field -> (their key, transformers' default).
      fixed: their key -> the only value that our model has, which is transformers' default as well.
    """

    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]


def read(schema: Schema, hf: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Reads the fields of one of our configurations.

    Args:
      schema: of the model.
      hf: the parsed config.json, or a part of it.
      what: the model, for the message.

    Returns:
      Our field -> value.

    Raises:
      ValueError: listing every key whose value has another type than its default, or is not what
        our model has.
    """
    fields, problems = {}, []
    for field, (key, default) in schema.fields.items():
        value = hf.get(key, default)
        if field == "activation" and isinstance(value, str) and value in _ACTIVATIONS:
            value = _ACTIVATIONS[value]
        elif field == "activation":
            problems.append(f"{key}={value!r}: expected one of {', '.join(sorted(_ACTIVATIONS))}")
        elif not _is_like(value, default):
            problems.append(f"{key}={value!r}: expected a value like {default!r}")
        fields[field] = value
    for key, only in schema.fixed.items():
        if (value := hf.get(key)) not in (None, only):
            problems.append(f"{key}={value!r}: only {only!r} is supported")
    if problems:
        raise ValueError(f"config.json of {what}: " + "; ".join(problems))
    return fields


def write(schema: Schema, config: Any) -> dict[str, Any]:
    """Undoes `read`: their keys and values of one of our configurations, defaults included."""
    values = {key: getattr(config, field) for field, (key, _) in schema.fields.items()}
    for key, _ in (entry for field, entry in schema.fields.items() if field == "activation"):
        values[key] = _ACTIVATION_NAMES[values[key]]
    return {**values, **schema.fixed}


def _is_like(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or type(value) is int
    if type(default) is float:
        return type(value) in (int, float)
    return type(value) is type(default)


def _tower(**keys: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    """The keys that most transformers share, after those that differ."""
    return {
        **keys,
        "width": keys.get("width", ("hidden_size", 768)),
        "num_layers": keys.get("num_layers", ("num_hidden_layers", 12)),
        "num_heads": keys.get("num_heads", ("num_attention_heads", 12)),
    }


CLIP_VISION = Schema(
    _tower(
        image_size=("image_size", 224),
        patch_size=("patch_size", 32),
        mlp_dim=("intermediate_size", 3072),
        activation=("hidden_act", "quick_gelu"),
        projection_dim=("projection_dim", 512),
        layer_norm_eps=("layer_norm_eps", 1e-5),
    ),
    {"num_channels": 3},
)
CLIP_TEXT = Schema(
    _tower(
        vocab_size=("vocab_size", 49408),
        width=("hidden_size", 512),
        num_heads=("num_attention_heads", 8),
        mlp_dim=("intermediate_size", 2048),
        max_length=("max_position_embeddings", 77),
        projection_dim=("projection_dim", 512),
        eos_token_id=("eos_token_id", 49407),
        activation=("hidden_act", "quick_gelu"),
        layer_norm_eps=("layer_norm_eps", 1e-5),
    ),
    {},
)
DINOV2 = Schema(
    _tower(
        image_size=("image_size", 224),
        patch_size=("patch_size", 14),
        activation=("hidden_act", "gelu"),
        layer_norm_eps=("layer_norm_eps", 1e-6),
    ),
    {"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False},
)
BERT = Schema(
    _tower(
        vocab_size=("vocab_size", 30522),
        mlp_dim=("intermediate_size", 3072),
        max_length=("max_position_embeddings", 512),
        num_token_types=("type_vocab_size", 2),
        activation=("hidden_act", "gelu"),
        layer_norm_eps=("layer_norm_eps", 1e-12),
    ),
    {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
)
ROBERTA = Schema(
    {**BERT.fields, "vocab_size": ("vocab_size", 50265), "padding_idx": ("pad_token_id", 1)},
    BERT.fixed,
)


def clip_vision_from_hf(
    hf: Mapping[str, Any], *, projection: bool = True, **options: Any
) -> models.ViTConfig:
    """Returns the ViTConfig of a CLIPVisionConfig; `options` are fields that differ."""
    fields = read(CLIP_VISION, hf, "CLIP's vision tower")
    if not projection:
        fields["projection_dim"] = None
    fields |= {
        "pre_norm": True,
        "patch_bias": False,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    return models.ViTConfig(**fields | options)


def clip_vision_to_hf(config: models.ViTConfig) -> dict[str, Any]:
    """Returns the keys of a CLIPVisionConfig; its projection_dim is left out where there is none."""
    keys = {"model_type": "clip_vision_model", **write(CLIP_VISION, config)}
    return {key: value for key, value in keys.items() if value is not None}


def clip_text_from_hf(hf: Mapping[str, Any], **options: Any) -> models.ClipTextConfig:
    """Returns the ClipTextConfig of a CLIPTextConfig; `options` are fields that differ."""
    return models.ClipTextConfig(**read(CLIP_TEXT, hf, "CLIP's text tower") | options)


def clip_text_to_hf(config: models.ClipTextConfig) -> dict[str, Any]:
    """Returns the keys of a CLIPTextConfig."""
    return {"model_type": "clip_text_model", **write(CLIP_TEXT, config)}


def clip_from_hf(
    hf: Mapping[str, Any], **options: Any
) -> tuple[models.ViTConfig, models.ClipTextConfig]:
    """Returns both towers' configurations of a CLIPConfig, whose own projection_dim holds for both.

    Old files have the towers' keys in `vision_config_dict` and `text_config_dict`, which win.
    """
    towers = []
    for name in ("vision_config", "text_config"):
        part = {**(hf.get(name) or {}), **(hf.get(f"{name}_dict") or {})}
        towers.append({**part, "projection_dim": hf.get("projection_dim", 512)})
    return clip_vision_from_hf(towers[0], **options), clip_text_from_hf(towers[1], **options)


def clip_to_hf(vision: models.ViTConfig, text: models.ClipTextConfig) -> dict[str, Any]:
    """Returns the keys of a CLIPConfig."""
    return {
        "model_type": "clip",
        "projection_dim": vision.projection_dim,
        "vision_config": clip_vision_to_hf(vision),
        "text_config": clip_text_to_hf(text),
    }


def dinov2_from_hf(hf: Mapping[str, Any], **options: Any) -> models.ViTConfig:
    """Returns the ViTConfig of a Dinov2Config; `options` are fields that differ."""
    fields = read(DINOV2, hf, "DINOv2")
    ratio = hf.get("mlp_ratio", 4)
    if type(ratio) not in (int, float):
        raise ValueError(f"config.json of DINOv2: mlp_ratio={ratio!r}: expected a number")
    fields |= {"mlp_dim": int(fields["width"] * ratio), "layer_scale": True}
    return models.ViTConfig(**fields | options)


def dinov2_to_hf(config: models.ViTConfig) -> dict[str, Any]:
    """Returns the keys of a Dinov2Config."""
    ratio = config.mlp_dim / config.width
    ratio = int(ratio) if ratio.is_integer() else ratio
    return {"model_type": "dinov2", **write(DINOV2, config), "mlp_ratio": ratio}


def bert_from_hf(hf: Mapping[str, Any], **options: Any) -> models.BertConfig:
    """Returns the BertConfig of transformers' BertConfig; `options` are fields that differ."""
    return models.BertConfig(**read(BERT, hf, "BERT") | options)


def bert_to_hf(config: models.BertConfig) -> dict[str, Any]:
    """Returns the keys of transformers' BertConfig."""
    return {"model_type": "bert", **write(BERT, config)}


def roberta_from_hf(hf: Mapping[str, Any], **options: Any) -> models.BertConfig:
    """Returns the BertConfig of a RobertaConfig; `options` are fields that differ.

    Its max_position_embeddings counts the rows of the table, the first of which hold no token.
    """
    fields = read(ROBERTA, hf, "RoBERTa")
    fields["max_length"] -= fields["padding_idx"] + 1
    return models.BertConfig(**fields | options)


def roberta_to_hf(config: models.BertConfig) -> dict[str, Any]:
    """Returns the keys of a RobertaConfig."""
    keys = {"model_type": "roberta", **write(ROBERTA, config)}
    return {**keys, "max_position_embeddings": config.position_rows}
