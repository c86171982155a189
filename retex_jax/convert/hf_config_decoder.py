"""Hugging Face's config.json <-> our configurations, of the causal language models; see `hf_config`."""

from collections.abc import Callable, Mapping
from typing import Any

from retex_jax import models
from retex_jax.convert.hf_config import Schema, read, write

GPT2 = Schema(
    {
        "vocab_size": ("vocab_size", 50257),
        "width": ("n_embd", 768),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "mlp_dim": ("n_inner", None),
        "max_length": ("n_positions", 1024),
        "activation": ("activation_function", "gelu_new"),
        "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
)
_DECODER = {
    "width": ("hidden_size", 4096),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "head_dim": ("head_dim", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
LLAMA = Schema(
    {
        **_DECODER,
        "vocab_size": ("vocab_size", 32000),
        "num_kv_heads": ("num_key_value_heads", None),
        "mlp_dim": ("intermediate_size", 11008),
        "max_length": ("max_position_embeddings", 2048),
    },
    {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)
QWEN2 = Schema(
    {
        **_DECODER,
        "vocab_size": ("vocab_size", 151936),
        "num_kv_heads": ("num_key_value_heads", 32),
        "mlp_dim": ("intermediate_size", 22016),
        "max_length": ("max_position_embeddings", 32768),
    },
    {"hidden_act": "silu", "use_sliding_window": False},
)
# The first Qwen has no class in transformers: these are the defaults of the code beside its weights.
QWEN = Schema(
    {
        "vocab_size": ("vocab_size", 151936),
        "width": ("hidden_size", 4096),
        "num_layers": ("num_hidden_layers", 32),
        "num_heads": ("num_attention_heads", 32),
        "head_dim": ("kv_channels", 128),
        "mlp_dim": ("intermediate_size", 22016),
        "max_length": ("seq_length", 8192),
        "rope_theta": ("rotary_emb_base", 10000.0),
        "norm_eps": ("layer_norm_epsilon", 1e-6),
    },
    {"rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True},
)


def gpt2_from_hf(hf: Mapping[str, Any], **options: Any) -> models.Gpt2Config:
    """Returns the Gpt2Config of transformers' GPT2Config; `options` are fields that differ."""
    fields = read(GPT2, hf, "GPT-2")
    if fields["mlp_dim"] is None:
        fields["mlp_dim"] = 4 * fields["width"]
    return models.Gpt2Config(**fields | options)


def gpt2_to_hf(config: models.Gpt2Config) -> dict[str, Any]:
    """Returns the keys of transformers' GPT2Config."""
    return {"model_type": "gpt2", **write(GPT2, config)}


def _decoder_from_hf(hf, schema, what, lm_head, options):
    fields = read(schema, hf, what)
    layers = hf.get("layer_types") or []
    if any(kind != "full_attention" for kind in layers):
        raise ValueError(f"config.json of {what}: layer_types: only 'full_attention' is supported")
    tied = "tied" if hf.get("tie_word_embeddings", False) else "untied"
    fields["lm_head"] = tied if lm_head else "none"
    return models.DecoderConfig(**fields | _rope_from_hf(hf, what) | options)


def llama_from_hf(
    hf: Mapping[str, Any], *, lm_head: bool = True, **options: Any
) -> models.DecoderConfig:
    """Returns the DecoderConfig of a LlamaConfig; `options` are fields that differ."""
    return _decoder_from_hf(hf, LLAMA, "Llama", lm_head, options)


def qwen2_from_hf(
    hf: Mapping[str, Any], *, lm_head: bool = True, **options: Any
) -> models.DecoderConfig:
    """Returns the DecoderConfig of a Qwen2Config; `options` are fields that differ."""
    return _decoder_from_hf(hf, QWEN2, "Qwen2", lm_head, {"qkv_bias": True, **options})


def _decoder_to_hf(model_type: str, schema: Schema) -> Callable[..., dict[str, Any]]:
    def to_hf(config: models.DecoderConfig) -> dict[str, Any]:
        keys = {"model_type": model_type, **write(schema, config), **_rope_to_hf(config)}
        return {**keys, "tie_word_embeddings": config.lm_head == "tied"}

    return to_hf


llama_to_hf = _decoder_to_hf("llama", LLAMA)
qwen2_to_hf = _decoder_to_hf("qwen2", QWEN2)


def qwen_from_hf(hf: Mapping[str, Any], **options: Any) -> models.DecoderConfig:
    """Returns the DecoderConfig of the first Qwen; `options` are fields that differ.

    Its intermediate_size counts both halves of the gated MLP. `seq_length` is the longest sequence:
    beyond it the released code rescales, which our model does not.
    """
    fields = read(QWEN, hf, "Qwen")
    fields["mlp_dim"] //= 2
    fields["lm_head"] = "tied" if hf.get("tie_word_embeddings", False) else "untied"
    return models.DecoderConfig(**fields | {"qkv_bias": True} | options)


def qwen_to_hf(config: models.DecoderConfig) -> dict[str, Any]:
    """Returns the keys of the first Qwen's config.json."""
    keys = {"model_type": "qwen", **write(QWEN, config)}
    keys["intermediate_size"] = 2 * config.mlp_dim
    return {**keys, "tie_word_embeddings": config.lm_head == "tied"}


_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}


def _rope_from_hf(hf, what):
    """Reads both spellings: `rope_parameters`, and `rope_theta` with `rope_scaling` before it."""
    rope = {**(hf.get("rope_parameters") or {}), **(hf.get("rope_scaling") or {})}
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if type(theta) not in (int, float):
        problems.append(f"rope_theta={theta!r}: expected a number")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        problems.append("partial_rotary_factor: only 1.0 is supported")
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type={kind!r}: expected 'default' or 'llama3'")
    elif kind == "llama3" and (absent := [key for key in _LLAMA3.values() if key not in rope]):
        problems.append(f"rope_scaling: lacks {', '.join(absent)}")
    if problems:
        raise ValueError(f"config.json of {what}: " + "; ".join(problems))
    scaling = {field: rope[key] for field, key in _LLAMA3.items()} if kind == "llama3" else None
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_to_hf(config):
    """Writes both spellings, so that older releases of transformers read the file too."""
    scaling = config.rope_scaling
    if scaling is None:
        parameters, old = {"rope_type": "default"}, None
    else:
        values = {key: getattr(scaling, field) for field, key in _LLAMA3.items()}
        parameters = old = {"rope_type": "llama3", **values}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": old,
        "rope_parameters": {"rope_theta": config.rope_theta, **parameters},
    }
