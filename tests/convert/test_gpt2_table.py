"""Tests of GPT-2's tables: round trips, and parity with torch."""

import os

import jax
import numpy as np
import pytest

from retex_jax import convert, models, tree

TINY = models.Gpt2Config(
    vocab_size=30, width=12, num_layers=2, num_heads=2, mlp_dim=48, max_length=8
)


def random_params():
    rng = np.random.default_rng(0)
    expected = models.expected_params(models.Gpt2(TINY))
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(p.dtype), expected)


def assert_same(got, want):
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == x.tobytes() for name, x in want.items())


def make_batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(8) < np.array([[8], [3], [5]])).astype(np.int32)
    return {
        "input_ids": rng.integers(1, 30, (3, 8)).astype(np.int32) * mask,
        "attention_mask": mask,
    }


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_round_trip_reads_past_buffers_and_the_tied_head(prefix):
    params = random_params()
    tensors = convert.to_torch(params, convert.GPT2)
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (12, 36)
    source = {prefix + name.removeprefix("transformer."): x for name, x in tensors.items()}
    source[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.bool_)
    source[f"{prefix}h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    source["lm_head.weight"] = tensors["transformer.wte.weight"]
    assert_same(convert.to_flax(source, convert.GPT2, params), params)
    source[f"{prefix}h.0.attn.c_attn.scale"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"1 problem\(s\)\n  extra: .*c_attn\.scale"):
        convert.to_flax(source, convert.GPT2, params)


def test_classifier_round_trip():
    params = {"backbone": random_params(), "head": {"kernel": np.ones((12, 3), np.float32)}}
    tensors = convert.to_torch(params, convert.GPT2_CLASSIFIER)
    assert tensors["score.weight"].shape == (3, 12)
    assert len(tensors) == len(tree.flatten(params))
    assert_same(convert.to_flax(tensors, convert.GPT2_CLASSIFIER, params), params)
    with pytest.raises(ValueError, match=r"extra: score\.weight"):
        convert.to_flax(tensors, convert.GPT2, params["backbone"])


@pytest.fixture(scope="module")
def gpt2():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.models.gpt2")


def noisy(model, scale=0.3):
    """Moves every parameter of a torch model, so that no bias is 0 and no scale 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def torch_config(gpt2, **options):
    return gpt2.GPT2Config(
        vocab_size=30, n_embd=12, n_layer=2, n_head=2, n_positions=8, pad_token_id=0, **options
    )


def torch_logits(model, batch):
    import torch

    with torch.no_grad():
        arguments = {name: torch.tensor(x).long() for name, x in batch.items()}
        return model(**arguments).logits.numpy()


def state(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.mark.torch
def test_logits_equal_transformers_and_leave_as_they_came(gpt2):
    import torch

    model = noisy(gpt2.GPT2LMHeadModel(torch_config(gpt2)))
    tensors, batch = state(model), make_batch()
    expected = models.expected_params(models.Gpt2(TINY))
    params = convert.to_flax(tensors, convert.GPT2, expected)
    got = models.Gpt2(TINY).apply({"params": params}, batch, method="lm_logits")
    real = batch["attention_mask"] > 0
    want = torch_logits(model, batch)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-4)

    back = convert.to_torch(params, convert.GPT2)
    assert tensors.keys() - back.keys() == {"lm_head.weight"}
    assert all(tensors[name].tobytes() == x.tobytes() for name, x in back.items())
    other = gpt2.GPT2LMHeadModel(torch_config(gpt2)).eval()
    other.load_state_dict({name: torch.tensor(x) for name, x in back.items()}, strict=False)
    np.testing.assert_array_equal(torch_logits(other, batch), want)


@pytest.mark.torch
def test_classifier_equals_transformers(gpt2):
    model = noisy(gpt2.GPT2ForSequenceClassification(torch_config(gpt2, num_labels=3)))
    tensors, batch = state(model), make_batch()
    head = {"kernel": jax.ShapeDtypeStruct((12, 3), np.float32)}
    expected = {"backbone": models.expected_params(models.Gpt2(TINY)), "head": head}
    params = convert.to_flax(tensors, convert.GPT2_CLASSIFIER, expected)
    pooled = models.Gpt2(TINY).apply({"params": params["backbone"]}, batch).pooled
    want = torch_logits(model, batch)
    np.testing.assert_allclose(pooled @ params["head"]["kernel"], want, rtol=0, atol=1e-4)
    back = convert.to_torch(params, convert.GPT2_CLASSIFIER)
    assert back.keys() == tensors.keys()
    assert all(tensors[name].tobytes() == x.tobytes() for name, x in back.items())


@pytest.mark.torch
def test_layers_equal_transformers(gpt2):
    import torch

    model = noisy(gpt2.GPT2Model(torch_config(gpt2)))
    batch = make_batch()
    expected = models.expected_params(models.Gpt2(TINY))
    params = convert.to_flax(state(model), convert.GPT2, expected)
    got = models.Gpt2(TINY).apply({"params": params}, batch)
    hidden = []  # by hooks: the last of transformers' hidden states is after the final norm
    for block in model.h:
        block.register_forward_hook(
            lambda _, __, y: hidden.append(y[0] if isinstance(y, tuple) else y)
        )
    with torch.no_grad():
        model(**{name: torch.tensor(x).long() for name, x in batch.items()})
    mask = batch["attention_mask"][:, :, None]
    assert len(hidden) == len(got.layers) == 2
    for mine, states in zip(got.layers, hidden, strict=True):
        want = (states.numpy() * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(mine, want, rtol=0, atol=1e-4)


@pytest.mark.torch
@pytest.mark.slow
def test_full_size_equals_transformers(gpt2):
    model = noisy(gpt2.GPT2LMHeadModel(gpt2.GPT2Config()), scale=0.02)
    expected = models.expected_params(models.Gpt2(models.GPT2))
    params = convert.to_flax(state(model), convert.GPT2, expected)
    ids = np.random.default_rng(0).integers(0, 50257, (2, 16)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    got = models.Gpt2(models.GPT2).apply({"params": params}, batch, method="lm_logits")
    want = torch_logits(model, batch)
    assert want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
