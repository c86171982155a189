"""Tests of the tables of Llama, Qwen2 and the first Qwen: round trips, and parity with torch."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from retex_jax import convert, models, tree

UNTIED = models.DecoderConfig(
    vocab_size=30,
    width=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=20,
    max_length=32,
)
TIED = dataclasses.replace(UNTIED, lm_head="tied")
QWEN = dataclasses.replace(UNTIED, num_kv_heads=4, head_dim=None, width=16, qkv_bias=True)


def random_params(config):
    rng = np.random.default_rng(0)
    expected = models.expected_params(models.Decoder(config))
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(p.dtype), expected)


def assert_same(got, want):
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == x.tobytes() for name, x in want.items())


def make_batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(24) < np.array([[24], [3], [17]])).astype(np.int32)
    return {
        "input_ids": rng.integers(1, 30, (3, 24)).astype(np.int32) * mask,
        "attention_mask": mask,
    }


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_llama_round_trip(qkv_bias):
    params = random_params(dataclasses.replace(UNTIED, qkv_bias=qkv_bias))
    tensors = convert.to_torch(params, convert.LLAMA)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (8, 12)
    assert ("model.layers.0.self_attn.q_proj.bias" in tensors) == qkv_bias
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert_same(convert.to_flax(tensors, convert.LLAMA, params), params)
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    assert_same(convert.to_flax(bare, convert.QWEN2, params), params)


def test_a_head_in_the_file_is_read_past_only_if_tied():
    params = random_params(TIED)
    tensors = convert.to_torch(params, convert.LLAMA)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    table = convert.decoder_table(convert.LLAMA, TIED)
    assert_same(convert.to_flax(tensors, table, params), params)
    headless = dataclasses.replace(TIED, lm_head="none")
    for config in (UNTIED, headless):
        assert convert.decoder_table(convert.LLAMA, config) == convert.LLAMA
    with pytest.raises(ValueError, match=r"extra: lm_head\.weight"):
        convert.to_flax(tensors, convert.LLAMA, params)
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        convert.to_flax(tensors, convert.LLAMA, random_params(UNTIED))


@pytest.mark.parametrize("table", [convert.LLAMA_CLASSIFIER, convert.QWEN2_CLASSIFIER])
def test_classifier_round_trip(table):
    backbone = random_params(dataclasses.replace(UNTIED, lm_head="none"))
    params = {"backbone": backbone, "head": {"kernel": np.ones((12, 3), np.float32)}}
    tensors = convert.to_torch(params, table)
    assert tensors["score.weight"].shape == (3, 12)
    assert_same(convert.to_flax(tensors, table, params), params)


def test_first_qwen_round_trip():
    params = random_params(QWEN)
    tensors = convert.to_torch(params, convert.QWEN)
    assert len(tensors) == 2 * 8 + 3
    attention = params["blocks_1"]["attention"]
    fused = [attention[name] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(
        tensors["transformer.h.1.attn.c_attn.weight"],
        np.concatenate([x["kernel"].T for x in fused]),
    )
    np.testing.assert_array_equal(
        tensors["transformer.h.1.attn.c_attn.bias"], np.concatenate([x["bias"] for x in fused])
    )
    tensors["transformer.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["transformer.h.0.attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert_same(convert.to_flax(tensors, convert.QWEN, params), params)


def test_first_qwen_lists_what_is_wrong():
    params = random_params(QWEN)
    tensors = convert.to_torch(params, convert.QWEN)
    tensors["transformer.h.0.mlp.w3.weight"] = tensors.pop("transformer.h.0.mlp.w2.weight")
    tensors["transformer.h.1.attn.c_attn.bias"] = np.zeros(47, np.float32)
    with pytest.raises(ValueError) as error:
        convert.to_flax(tensors, convert.QWEN, params)
    text = str(error.value)
    assert "extra: transformer.h.0.mlp.w3.weight" in text
    assert "missing: transformer.h.0.mlp.w2.weight (for blocks_0/mlp/gate/kernel)" in text
    assert "misshaped: transformer.h.1.attn.c_attn.bias" in text


@pytest.fixture(scope="module")
def transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def noisy(model, scale=0.3):
    """Moves every parameter of a torch model, so that no bias is 0 and no scale 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def torch_model(transformers, family, config, **options):
    """A tiny random torch model of the shape of `config`."""
    options = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.lm_head == "tied",
        "pad_token_id": 0,
        **options,
    }
    head = "SequenceClassification" if "num_labels" in options else "CausalLM"
    made = getattr(transformers, f"{family}Config")(**options)
    return noisy(getattr(transformers, f"{family}For{head}")(made))


