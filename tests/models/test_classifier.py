"""Tests of backbones with a classification head, without any weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree

TINY = models.BertConfig(
    vocab_size=30, width=12, num_layers=1, num_heads=2, mlp_dim=20, max_length=8, pool="cls"
)
BATCH = {
    "input_ids": np.array([[4, 9, 2], [7, 3, 0]], np.int32),
    "attention_mask": np.array([[1, 1, 1], [1, 1, 0]], np.int32),
}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply({"params": params}, batch)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [("linear", None, ""), ("bert", "pooler", "classifier/"), ("roberta", "dense", "out_proj/")],
)
def test_logits_by_hand(kind, first, last, num_labels):
    model = models.SequenceClassifier(models.Bert(TINY), num_labels, kind)
    params = random_params(model)
    assert params.keys() == {"backbone", "head"}
    head = {name: np.asarray(x, np.float64) for name, x in tree.flatten(params["head"]).items()}
    x = apply(models.Bert(TINY), params["backbone"], BATCH).pooled
    if first:
        x = np.tanh(x @ head.pop(f"{first}/kernel") + head.pop(f"{first}/bias"))
    want = x @ head.pop(f"{last}kernel") + head.pop(f"{last}bias")
    assert not head
    got = apply(model, params, BATCH)
    assert got.shape == (2, num_labels) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_linear_head_without_bias():
    model = models.SequenceClassifier(models.Bert(TINY), 2, use_bias=False)
    params = random_params(model)
    assert params["head"].keys() == {"kernel"}
    pooled = apply(models.Bert(TINY), params["backbone"], BATCH).pooled
    np.testing.assert_allclose(
        apply(model, params, BATCH), pooled @ params["head"]["kernel"], atol=1e-5
    )


def test_any_backbone():
    config = models.ViTConfig(
        image_size=8, patch_size=4, width=12, num_layers=1, num_heads=2, mlp_dim=20
    )
    model = models.SequenceClassifier(models.ViT(config), 3)
    params = random_params(model)
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    pooled = apply(models.ViT(config), params["backbone"], {"image": image}).pooled
    np.testing.assert_allclose(
        apply(model, params, {"image": image}),
        pooled @ params["head"]["kernel"] + params["head"]["bias"],
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_head_is_float32_and_its_parameters_are_not():
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    model = models.SequenceClassifier(models.Bert(config), 2, "bert")
    params = random_params(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    pooled = apply(models.Bert(config), params["backbone"], BATCH).pooled
    head = jax.tree.map(lambda x: np.asarray(x, np.float32), params["head"])
    hidden = np.tanh(pooled @ head["pooler"]["kernel"] + head["pooler"]["bias"])
    want = hidden @ head["classifier"]["kernel"] + head["classifier"]["bias"]
    got = apply(model, params, BATCH)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_all_problems_are_listed():
    backbone = models.Bert(dataclasses.replace(TINY, pool="mean"))
    with pytest.raises(ValueError, match=r"num_labels=0: .*; head_kind='mlp': expected one of"):
        models.SequenceClassifier(backbone, 0, "mlp")
    with pytest.raises(ValueError, match="expected a backbone with pool='cls', got 'mean'"):
        models.SequenceClassifier(backbone, 2, "roberta")
