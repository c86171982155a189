"""Table and reader for BERT encoders, with the names of Hugging Face's `BertModel`.

Prefixes of models with a head ("bert.") and the old LayerNorm names (gamma, beta) are read too. The
pooler and the position_ids buffer are read past: the pooled vector is a mean (see `models.bert`).
"""

import os

from retex_jax import models
from retex_jax.convert import safetensors_file
from retex_jax.convert.engine import TRANSPOSE, Rule, Table, to_flax

_LAYER = "encoder.layer.{i}."


def _norm(torch: str, flax: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{torch}.weight", f"{flax}/scale", aliases=(f"{torch}.gamma",)),
        Rule(f"{torch}.bias", f"{flax}/bias", aliases=(f"{torch}.beta",)),
    )


def _dense(torch: str, flax: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{torch}.weight", f"{flax}/kernel", TRANSPOSE),
        Rule(f"{torch}.bias", f"{flax}/bias"),
    )


BERT = Table(
    name="BERT",
    rules=(
        *(
            Rule(f"embeddings.{name}_embeddings.weight", f"{name}_embedding/embedding")
            for name in ("word", "position", "token_type")
        ),
        *_norm("embeddings.LayerNorm", "embedding_norm"),
        *_dense(f"{_LAYER}attention.self.query", "blocks_{i}/attention/query"),
        *_dense(f"{_LAYER}attention.self.key", "blocks_{i}/attention/key"),
        *_dense(f"{_LAYER}attention.self.value", "blocks_{i}/attention/value"),
        *_dense(f"{_LAYER}attention.output.dense", "blocks_{i}/attention/out"),
        *_norm(f"{_LAYER}attention.output.LayerNorm", "blocks_{i}/norm1"),
        *_dense(f"{_LAYER}intermediate.dense", "blocks_{i}/mlp/fc1"),
        *_dense(f"{_LAYER}output.dense", "blocks_{i}/mlp/fc2"),
        *_norm(f"{_LAYER}output.LayerNorm", "blocks_{i}/norm2"),
    ),
    ignore=(
        r"(bert\.)?pooler\.dense\.(weight|bias)",
        r"(bert\.)?embeddings\.position_ids",
    ),
    prefixes=("bert.",),
)
"""Hugging Face's BertModel <-> Bert."""


def bert_from_safetensors(source: bytes | str | os.PathLike, config: models.BertConfig) -> dict:
    """Reads a BERT encoder from safetensors.

    Args:
      source: the file's content, the file, or the folder that holds model.safetensors.
      config: its shapes must be the file's.

    Returns:
      Params of `models.Bert(config)`.

    Raises:
      ValueError: if the file is broken, or listing every tensor that is missing, extra, duplicate
        or misshaped.
      FileNotFoundError: if there is no such file.
    """
    expected = models.expected_params(models.Bert(config))
    return to_flax(safetensors_file.read(source), BERT, expected)
