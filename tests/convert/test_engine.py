"""Tests of the conversion engine on made-up models."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retex_jax import experts, tree
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


FUSED = Table(
    name="fused",
    rules=(
        Rule(
            "h.{i}.qkv.weight",
            ("blocks_{i}/q/kernel", "blocks_{i}/k/kernel", "blocks_{i}/v/kernel"),
            engine.split(3, 0, engine.TRANSPOSE),
        ),
        Rule("h.{i}.qkv.bias", ("b_{i}/q", "b_{i}/k", "b_{i}/v"), engine.split(3, 0)),
        Rule("scale", "scale"),
    ),
)


def fused_tensors():
    rng = np.random.default_rng(0)
    return {
        "h.0.qkv.weight": rng.normal(size=(6, 4)).astype(np.float32),
        "h.0.qkv.bias": rng.normal(size=6).astype(np.float32),
        "scale": np.array(2.5, np.float32),
    }


def fused_expected(dtype=np.float32):
    kernels = {f"blocks_0/{n}/kernel": jax.ShapeDtypeStruct((4, 2), dtype) for n in "qkv"}
    biases = {f"b_0/{n}": jax.ShapeDtypeStruct((2,), dtype) for n in "qkv"}
    return {**kernels, **biases, "scale": jax.ShapeDtypeStruct((), dtype)}


def test_a_fused_tensor_becomes_several_leaves_and_back():
    source = fused_tensors()
    flat = tree.flatten(engine.to_flax(source, FUSED, fused_expected()))
    np.testing.assert_array_equal(flat["blocks_0/k/kernel"], source["h.0.qkv.weight"][2:4].T)
    np.testing.assert_array_equal(flat["b_0/v"], source["h.0.qkv.bias"][4:])
    back = engine.to_torch(flat, FUSED)
    assert back.keys() == source.keys()
    assert all(back[n].shape == x.shape and np.array_equal(back[n], x) for n, x in source.items())


def test_problems_of_fused_tensors():
    source = fused_tensors()
    source["h.0.qkv.weight"] = source["h.0.qkv.weight"][:5]
    source["h.0.qkv.bias"] = np.zeros(9, np.float32)
    with pytest.raises(ValueError) as error:
        engine.to_flax(source, FUSED, fused_expected())
    text = str(error.value)
    assert "shape [5, 4] does not fit split_3_transpose" in text
    assert "h.0.qkv.bias (for b_0/q, b_0/k, b_0/v): shape [9], expected [6]" in text
    expected = fused_expected()
    del expected["b_0/k"]
    with pytest.raises(ValueError, match=r"extra: h\.0\.qkv\.bias holds b_0/k, which the model"):
        engine.to_flax(fused_tensors(), FUSED, expected)
    with pytest.raises(ValueError, match=r"missing: h\.0\.qkv\.bias \(for b_0/k\)"):
        source = {name: x for name, x in fused_tensors().items() if "bias" not in name}
        engine.to_flax(source, FUSED, fused_expected())


def test_to_torch_misses_the_members_of_a_fused_tensor():
    flat = tree.flatten(engine.to_flax(fused_tensors(), FUSED, fused_expected()))
    del flat["b_0/q"], flat["b_0/v"]
    flat["blocks_0/k/kernel"] = flat["blocks_0/k/kernel"].astype(np.float16)
    with pytest.raises(ValueError) as error:
        engine.to_torch(flat, FUSED)
    text = str(error.value)
    assert "missing: b_0/q (for h.0.qkv.bias); nearest known name: b_0/k" in text
    assert "missing: b_0/v (for h.0.qkv.bias)" in text and "3 problem(s)" in text
    assert "does not fit split_3_transpose: dtypes float32, float16, float32" in text


def test_a_transform_must_give_as_many_parts_as_the_rule_names():
    table = Table("toy", (Rule("w", ("a", "b"), engine.split(3, 0)),))
    expected = {name: jax.ShapeDtypeStruct((2,), np.float32) for name in "ab"}
    with pytest.raises(ValueError, match=r"misshaped: w .*3 part\(s\) for the 2 of w"):
        engine.to_flax({"w": np.zeros(6, np.float32)}, table, expected)


class Guarded(dict):
    """Tensors of which only the shapes may be seen."""

    def __getitem__(self, name):
        raise AssertionError(f"{name} was read")


def test_nothing_is_read_before_all_is_checked():
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors().items()}
    engine.check(shapes, TABLE, expected())
    with pytest.raises(AssertionError, match="was read"):
        engine.to_flax(Guarded(shapes), TABLE, expected())
    for problem in ("token", "layer.0.fc.bias"):
        wrong = {**shapes, problem: jax.ShapeDtypeStruct((7, 7), np.float32)}
        with pytest.raises(ValueError, match="misshaped"):
            engine.to_flax(Guarded(wrong), TABLE, expected())
        with pytest.raises(ValueError, match="misshaped"):
            engine.check(wrong, TABLE, expected())


def test_shapes_are_checked_without_memory_of_their_size():
    huge = {"layer.0.fc.weight": jax.ShapeDtypeStruct((2**24, 2**24), np.float32)}
    with pytest.raises(ValueError, match=r"shape \[16777216, 16777216\], expected \[6, 4\]"):
        engine.check(huge, TABLE, {"blocks_0/fc/kernel": jax.ShapeDtypeStruct((4, 6), np.float32)})


def test_leaves_are_placed_and_cast():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut, everywhere = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("x", "y"), ())
    )
    seen = {}

    def choose(name, shape):
        seen[name] = shape
        return cut if len(shape) == 2 else everywhere

    want = engine.to_flax(fused_tensors(), FUSED, fused_expected(jnp.bfloat16))
    for sharding in (jax.sharding.SingleDeviceSharding(jax.devices()[1]), everywhere, choose):
        got = engine.to_flax(fused_tensors(), FUSED, fused_expected(jnp.bfloat16), sharding)
        chex.assert_trees_all_equal(got, want)
        kernel = got["blocks_0"]["q"]["kernel"]
        assert isinstance(kernel, jax.Array) and kernel.dtype == jnp.bfloat16
        assert kernel.sharding == (cut if sharding is choose else sharding)
        assert kernel.addressable_shards[0].data.shape == ((2, 1) if sharding is choose else (4, 2))
    assert seen == {name: x.shape for name, x in tree.flatten(want).items()}


def test_results_share_no_memory_with_the_tensors():
    source = fused_tensors()
    flat = tree.flatten(engine.to_flax(source, FUSED, fused_expected()))
    for x in source.values():
        assert not any(np.shares_memory(x, y) for y in flat.values())


def test_a_converted_source_is_read_leaf_by_leaf():
    models = [fused_tensors(), {name: x + 1 for name, x in fused_tensors().items()}]
    sources = [engine.ConvertedSource(m, FUSED, fused_expected()) for m in models]
    want = [tree.flatten(engine.to_flax(m, FUSED, fused_expected())) for m in models]
    for source, flat in zip(sources, want, strict=True):
        assert source.leaves == dict(sorted(fused_expected().items()))
        for name, x in flat.items():
            np.testing.assert_array_equal(source.read(name), x)
    source: experts.Source = sources[0]
    assert source.read("blocks_0/q/kernel").flags.c_contiguous


@st.composite
def random_tables(draw):
    """A table of random transforms, one rule a transform, with tensors that fit it."""
    rules, source = [], {}
    for n in range(draw(st.integers(1, 5))):
        ndim = draw(st.integers(1, 4))
        sides = draw(st.tuples(*([st.integers(1, 3)] * ndim)))
        kind = draw(st.sampled_from(["identity", "permute", "drop", "split", "split_permute"]))
        axes = tuple(draw(st.permutations(range(ndim))))
        parts, axis = draw(st.integers(1, 3)), draw(st.integers(-ndim, ndim - 1))
        flax = f"m_{{i}}/leaf_{n}"
        if kind == "identity":
            transform = engine.IDENTITY
        elif kind == "permute":
            transform = engine.permute("any", axes)
        elif kind == "drop":
            count = draw(st.integers(1, ndim))
            sides = (1,) * count + sides[count:]
            transform = engine.drop_leading(count, ndim)
        else:
            then = engine.permute("any", axes) if kind == "split_permute" else engine.IDENTITY
            transform = engine.split(parts, axis, then)
            sides = tuple(
                side * parts if place == axis % ndim else side for place, side in enumerate(sides)
            )
            flax = tuple(f"m_{{i}}/leaf_{n}/part_{part}" for part in range(parts))
        rules.append(Rule(f"x.{{i}}.{n}", flax, transform))
        dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int8]))
        size = int(np.prod(sides)) * np.dtype(dtype).itemsize
        data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype)
        source[f"x.{draw(st.integers(0, 12))}.{n}"] = data.reshape(sides)
    return Table("random", tuple(rules)), source


@settings(deadline=None, max_examples=150)
@given(random_tables())
def test_any_table_undoes_itself_bitwise(drawn):
    table, source = drawn
    expected = {}
    for key, x in source.items():
        rule = next(r for r in table.rules if r.torch.endswith("." + key.split(".")[2]))
        parts = rule.transform.forward(x)
        for name, part in zip(
            rule.members, parts if isinstance(parts, tuple) else [parts], strict=True
        ):
            leaf = name.format(i=key.split(".")[1])
            expected[leaf] = jax.ShapeDtypeStruct(part.shape, part.dtype)
    back = engine.to_torch(engine.to_flax(source, table, expected), table)
    assert back.keys() == source.keys()
    for key, x in source.items():
        assert back[key].shape == x.shape and back[key].dtype == x.dtype
        assert back[key].tobytes() == x.tobytes()