def torch_logits(model, batch):
    import torch

    with torch.no_grad():
        arguments = {name: torch.tensor(x).long() for name, x in batch.items()}
        return model(**arguments).logits.numpy()


def state(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def compare(config, params, model):
    """Compares the logits of the real tokens with a torch model's."""
    batch = make_batch()
    got = models.Decoder(config).apply({"params": params}, batch, method="lm_logits")
    real = batch["attention_mask"] > 0
    want = torch_logits(model, batch)
    assert want[real].std() > 0.1
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-4)


ROPE = models.RopeScaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=20)
QWEN2_UNTIED = dataclasses.replace(UNTIED, qkv_bias=True, rope_theta=1e3)
QWEN2_TIED = dataclasses.replace(TIED, qkv_bias=True, rope_theta=1e3)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "config", "options"),
    [
        ("Llama", UNTIED, {}),
        (
            "Llama",
            dataclasses.replace(TIED, rope_theta=100.0, rope_scaling=ROPE),
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 100.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 20,
                }
            },
        ),
        ("Qwen2", QWEN2_UNTIED, {}),
        ("Qwen2", QWEN2_TIED, {}),
    ],
    ids=["llama", "llama-scaled-tied", "qwen2", "qwen2-tied"],
)
def test_logits_equal_transformers_and_leave_as_they_came(transformers, family, config, options):
    import torch

    model = torch_model(transformers, family, config, **options)
    tensors = state(model)
    table = convert.decoder_table(convert.LLAMA if family == "Llama" else convert.QWEN2, config)
    params = convert.to_flax(tensors, table, models.expected_params(models.Decoder(config)))
    compare(config, params, model)

    back = convert.to_torch(params, table)
    tied = {"lm_head.weight"} if config.lm_head == "tied" else set()
    assert tensors.keys() - back.keys() == tied
    assert all(tensors[name].tobytes() == x.tobytes() for name, x in back.items())
    other = torch_model(transformers, family, config, **options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict({name: torch.tensor(x) for name, x in back.items()}, strict=False)
    batch = make_batch()
    np.testing.assert_array_equal(torch_logits(other, batch), torch_logits(model, batch))


@pytest.mark.torch
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_classifier_equals_transformers(transformers, family):
    config = dataclasses.replace(UNTIED, lm_head="none", qkv_bias=family == "Qwen2")
    model = torch_model(transformers, family, config, num_labels=3)
    table = convert.LLAMA_CLASSIFIER if family == "Llama" else convert.QWEN2_CLASSIFIER
    head = {"kernel": jax.ShapeDtypeStruct((12, 3), np.float32)}
    expected = {"backbone": models.expected_params(models.Decoder(config)), "head": head}
    params = convert.to_flax(state(model), table, expected)
    batch = make_batch()
    pooled = models.Decoder(config).apply({"params": params["backbone"]}, batch).pooled
    want = torch_logits(model, batch)
    np.testing.assert_allclose(pooled @ params["head"]["kernel"], want, rtol=0, atol=1e-4)
    back = convert.to_torch(params, table)
    assert back.keys() == state(model).keys()


def first_qwen_names(tensors, num_layers):
    """Renames Qwen2's tensors to the first Qwen's, query, key and value fused."""
    renamed = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(num_layers):
        old, new = f"model.layers.{i}.", f"transformer.h.{i}."
        for leaf in ("weight", "bias"):
            renamed[f"{new}attn.c_attn.{leaf}"] = np.concatenate(
                [tensors[f"{old}self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            )
        for torch, qwen in (
            ("self_attn.o_proj", "attn.c_proj"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
            ("mlp.gate_proj", "mlp.w2"),
            ("mlp.up_proj", "mlp.w1"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            renamed[f"{new}{qwen}.weight"] = tensors[f"{old}{torch}.weight"]
    return renamed


@pytest.mark.torch
def test_first_qwen_equals_a_qwen2_of_the_same_weights(transformers):
    model = torch_model(transformers, "Qwen2", QWEN)
    tensors = first_qwen_names(state(model), QWEN.num_layers)
    expected = models.expected_params(models.Decoder(QWEN))
    params = convert.to_flax(tensors, convert.QWEN, expected)
    compare(QWEN, params, model)
    back = convert.to_torch(params, convert.QWEN)
    assert back.keys() == tensors.keys()
    assert all(tensors[name].tobytes() == x.tobytes() for name, x in back.items())
