"""Tests of the conversion engine on made-up models."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retex_jax import tree
from retex_jax.convert import engine
from retex_jax.convert.engine import Rule, Table

TABLE = Table(
    name="toy",
    rules=(
        Rule("stem.conv.weight", "stem/kernel", engine.CONV),
        Rule("token", "token", engine.drop_leading(2, ndim=3)),
        Rule("layer.{i}.fc.weight", "blocks_{i}/fc/kernel", engine.TRANSPOSE),
        Rule("layer.{i}.fc.bias", "blocks_{i}/fc/bias", aliases=("layer.{i}.fc.beta",)),
    ),
    ignore=(r".*\.num_batches",),
    prefixes=("model.",),
)

SHAPES = {
    "stem.conv.weight": (4, 3, 2, 5),
    "token": (1, 1, 4),
    "layer.0.fc.weight": (6, 4),
    "layer.0.fc.bias": (6,),
    "layer.11.fc.weight": (6, 4),
    "layer.11.fc.bias": (6,),
}

EXPECTED = {
    "stem/kernel": (2, 5, 3, 4),
    "token": (4,),
    "blocks_0/fc/kernel": (4, 6),
    "blocks_0/fc/bias": (6,),
    "blocks_11/fc/kernel": (4, 6),
    "blocks_11/fc/bias": (6,),
}


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def expected(dtype=jnp.float32):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in EXPECTED.items()}


def test_layouts_by_hand():
    source = tensors()
    flat = tree.flatten(engine.to_flax(source, TABLE, expected()))
    assert {name: x.shape for name, x in flat.items()} == EXPECTED
    assert flat["stem/kernel"][1, 4, 2, 3] == source["stem.conv.weight"][3, 2, 1, 4]
    assert flat["blocks_11/fc/kernel"][3, 5] == source["layer.11.fc.weight"][5, 3]
    assert flat["token"][2] == source["token"][0, 0, 2]
    np.testing.assert_array_equal(flat["blocks_0/fc/bias"], source["layer.0.fc.bias"])


def test_expected_may_be_nested():
    nested = tree.unflatten(expected())
    a = tree.flatten(engine.to_flax(tensors(), TABLE, nested))
    b = tree.flatten(engine.to_flax(tensors(), TABLE, expected()))
    assert all(np.array_equal(a[k], b[k]) for k in a) and a.keys() == b.keys() == EXPECTED.keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bitwise(dtype):
    source = tensors(dtype)
    source["layer.0.fc.bias"][:3] = [np.nan, np.inf, -0.0]
    back = engine.to_torch(engine.to_flax(source, TABLE, expected(dtype)), TABLE)
    assert back.keys() == source.keys()
    for name, x in source.items():
        assert back[name].dtype == x.dtype and back[name].shape == x.shape
        assert back[name].tobytes() == x.tobytes()
        assert back[name].flags.c_contiguous


def test_params_may_be_jax_arrays():
    params = jax.tree.map(jnp.asarray, engine.to_flax(tensors(), TABLE, expected()))
    back = engine.to_torch(params, TABLE)
    assert all(np.array_equal(back[name], x) for name, x in tensors().items())


def test_floats_are_cast_to_the_expected_dtype():
    got = engine.to_flax(tensors(np.float16), TABLE, expected(jnp.float32))
    assert got["token"].dtype == np.float32
    np.testing.assert_array_equal(got["token"], tensors(np.float16)["token"][0, 0])
    half = engine.to_flax(tensors(), TABLE, expected(jnp.bfloat16))
    assert half["token"].dtype == ml_dtypes.bfloat16


def test_aliases_prefixes_and_ignored_names():
    source = {f"model.{name}": x for name, x in tensors().items()}
    source["model.layer.0.fc.beta"] = source.pop("model.layer.0.fc.bias")
    source["model.norm.num_batches"] = np.array(3)
    got = engine.to_flax(source, TABLE, expected())
    np.testing.assert_array_equal(got["blocks_0"]["fc"]["bias"], tensors()["layer.0.fc.bias"])


def test_the_first_matching_rule_decides():
    table = Table("toy", (Rule("a.{i}", "first_{i}"), Rule("a.1", "second")))
    want = {"first_1": jax.ShapeDtypeStruct((2,), np.float32)}
    assert list(engine.to_flax({"a.1": np.zeros(2, np.float32)}, table, want)) == ["first_1"]


def test_a_template_matches_its_name_and_no_other():
    # A dot is a dot, a number has no leading zeros, and nothing may follow.
    for name in ("layerX0Xfc.bias", "layer.00.fc.bias", "layer.0.fc.bias.x", "layer.a.fc.bias"):
        with pytest.raises(ValueError, match=r"extra: "):
            engine.to_flax({**tensors(), name: np.zeros(6, np.float32)}, TABLE, expected())


def test_all_problems_are_listed_at_once():
    source = tensors()
    source["layer.0.fc.wieght"] = source.pop("layer.0.fc.weight")
    source["layer.0.fc.beta"] = source["layer.0.fc.bias"]
    source["layer.11.fc.weight"] = source["layer.11.fc.weight"].T
    source["layer.12.fc.bias"] = np.zeros(6, np.float32)
    source["token"] = source["token"][0]
    source["stem.conv.weight"] = source["stem.conv.weight"].astype(np.int32)
    with pytest.raises(ValueError) as error:
        engine.to_flax(source, TABLE, expected())
    lines = str(error.value).splitlines()
    assert lines[0] == "cannot convert to toy: 7 problem(s)"
    assert sorted(line.strip() for line in lines[1:]) == [
        "duplicate: layer.0.fc.bias and layer.0.fc.beta both mean blocks_0/fc/bias",
        "extra: layer.0.fc.wieght; nearest known name: layer.0.fc.weight",
        "extra: layer.12.fc.bias; nearest known name: layer.11.fc.bias",
        "misshaped: layer.11.fc.weight (for blocks_11/fc/kernel): shape [4, 6], expected [6, 4]",
        "misshaped: stem.conv.weight (for stem/kernel): dtype int32, expected float32",
        "misshaped: token (for token): shape [1, 4], expected 3 axes",
        "missing: layer.0.fc.weight (for blocks_0/fc/kernel); "
        "nearest known name: layer.0.fc.wieght",
    ]


def test_a_leading_axis_that_is_not_one_is_misshaped():
    source = {**tensors(), "token": np.zeros((2, 1, 4), np.float32)}
    with pytest.raises(ValueError, match=r"token.*shape \[2, 1, 4\] does not fit drop_leading_2"):
        engine.to_flax(source, TABLE, expected())


def test_to_torch_lists_all_problems():
    params = {
        "blocks_3/fc/kernal": np.zeros((4, 6)),
        "blocks_3/fc/kernel": np.zeros(4),
        "zzz": np.zeros(1),
    }
    with pytest.raises(ValueError) as error:
        engine.to_torch(params, TABLE)
    text = str(error.value)
    assert "extra: blocks_3/fc/kernal; nearest known name: blocks_3/fc/kernel" in text
    assert "misshaped: blocks_3/fc/kernel: [4] does not fit transpose" in text
    assert "extra: zzz" in text and "3 problem(s)" in text


def test_to_torch_finds_two_parameters_of_one_name():
    table = Table("toy", (Rule("w", "a"), Rule("w", "b")))
    with pytest.raises(ValueError, match="duplicate: b and another parameter both mean w"):
        engine.to_torch({"a": np.zeros(1), "b": np.zeros(1)}, table)


def arrays(ndim, leading_ones=0):
    sides = st.tuples(*([st.integers(1, 4)] * (ndim - leading_ones)))
    dtypes = st.sampled_from([np.float32, np.float16, np.int8])
    shapes = sides.map(lambda s: (1,) * leading_ones + s)
    return st.tuples(dtypes, shapes).flatmap(lambda pair: hnp.arrays(*pair))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_inverse_undoes_its_transform(data):
    count = data.draw(st.integers(1, 3))
    ndim = data.draw(st.integers(count, 4))
    axes = tuple(data.draw(st.permutations(range(ndim))))
    for transform, x in (
        (engine.IDENTITY, data.draw(arrays(2))),
        (engine.TRANSPOSE, data.draw(arrays(2))),
        (engine.CONV, data.draw(arrays(4))),
        (engine.permute("any", axes), data.draw(arrays(ndim))),
        (engine.drop_leading(count, ndim), data.draw(arrays(ndim, count))),
    ):
        y = transform.forward(x)
        for got, want in ((transform.inverse(y), x), (transform.forward(transform.inverse(y)), y)):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert got.tobytes() == want.tobytes()
