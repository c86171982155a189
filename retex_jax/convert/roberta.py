"""Tables for RoBERTa, with the names of Hugging Face's `RobertaModel` and its sequence classifier.

A RobertaModel has BERT's names. Read past, because our model has no such part: the language model's head
("lm_head."), the position_ids buffer, and the pooler, which RoBERTa was not trained with and its
classifier does not use (some files of it still hold one).
"""

from retex_jax.convert.bert import BERT, dense_rules
from retex_jax.convert.engine import Table
from retex_jax.convert.prefixed import prefixed

_IGNORE = (
    r"(roberta\.)?pooler\.dense\.(weight|bias)",
    r"(roberta\.)?embeddings\.position_ids",
)

ROBERTA = Table(
    name="RoBERTa",
    rules=BERT.rules,
    ignore=(*_IGNORE, r"lm_head\..*"),
    prefixes=("roberta.",),
)
"""Hugging Face's RobertaModel <-> Bert with `padding_idx`."""

ROBERTA_CLASSIFIER = Table(
    name="RoBERTa classifier",
    rules=(
        *prefixed(BERT.rules, torch="roberta.", flax="backbone/"),
        *dense_rules("classifier.dense", "head/dense"),
        *dense_rules("classifier.out_proj", "head/out_proj"),
    ),
    ignore=_IGNORE,
)
"""Hugging Face's RobertaForSequenceClassification <-> SequenceClassifier with the head "roberta"."""
