"""Tests of scoring multiple-choice answers: with a cache it equals scoring each whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models
from retex_jax.models import stacking

VOCABULARY = 23
GPT2 = models.Gpt2(
    models.Gpt2Config(
        vocab_size=VOCABULARY, width=8, num_layers=2, num_heads=2, mlp_dim=12, max_length=16
    )
)
DECODER = models.Decoder(
    models.DecoderConfig(
        vocab_size=VOCABULARY,
        width=8,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=12,
        max_length=16,
    )
)
BOTH = pytest.mark.parametrize("model", [GPT2, DECODER], ids=["gpt2", "decoder"])
PROMPTS = (5, 2, 4)
CHOICES = ((3, 1, 4), (2, 2, 1), (4, 3, 0))  # the last question has two answers only


@functools.cache
def random_params(model):
    rng = np.random.default_rng(0)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: jnp.asarray(0.6 * rng.normal(size=p.shape), p.dtype), expected)


def make_batch(pad=0, prompt_length=5, choice_length=4):
    """Right-padded questions; `pad` fills the padding."""
    rng = np.random.default_rng(1)
    shapes = {"input_ids": (3, prompt_length), "choice_ids": (3, 3, choice_length)}
    lengths = {"input_ids": np.array(PROMPTS), "choice_ids": np.array(CHOICES)}
    batch = {}
    for name, shape in shapes.items():
        ids = rng.integers(0, VOCABULARY, (*shape[:-1], 8))[..., : shape[-1]]
        mask = np.arange(shape[-1]) < lengths[name][..., None]
        batch[name] = np.where(mask, ids, pad).astype(np.int32)
        batch["attention_mask" if name == "input_ids" else "choice_mask"] = mask.astype(np.int32)
    return batch


score = jax.jit(models.score_choices, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, ids, mask):
    batch = {"input_ids": ids, "attention_mask": mask}
    return model.apply({"params": params}, batch, method="lm_logits")


def whole_sequences(model, params, batch):
    """The same sums from whole sequences, without a cache, float64."""
    result = np.full((3, 3), -np.inf)
    for b, prompt in enumerate(PROMPTS):
        for c, length in enumerate(CHOICES[b]):
            if not length:
                continue
            answer = batch["choice_ids"][b, c, :length]
            ids = np.concatenate([batch["input_ids"][b, :prompt], answer])
            padded = np.zeros((1, 12), np.int32)  # one shape, compiled once
            padded[0, : len(ids)] = ids
            mask = (np.arange(12) < len(ids))[None]
            logits = np.asarray(logits_of(model, params, padded, mask), np.float64)[0]
            logits = logits[prompt - 1 : prompt - 1 + length]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            result[b, c] = log_probs[np.arange(length), answer].sum()
    return result


@BOTH
def test_equals_whole_sequences(model):
    params, batch = random_params(model), make_batch()
    got = score(model, params, batch)
    want = whole_sequences(model, params, batch)
    np.testing.assert_allclose(got.log_likelihood, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got.num_tokens, CHOICES)
    assert got.log_likelihood.dtype == jnp.float32
    assert np.std(want[np.isfinite(want)]) > 0.5


@BOTH
def test_padding_changes_nothing(model):
    params = random_params(model)
    want = score(model, params, make_batch())
    for other in (
        make_batch(pad=7),
        make_batch(prompt_length=7),
        make_batch(choice_length=6),
    ):
        got = score(model, params, other)
        np.testing.assert_allclose(got.log_likelihood, want.log_likelihood, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got.num_tokens, want.num_tokens)


@BOTH
def test_other_questions_and_answers_change_nothing(model):
    params, batch = random_params(model), make_batch()
    want = score(model, params, batch).log_likelihood
    alone = {name: x[1:2] for name, x in batch.items()}
    got = score(model, params, alone).log_likelihood
    np.testing.assert_allclose(got, want[1:2], rtol=1e-5, atol=1e-5)
    turned = {
        name: x[::-1, ::-1] if name.startswith("choice") else x[::-1] for name, x in batch.items()
    }
    got = score(model, params, turned).log_likelihood
    np.testing.assert_allclose(got, want[::-1, ::-1], rtol=1e-5, atol=1e-5)
    one = {name: x[:, :1] if name.startswith("choice") else x for name, x in batch.items()}
    got = score(model, params, one).log_likelihood
    np.testing.assert_allclose(got, want[:, :1], rtol=1e-5, atol=1e-5)


@BOTH
def test_all_single_tokens_sum_to_one(model):
    batch = make_batch()
    ids = np.broadcast_to(np.arange(VOCABULARY)[None, :, None], (3, VOCABULARY, 1))
    batch |= {"choice_ids": ids, "choice_mask": np.ones_like(ids)}
    got = score(model, random_params(model), batch).log_likelihood
    np.testing.assert_allclose(np.exp(got).sum(1), 1, rtol=1e-5)


@BOTH
def test_scanned_equals_unrolled(model):
    params, batch = random_params(model), make_batch()
    scanned = type(model)(dataclasses.replace(model.config, scan=True))
    got = score(scanned, stacking.stack_blocks(params), batch).log_likelihood
    want = score(model, params, batch).log_likelihood
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_cache_has_one_entry_a_prompt_token():
    batch = make_batch()
    variables = {"params": random_params(DECODER)}
    _, cache = jax.eval_shape(lambda: DECODER.apply(variables, batch, method="prefill"))
    assert cache.keys.shape == cache.values.shape == (2, 3, 5, 2, 2)
    assert cache.real.shape == (3, 5)


def test_cache_has_the_dtype_of_the_activations():
    model = models.Decoder(dataclasses.replace(DECODER.config, dtype="bfloat16"))
    params, batch = random_params(DECODER), make_batch()
    _, cache = jax.eval_shape(lambda: model.apply({"params": params}, batch, method="prefill"))
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    got = score(model, params, batch).log_likelihood
    want = score(DECODER, params, batch).log_likelihood
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.2)


def test_a_question_without_prompt_is_nan_and_harmless():
    params, batch = random_params(GPT2), make_batch()
    want = score(GPT2, params, batch).log_likelihood
    batch["attention_mask"][1] = 0
    got = score(GPT2, params, batch).log_likelihood
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[::2], want[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"choice_ids": np.zeros((3, 4), np.int32)},
            r"choice_ids: shape \(3, 4\), expected .B, C, T.",
        ),
        ({"choice_ids": np.zeros((2, 3, 4), np.int32)}, "with B = 3"),
        ({"choice_ids": np.zeros((3, 3, 4), np.float32)}, "choice_ids: dtype float32"),
        ({"choice_mask": np.ones((3, 3, 3), np.int32)}, r"choice_mask: shape \(3, 3, 3\)"),
        (
            {"choice_ids": np.zeros((3, 3, 13), np.int32)},
            r"5 \+ 13 tokens, expected at most 16 \+ 1",
        ),
        ({"input_ids": np.zeros((3, 17), np.int32)}, r"input_ids: shape \(3, 17\)"),
    ],
)
def test_bad_batches(change, message):
    with pytest.raises(ValueError, match=message):
        score(GPT2, random_params(GPT2), {**make_batch(), **change})


def test_the_longest_answer_just_fits():
    batch = make_batch(prompt_length=5, choice_length=4)
    pad = ((0, 0), (0, 0), (0, 8))
    longer = {name: np.pad(x, pad) if name.startswith("choice") else x for name, x in batch.items()}
    got = score(GPT2, random_params(GPT2), longer).log_likelihood
    want = score(GPT2, random_params(GPT2), batch).log_likelihood
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
