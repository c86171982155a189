"""Scores of multiple-choice answers, compared with transformers' torch models."""

import os

import jax
import numpy as np
import pytest

from retex_jax import convert, models

VOCABULARY, WIDTH = 23, 8
PROMPTS = (5, 2, 4)
CHOICES = ((3, 1), (2, 4), (1, 3))


def gpt2(transformers):
    config = models.Gpt2Config(
        vocab_size=VOCABULARY, width=WIDTH, num_layers=2, num_heads=2, mlp_dim=32, max_length=16
    )
    made = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16
    )
    return models.Gpt2(config), convert.GPT2, transformers.GPT2LMHeadModel(made)


def decoder(transformers, family, table, **options):
    config = models.DecoderConfig(
        vocab_size=VOCABULARY,
        width=WIDTH,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=12,
        max_length=16,
        **options,
    )
    made = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=config.lm_head == "tied",
    )
    model = getattr(transformers, f"{family}ForCausalLM")(made)
    return models.Decoder(config), convert.decoder_table(table, config), model


MAKERS = {
    "gpt2": gpt2,
    "llama": lambda transformers: decoder(transformers, "Llama", convert.LLAMA),
    "qwen2": lambda transformers: decoder(
        transformers, "Qwen2", convert.QWEN2, qkv_bias=True, lm_head="tied"
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", MAKERS)
def test_scores_equal_transformers(name):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    model, table, reference = MAKERS[name](pytest.importorskip("transformers"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    reference.eval()
    tensors = {key: x.numpy() for key, x in reference.state_dict().items()}
    params = convert.to_flax(tensors, table, models.expected_params(model))

    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCABULARY, (3, 5))
    choices = rng.integers(0, VOCABULARY, (3, 2, 4))
    batch = {
        "input_ids": prompts,
        "attention_mask": np.arange(5) < np.array(PROMPTS)[:, None],
        "choice_ids": choices,
        "choice_mask": np.arange(4) < np.array(CHOICES)[:, :, None],
    }
    got = jax.jit(models.score_choices, static_argnums=0)(model, params, batch)
    for b, prompt in enumerate(PROMPTS):
        for c, length in enumerate(CHOICES[b]):
            answer = torch.tensor(choices[b, c, :length])
            ids = torch.cat([torch.tensor(prompts[b, :prompt]), answer])
            with torch.no_grad():
                logits = reference(input_ids=ids[None]).logits[0, prompt - 1 : -1]
            log_probs = torch.log_softmax(logits, dim=-1)[torch.arange(length), answer]
            want = log_probs.sum().item()
            np.testing.assert_allclose(got.log_likelihood[b, c], want, rtol=0, atol=1e-4)
