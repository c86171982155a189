"""Tables for Llama, Qwen2 and the first Qwen.

Llama and Qwen2 have one set of names, those of Hugging Face's `LlamaForCausalLM` (without "model.",
as a headless model's file has them, they are read too). The first Qwen has names of its own: one
fused weight for query, key and value, and `w2` and `w1` for what Llama calls gate and up. Rotary
frequencies are buffers and read past.

A file may hold a head although it is tied to the embedding. `decoder_table` gives the table that
reads past it then, and only then.
"""

import dataclasses

from retex_jax import models
from retex_jax.convert.engine import TRANSPOSE, Rule, Table, split
from retex_jax.convert.gpt2 import causal_classifier

_HEAD = Rule("lm_head.weight", "lm_head/kernel", TRANSPOSE)


def _rule(torch: str, flax: str, *transform) -> Rule:
    return Rule(f"model.{torch}", flax, *transform, aliases=(torch,))


def _llama_rules():
    block = "layers.{i}."
    yield _rule("embed_tokens.weight", "token_embedding/embedding")
    yield _rule(f"{block}input_layernorm.weight", "blocks_{i}/norm1/scale")
    yield _rule(f"{block}post_attention_layernorm.weight", "blocks_{i}/norm2/scale")
    for torch, flax in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        torch, flax = f"{block}self_attn.{torch}_proj", f"blocks_{{i}}/attention/{flax}"
        yield _rule(f"{torch}.weight", f"{flax}/kernel", TRANSPOSE)
        if not flax.endswith("out"):
            yield _rule(f"{torch}.bias", f"{flax}/bias")
    for name in ("gate", "up", "down"):
        yield _rule(f"{block}mlp.{name}_proj.weight", f"blocks_{{i}}/mlp/{name}/kernel", TRANSPOSE)
    yield _rule("norm.weight", "final_norm/scale")
    yield _HEAD


def _qwen_rules():
    block = "transformer.h.{i}."
    fused = [f"blocks_{{i}}/attention/{name}" for name in ("query", "key", "value")]
    yield Rule("transformer.wte.weight", "token_embedding/embedding")
    yield Rule(f"{block}ln_1.weight", "blocks_{i}/norm1/scale")
    yield Rule(
        f"{block}attn.c_attn.weight",
        tuple(f"{name}/kernel" for name in fused),
        split(3, 0, TRANSPOSE),
    )
    yield Rule(f"{block}attn.c_attn.bias", tuple(f"{name}/bias" for name in fused), split(3, 0))
    yield Rule(f"{block}attn.c_proj.weight", "blocks_{i}/attention/out/kernel", TRANSPOSE)
    yield Rule(f"{block}ln_2.weight", "blocks_{i}/norm2/scale")
    for torch, flax in (("w1", "up"), ("w2", "gate"), ("c_proj", "down")):
        yield Rule(f"{block}mlp.{torch}.weight", f"blocks_{{i}}/mlp/{flax}/kernel", TRANSPOSE)
    yield Rule("transformer.ln_f.weight", "final_norm/scale")
    yield _HEAD


LLAMA = Table(
    name="Llama",
    rules=tuple(_llama_rules()),
    ignore=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
"""Hugging Face's LlamaForCausalLM <-> Decoder."""

QWEN2 = dataclasses.replace(LLAMA, name="Qwen2")
"""Hugging Face's Qwen2ForCausalLM <-> Decoder."""

QWEN = Table(
    name="Qwen",
    rules=tuple(_qwen_rules()),
    ignore=(
        r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq",
        r"transformer\.h\.\d+\.attn\.masked_bias",
    ),
)
"""The first Qwen's QWenLMHeadModel <-> Decoder."""

LLAMA_CLASSIFIER = causal_classifier(LLAMA)
"""Hugging Face's LlamaForSequenceClassification <-> {"backbone": Decoder, "head": a bias-free kernel}."""

QWEN2_CLASSIFIER = causal_classifier(QWEN2)
"""Hugging Face's Qwen2ForSequenceClassification, likewise."""


def decoder_table(table: Table, config: models.DecoderConfig) -> Table:
    """Returns a decoder's table, fitted to its head.

    Args:
      table: `LLAMA`, `QWEN2`, `QWEN` or a classifier's.
      config: of the model.

    Returns:
      The table, which reads past `lm_head.weight` where `config.lm_head` is "tied".
    """
    if config.lm_head != "tied":
        return table
    return dataclasses.replace(table, ignore=(*table.ignore, r"lm_head\.weight"))
