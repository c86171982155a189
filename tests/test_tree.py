import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import assume, given
from hypothesis import strategies as st

from retex_jax import tree

KEYS = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1)
TREES = st.recursive(
    st.integers(), lambda children: st.dictionaries(KEYS, children, min_size=1, max_size=4)
).filter(lambda value: isinstance(value, dict))


@given(TREES)
def test_unflatten_undoes_flatten(params):
    flat = tree.flatten(params)
    assert tree.unflatten(flat) == params
    assert list(flat) == sorted(flat)
    assert len(flat) == len(jax.tree.leaves(params))


def test_flatten_names_the_leaves():
    leaf = np.ones(2)
    assert tree.flatten({"b": {"c": 1, "a": leaf}, "a": 0}) == {"a": 0, "b/a": leaf, "b/c": 1}
    assert tree.flatten({}) == {}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"b/c": 1}}, "'b/c' under 'a'"),
        ({"": 1}, "''"),
        ({1: 2}, "key 1"),
        ({"a": {"b": {}}}, "'a/b' is an empty dict"),
        ([1], "list"),
    ],
)
def test_flatten_rejects(params, message):
    with pytest.raises(ValueError, match=message):
        tree.flatten(params)


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a"), ("a/b", "a/b/c/d"), ("a/b/c", "a/b")]
)
def test_unflatten_rejects_a_leaf_that_is_also_a_folder(names):
    with pytest.raises(ValueError, match="a"):
        tree.unflatten(dict.fromkeys(names, 0))


def test_first_match_takes_the_first_and_raises_without_one():
    rules = [(r"^a/.*kernel$", 1), (r"kernel", 2), (r"^b", 3)]
    assert [tree.first_match(rules, name) for name in ("a/x/kernel", "a/kernels", "b")] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"no rule matches leaf 'c'.*kernel"):
        tree.first_match(rules, "c")


def test_matches_any():
    assert tree.matches_any(["^x", "head"], "my/head/kernel")
    assert not tree.matches_any(["^head"], "my/head")
    assert not tree.matches_any([], "a")


def test_did_you_mean():
    assert (
        tree.did_you_mean("dense/kernal", ["dense/kernel", "x"])
        == " (did you mean 'dense/kernel'?)"
    )
    assert tree.did_you_mean("dense/kernal", ["q"]) == ""


def test_param_bytes():
    params = {
        "a": np.zeros((2, 3), np.float32),
        "b": jnp.zeros((), jnp.bfloat16),
        "c": jax.ShapeDtypeStruct((5,), jnp.int8),
        "d": np.zeros((0, 4)),
    }
    assert tree.param_bytes(params) == 24 + 2 + 5


def test_is_float():
    assert all(map(tree.is_float, (np.float32, np.float16, jnp.bfloat16, np.float64)))
    assert not any(map(tree.is_float, (np.int32, np.uint8, np.bool_)))


@pytest.mark.parametrize("name", references.FLAX_MATRICES)
def test_flax_matrices(name):
    pretrained, _ = references.flax_model(1)
    leaf = pretrained[name]
    view = tree.matrix_view(name, leaf.shape, "flax")
    want = references.as_matrix(leaf, references.FLAX_MATRICES[name])
    np.testing.assert_array_equal(tree.to_matrix(leaf, view), want.astype(np.float32))
    assert tree.matrix_shape(leaf.shape, view) == want.shape


@pytest.mark.parametrize("name", references.TORCH_MATRICES)
def test_torch_matrices_equal_the_flax_ones(name):
    pretrained, _ = references.flax_model(1)
    leaf = references.as_torch(pretrained)[name]
    matrix = tree.to_matrix(leaf, tree.matrix_view(name, leaf.shape, "torch"))
    np.testing.assert_array_equal(matrix, leaf.reshape(leaf.shape[0], -1))
    flax_name = name.replace(".", "/")
    suffix = "embedding" if "token" in name else "kernel"
    flax_name = flax_name.replace("weight", suffix)
    flax_leaf = pretrained[flax_name]
    flax_view = tree.matrix_view(flax_name, flax_leaf.shape, "flax")
    np.testing.assert_array_equal(matrix, tree.to_matrix(flax_leaf, flax_view))


def test_rules_match_whole_path_components():
    # "blockout/kernel" is no attention output, "position_embedding" is a table, "embeddings" is not.
    assert tree.matrix_view("blockout/kernel", (2, 3, 4)).output_axes == (2,)
    assert tree.matrix_view("blockout/kernel", (2, 3, 4)).input_axes == (1, 0)
    assert tree.matrix_view("out/kernel", (2, 3, 4)).input_axes == (0, 1)
    assert tree.matrix_view("my_query/kernel", (2, 3, 4)).output_axes == (2,)
    assert tree.matrix_view("embedding", (2, 3)).output_axes == (0,)
    assert tree.matrix_view("embedding/kernel", (2, 3)).output_axes == (1,)


VIEWS = st.integers(2, 4).flatmap(
    lambda ndim: st.tuples(
        st.permutations(range(ndim)),
        st.integers(1, ndim - 1),
        st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim),
    )
)


@given(VIEWS, st.lists(st.integers(1, 3), max_size=2))
def test_from_matrix_undoes_to_matrix(case, batch):
    axes, outputs, shape = case
    view = tree.MatrixView(tuple(axes[:outputs]), tuple(axes[outputs:]))
    leaf = np.arange(np.prod([*batch, *shape]), dtype=np.int32).reshape(*batch, *shape)
    matrix = tree.to_matrix(leaf, view)
    assert matrix.shape == (*batch, *tree.matrix_shape(shape, view))
    assert matrix.dtype == leaf.dtype
    np.testing.assert_array_equal(tree.from_matrix(matrix, view, shape), leaf)
    for index in itertools.product(*map(range, batch)):
        want = references.as_matrix(leaf[index], (tuple(axes), outputs))
        np.testing.assert_array_equal(matrix[index], want)


@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_leaves_below_two_axes_have_no_view(layout):
    assert tree.matrix_view("a/kernel", (), layout) is None
    assert tree.matrix_view("a/embedding", (4,), layout) is None


def test_matrix_view_rejects():
    with pytest.raises(ValueError, match=r"layout: got 'keras'.*flax"):
        tree.matrix_view("a", (2, 2), "keras")
    with pytest.raises(ValueError, match=r"video/kernel.*5 axes"):
        tree.matrix_view("video/kernel", (1, 2, 3, 4, 5))


@given(
    st.dictionaries(KEYS, st.integers(0, 3)), st.lists(st.integers(1, 4), min_size=4, max_size=4)
)
def test_groups_partition_the_leaves(keys, limits):
    groups = tree.groups(keys, lambda key: limits[key])
    assert sorted(itertools.chain(*groups)) == sorted(keys)
    for group in groups:
        assert len({keys[name] for name in group}) == 1
        assert len(group) <= limits[keys[group[0]]]
    for key in set(keys.values()):
        of_key = [name for name in keys if keys[name] == key]
        assert [n for group in groups if keys[group[0]] == key for n in group] == of_key
        assert sum(keys[group[0]] == key for group in groups) == -(-len(of_key) // limits[key])


@given(TREES, TREES)
def test_flatten_tells_trees_apart(one, other):
    assume(one != other)
    assert tree.flatten(one) != tree.flatten(other)
