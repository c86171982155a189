"""Tests of CLIP's text tower without any weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree

EOS = 29
TINY = models.ClipTextConfig(
    vocab_size=30,
    width=12,
    num_layers=3,
    num_heads=2,
    mlp_dim=20,
    max_length=8,
    projection_dim=5,
    eos_token_id=EOS,
)


def random_params(config=TINY, seed=0):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(models.ClipText(config))
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


def make_batch(lengths=(6, 2, 4), width=6):
    """Random tokens below EOS, EOS at the end of each text and as padding."""
    ids = np.random.default_rng(0).integers(3, EOS, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids[np.arange(width) >= np.array(lengths)[:, None] - 1] = EOS
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32)}


@functools.partial(jax.jit, static_argnums=(2, 3))
def apply(params, batch, config=TINY, num_layers=None):
    return models.ClipText(config).apply({"params": params}, batch, num_layers=num_layers)


def test_leaf_names_and_shapes():
    config = dataclasses.replace(TINY, num_layers=1)
    expected = tree.flatten(models.expected_params(models.ClipText(config)))
    names = ("query", "key", "value", "out")
    block = {
        **{f"attention/{n}/kernel": (12, 12) for n in names},
        **{f"attention/{n}/bias": (12,) for n in names},
        **{f"norm{n}/{leaf}": (12,) for n in (1, 2) for leaf in ("scale", "bias")},
        "mlp/fc1/kernel": (12, 20),
        "mlp/fc1/bias": (20,),
        "mlp/fc2/kernel": (20, 12),
        "mlp/fc2/bias": (12,),
    }
    assert {name: leaf.shape for name, leaf in expected.items()} == {
        "token_embedding/embedding": (30, 12),
        "position_embedding/embedding": (8, 12),
        "final_norm/scale": (12,),
        "final_norm/bias": (12,),
        "projection/kernel": (12, 5),
        **{f"blocks_0/{name}": shape for name, shape in block.items()},
    }


def test_attention_is_causal():
    params = random_params()
    config = dataclasses.replace(TINY, eos_token_id=7)

    def pooled_at_7(ids, mask):
        batch = {"input_ids": np.array([ids]), "attention_mask": np.array([mask])}
        return apply(params, batch, config).pooled

    want = pooled_at_7([4, 7, 9], [1, 1, 0])
    np.testing.assert_allclose(pooled_at_7([4, 7, 9], [1, 1, 1]), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pooled_at_7([4, 7, 20], [1, 1, 1]), want, rtol=1e-5, atol=1e-5)
    assert np.abs(pooled_at_7([5, 7, 9], [1, 1, 1]) - want).max() > 1e-2


def test_pooled_at_the_first_end_of_text():
    params, batch = random_params(), make_batch()
    want = apply(params, batch).pooled
    for row, length in enumerate((6, 2, 4)):
        alone = {name: x[row : row + 1, :length] for name, x in batch.items()}
        np.testing.assert_allclose(apply(params, alone).pooled[0], want[row], rtol=1e-5, atol=1e-5)


def test_legacy_configs_pool_at_the_largest_id():
    params, batch = random_params(), make_batch()
    legacy = dataclasses.replace(TINY, eos_token_id=2)
    want = apply(params, batch)
    np.testing.assert_array_equal(apply(params, batch, legacy).pooled, want.pooled)
    ids = np.array([[5, 28, 9, 3]], np.int32)
    other = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    at_28 = dataclasses.replace(TINY, eos_token_id=28)
    np.testing.assert_array_equal(
        apply(params, other, legacy).pooled, apply(params, other, at_28).pooled
    )
    assert np.abs(apply(params, other, legacy).pooled - apply(params, other).pooled).max() > 1e-2


def test_padding_changes_nothing():
    params, batch = random_params(), make_batch()
    want = apply(params, batch)
    junk = np.where(batch["attention_mask"] > 0, batch["input_ids"], 17)
    longer = {name: np.pad(x, ((0, 0), (0, 2))) for name, x in batch.items()}
    for other in ({**batch, "input_ids": junk}, longer):
        got = apply(params, other)
        np.testing.assert_allclose(got.pooled, want.pooled, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.layers, want.layers, rtol=1e-5, atol=1e-5)


def test_stopping_early_gives_the_first_layers():
    params, batch = random_params(), make_batch()
    whole, part = apply(params, batch), apply(params, batch, num_layers=2)
    assert whole.layers.shape == (3, 3, 12)
    assert part.pooled is None
    np.testing.assert_array_equal(part.layers, whole.layers[:2])


def test_low_precision_activations():
    params, batch = random_params(), make_batch()
    got = apply(params, batch, dataclasses.replace(TINY, dtype="bfloat16"))
    want = apply(params, batch)
    assert got.pooled.dtype == got.layers.dtype == jnp.float32
    np.testing.assert_allclose(got.pooled, want.pooled, atol=0.1)
    assert not np.array_equal(got.pooled, want.pooled)


def test_gradient_reaches_every_parameter():
    params, batch = random_params(), make_batch()
    grads = jax.grad(lambda p: jnp.sum(apply(p, batch).pooled ** 2))(params)
    # A bias of the keys moves all logits of a softmax alike, so its gradient is 0 but for rounding.
    dead = [k for k, g in tree.flatten(grads).items() if np.abs(g).max() < 1e-4]
    assert dead == [f"blocks_{i}/attention/key/bias" for i in range(3)]


def test_bad_batches():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"input_ids: shape \(3, 9\).*; attention_mask: shape"):
        apply(random_params(), {**batch, "input_ids": np.zeros((3, 9), np.int32)})


def test_config_lists_all_problems():
    with pytest.raises(ValueError, match="ClipTextConfig: ") as error:
        models.ClipTextConfig(width=10, num_heads=3, eos_token_id=49408, activation="relu")
    for part in (
        "width=10: expected a multiple of num_heads=3",
        "eos_token_id=49408: expected a token, 0..49407",
        "activation='relu': expected one of",
    ):
        assert part in str(error.value)
