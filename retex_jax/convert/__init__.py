"""Parameters from torch checkpoints to Flax and back: one engine, one table of rules a model."""

from retex_jax.convert.bert import BERT, bert_from_safetensors
from retex_jax.convert.engine import Rule, Table, Transform, to_flax, to_torch
from retex_jax.convert.vit import (
    CLIP_VISION,
    DINOV2,
    clip_vision_from_safetensors,
    dinov2_from_onnx,
    dinov2_from_safetensors,
    resize_position_grid,
)

__all__ = [
    "BERT",
    "CLIP_VISION",
    "DINOV2",
    "Rule",
    "Table",
    "Transform",
    "bert_from_safetensors",
    "clip_vision_from_safetensors",
    "dinov2_from_onnx",
    "dinov2_from_safetensors",
    "resize_position_grid",
    "to_flax",
    "to_torch",
]
