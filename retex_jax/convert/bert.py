"""Tables and reader for BERT, with the names of Hugging Face's `BertModel` and its sequence classifier.

Prefixes of models with a head ("bert.") and the old LayerNorm names (gamma, beta) are read too. Read
past, because our encoder has no such part: the pooler, which belongs to the classification head (see
`models.bert`), the heads of pretraining ("cls."), and the position_ids buffer. The classifier's table
reads the pooler.
"""

import os

from retex_jax import models
from retex_jax.convert.engine import TRANSPOSE, Rule, Table, to_flax
from retex_jax.convert.prefixed import prefixed
from retex_jax.snapshot import Snapshot

_LAYER = "encoder.layer.{i}."


def _norm(torch: str, flax: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{torch}.weight", f"{flax}/scale", aliases=(f"{torch}.gamma",)),
        Rule(f"{torch}.bias", f"{flax}/bias", aliases=(f"{torch}.beta",)),
    )


def dense_rules(torch: str, flax: str) -> tuple[Rule, Rule]:
    """Returns the rules of a dense layer's weight and bias."""
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
        *dense_rules(f"{_LAYER}attention.self.query", "blocks_{i}/attention/query"),
        *dense_rules(f"{_LAYER}attention.self.key", "blocks_{i}/attention/key"),
        *dense_rules(f"{_LAYER}attention.self.value", "blocks_{i}/attention/value"),
        *dense_rules(f"{_LAYER}attention.output.dense", "blocks_{i}/attention/out"),
        *_norm(f"{_LAYER}attention.output.LayerNorm", "blocks_{i}/norm1"),
        *dense_rules(f"{_LAYER}intermediate.dense", "blocks_{i}/mlp/fc1"),
        *dense_rules(f"{_LAYER}output.dense", "blocks_{i}/mlp/fc2"),
        *_norm(f"{_LAYER}output.LayerNorm", "blocks_{i}/norm2"),
    ),
    ignore=(
        r"(bert\.)?pooler\.dense\.(weight|bias)",
        r"(bert\.)?embeddings\.position_ids",
        r"cls\..*",
    ),
    prefixes=("bert.",),
)
"""Hugging Face's BertModel <-> Bert."""

BERT_CLASSIFIER = Table(
    name="BERT classifier",
    rules=(
        *prefixed(BERT.rules, torch="bert.", flax="backbone/"),
        *dense_rules("bert.pooler.dense", "head/pooler"),
        *dense_rules("classifier", "head/classifier"),
    ),
    ignore=(r"bert\.embeddings\.position_ids",),
)
"""Hugging Face's BertForSequenceClassification <-> SequenceClassifier with the head "bert"."""


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
    return to_flax(Snapshot(source), BERT, expected)
