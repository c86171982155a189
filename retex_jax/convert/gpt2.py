"""Tables for GPT-2, with the names of Hugging Face's `GPT2LMHeadModel`.

Its Conv1D weights are [in, out] already, so nothing is transposed. Names without "transformer.", as
in the released files, are read too. The buffers of the causal mask and a copy of the tied head are
read past.
"""

import dataclasses

from retex_jax.convert.engine import TRANSPOSE, Rule, Table
from retex_jax.convert.prefixed import prefixed

_PREFIX = "transformer."


def _rule(torch: str, flax: str) -> Rule:
    return Rule(f"{_PREFIX}{torch}", flax, aliases=(torch,))


def _layer(torch: str, flax: str, weight: str) -> tuple[Rule, Rule]:
    return _rule(f"{torch}.weight", f"{flax}/{weight}"), _rule(f"{torch}.bias", f"{flax}/bias")


GPT2 = Table(
    name="GPT-2",
    rules=(
        _rule("wte.weight", "token_embedding/embedding"),
        _rule("wpe.weight", "position_embedding/embedding"),
        *_layer("h.{i}.ln_1", "blocks_{i}/norm1", "scale"),
        *_layer("h.{i}.attn.c_attn", "blocks_{i}/attention/qkv", "kernel"),
        *_layer("h.{i}.attn.c_proj", "blocks_{i}/attention/out", "kernel"),
        *_layer("h.{i}.ln_2", "blocks_{i}/norm2", "scale"),
        *_layer("h.{i}.mlp.c_fc", "blocks_{i}/mlp/fc1", "kernel"),
        *_layer("h.{i}.mlp.c_proj", "blocks_{i}/mlp/fc2", "kernel"),
        *_layer("ln_f", "final_norm", "scale"),
    ),
    ignore=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
)
"""Hugging Face's GPT2LMHeadModel <-> Gpt2."""


def causal_classifier(table: Table) -> Table:
    """Returns the table of a sequence classifier over a causal language model.

    Args:
      table: of the language model, whose Flax names gain "backbone/".

    Returns:
      The table, with Hugging Face's `score.weight` <-> "head/kernel", which has no bias. A head of
      the language model in the file is extra, unless the table reads past it.
    """
    rules = (
        *prefixed(table.rules, flax="backbone/"),
        Rule("score.weight", "head/kernel", TRANSPOSE),
    )
    return dataclasses.replace(table, name=f"{table.name} classifier", rules=rules)


GPT2_CLASSIFIER = causal_classifier(GPT2)
"""Hugging Face's GPT2ForSequenceClassification <-> {"backbone": Gpt2, "head": a bias-free kernel}."""
