"""Parameters from torch checkpoints to Flax and back: one engine, one table of rules a model."""

from retex_jax.convert.bert import BERT, BERT_CLASSIFIER, bert_from_safetensors
from retex_jax.convert.clip import CLIP
from retex_jax.convert.clip_text import CLIP_TEXT
from retex_jax.convert.decoder import (
    LLAMA,
    LLAMA_CLASSIFIER,
    QWEN,
    QWEN2,
    QWEN2_CLASSIFIER,
    decoder_table,
)
from retex_jax.convert.engine import (
    ConvertedSource,
    Rule,
    Table,
    Transform,
    check,
    to_flax,
    to_torch,
)
from retex_jax.convert.gpt2 import GPT2, GPT2_CLASSIFIER, causal_classifier
from retex_jax.convert.open_clip import OPEN_CLIP, OPEN_CLIP_VISION
from retex_jax.convert.roberta import ROBERTA, ROBERTA_CLASSIFIER
from retex_jax.convert.vit import (
    CLIP_VISION,
    DINOV2,
    dinov2_from_onnx,
    resize_position_grid,
)
from retex_jax.snapshot import Snapshot

__all__ = [
    "BERT",
    "BERT_CLASSIFIER",
    "CLIP",
    "CLIP_TEXT",
    "CLIP_VISION",
    "DINOV2",
    "GPT2",
    "GPT2_CLASSIFIER",
    "LLAMA",
    "LLAMA_CLASSIFIER",
    "OPEN_CLIP",
    "OPEN_CLIP_VISION",
    "QWEN",
    "QWEN2",
    "QWEN2_CLASSIFIER",
    "ROBERTA",
    "ROBERTA_CLASSIFIER",
    "ConvertedSource",
    "Rule",
    "Snapshot",
    "Table",
    "Transform",
    "bert_from_safetensors",
    "causal_classifier",
    "check",
    "decoder_table",
    "dinov2_from_onnx",
    "resize_position_grid",
    "to_flax",
    "to_torch",
]
