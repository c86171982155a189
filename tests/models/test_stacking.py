"""Tests of stacked blocks: the conversion, and that a scanned model is the unrolled one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import models, tree
from retex_jax.models import stacking

VISION = models.ViTConfig(
    image_size=8,
    patch_size=4,
    width=12,
    num_layers=3,
    num_heads=2,
    mlp_dim=20,
    layer_scale=True,
    projection_dim=5,
)
BERT = models.BertConfig(
    vocab_size=30, width=12, num_layers=3, num_heads=2, mlp_dim=20, max_length=8, pool="cls"
)
ROBERTA = dataclasses.replace(BERT, padding_idx=1, num_token_types=1)
TEXT = models.ClipTextConfig(
    vocab_size=30,
    width=12,
    num_layers=3,
    num_heads=2,
    mlp_dim=20,
    max_length=8,
    projection_dim=5,
    eos_token_id=29,
)
BACKBONES = {
    "vit": lambda scan: models.ViT(dataclasses.replace(VISION, scan=scan)),
    "bert": lambda scan: models.Bert(dataclasses.replace(BERT, scan=scan)),
    "roberta": lambda scan: models.Bert(dataclasses.replace(ROBERTA, scan=scan)),
    "clip_text": lambda scan: models.ClipText(dataclasses.replace(TEXT, scan=scan)),
}
WHOLE = {
    "clip": lambda scan: models.Clip(
        dataclasses.replace(VISION, scan=scan), dataclasses.replace(TEXT, scan=scan)
    ),
    "classifier": lambda scan: models.SequenceClassifier(BACKBONES["roberta"](scan), 2, "roberta"),
}
BATCH = {
    "image": np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32),
    "input_ids": np.array([[4, 9, 6, 29], [7, 29, 1, 1]], np.int32),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), expected)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model, params, batch, num_layers=None):
    options = {} if num_layers is None else {"num_layers": num_layers}
    return model.apply({"params": params}, batch, **options)


def shapes(params):
    return {name: x.shape for name, x in tree.flatten(params).items()}


@pytest.mark.parametrize("name", [*BACKBONES, *WHOLE])
def test_scanned_equals_unrolled(name):
    unrolled, scanned = ((BACKBONES | WHOLE)[name](scan) for scan in (False, True))
    params = random_params(unrolled)
    stacked = stacking.stack_blocks(params)
    assert shapes(stacked) == shapes(models.expected_params(scanned))
    want, got = run(unrolled, params, BATCH), run(scanned, stacked, BATCH)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_scanned_stops_early(name):
    unrolled, scanned = (BACKBONES[name](scan) for scan in (False, True))
    params = random_params(unrolled)
    got = run(scanned, stacking.stack_blocks(params), BATCH, 2)
    assert got.pooled is None and got.layers.shape == (2, 2, 12)
    np.testing.assert_allclose(
        got.layers, run(unrolled, params, BATCH).layers[:2], rtol=1e-5, atol=1e-5
    )


def test_scanned_blocks_start_from_different_values():
    @jax.jit  # so that the other parameters are never computed
    def init(key):
        params = models.init_params(BACKBONES["clip_text"](True), key)
        return params["blocks"]["mlp"]["fc1"]["kernel"]

    kernel = init(jax.random.key(0))
    assert kernel.shape == (3, 12, 20)
    assert np.abs(kernel[0] - kernel[1]).min() > 0


@pytest.mark.parametrize("name", [*BACKBONES, *WHOLE])
def test_round_trip(name):
    params = random_params((BACKBONES | WHOLE)[name](False))
    back = tree.flatten(stacking.unstack_blocks(stacking.stack_blocks(params)))
    want = tree.flatten(params)
    assert back.keys() == want.keys()
    for leaf, x in want.items():
        assert back[leaf].dtype == x.dtype
        np.testing.assert_array_equal(back[leaf], x)


def test_ten_blocks_keep_their_order():
    params = {f"blocks_{i}": {"w": np.full(2, i)} for i in reversed(range(11))}
    stacked = stacking.stack_blocks(params)
    np.testing.assert_array_equal(stacked["blocks"]["w"][:, 0], np.arange(11))


def test_a_gap_in_the_numbers():
    params = {f"blocks_{i}": {"w": np.zeros(2)} for i in (0, 1, 3)}
    with pytest.raises(ValueError, match=r"got the numbers \[0, 1, 3\], expected 0, 1"):
        stacking.stack_blocks({"backbone": params})


def test_blocks_that_differ_are_all_listed():
    params = {
        "blocks_0": {"mlp": {"w": np.zeros((2, 3), np.float32)}, "b": np.zeros(2, np.float32)},
        "blocks_1": {"mlp": {"w": np.zeros((2, 4), np.float32)}, "c": np.zeros(2, np.float32)},
        "blocks_2": {"mlp": {"w": np.zeros((2, 3), np.float16)}, "b": np.zeros(2, np.float32)},
    }
    with pytest.raises(ValueError, match="blocks: ") as error:
        stacking.stack_blocks(params)
    assert str(error.value) == (
        "blocks: blocks_1/b: missing; blocks_1/c: not in blocks_0; "
        "blocks_1/mlp/w: float32[2, 4], expected float32[2, 3]; "
        "blocks_2/mlp/w: float16[2, 3], expected float32[2, 3]"
    )


def test_leading_axes_that_differ():
    with pytest.raises(ValueError, match=r"leading axes \[2, 3\]"):
        stacking.unstack_blocks({"blocks": {"a": np.zeros((2, 4)), "b": np.zeros((3, 4))}})
