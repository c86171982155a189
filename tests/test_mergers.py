import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set, host_peak

import retex_jax as rtx
from retex_jax import buffers
from retex_jax import experts as experts_module
from retex_jax.mergers import leafwise, ties

MERGERS = {
    "weight_average": {},
    "task_arithmetic": {"scaling": 0.4},
    "ties": {"density": 0.3},
}


def _merge(name, pretrained, experts, **options):
    return references.flat(rtx.METHODS[name].fit(expert_set(pretrained, experts), **options))


def _size(pretrained):
    return sum(leaf.size for leaf in pretrained.values() if references.is_float(leaf))


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_weight_average(model):
    pretrained, experts = model
    assert_close(
        _merge("weight_average", pretrained, experts),
        references.weight_average(pretrained, experts),
    )


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("scaling", [0.3, 1.0, -0.5])
def test_task_arithmetic(model, scaling):
    pretrained, experts = model
    assert_close(
        _merge("task_arithmetic", pretrained, experts, scaling=scaling),
        references.task_arithmetic(pretrained, experts, scaling),
    )


def test_task_arithmetic_defaults_to_0_3_and_averages_at_one_over_t():
    pretrained, experts = references.few_leaves(8)
    assert_close(
        _merge("task_arithmetic", pretrained, experts),
        references.task_arithmetic(pretrained, experts, 0.3),
    )
    assert_close(
        _merge("task_arithmetic", pretrained, experts, scaling=1 / 8),
        references.weight_average(pretrained, experts),
    )


@pytest.mark.parametrize(
    "model",
    [*MODELS, *map(references.grid_model, (1, 2, 8))],
    ids=[*MODEL_IDS, "1 task, ties", "2 tasks, ties", "8 tasks, ties"],
)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.75, 1.0])
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_ties(model, density, merge):
    # The grid models have hundreds of entries that tie in magnitude, that are 0 and that cancel.
    pretrained, experts = model
    keep = max(1, int(density * _size(pretrained)))
    want = references.ties(pretrained, experts, keep, merge, scaling=0.7)
    found = _merge("ties", pretrained, experts, density=density, merge=merge, scaling=0.7)
    assert_close(found, want)


def test_ties_default_scalings():
    pretrained, experts = references.few_leaves(8)
    keep = int(0.2 * _size(pretrained))
    for merge, scaling in (("mean", 1.0), ("sum", 0.3)):
        want = references.ties(pretrained, experts, keep, merge, scaling)
        assert_close(_merge("ties", pretrained, experts, merge=merge), want)


def test_ties_by_hand():
    pretrained = {"a": np.zeros(3, np.float32), "b": np.zeros((1, 2), np.float32)}
    # Of five entries two are kept: 4 and the three 2s; then 5 and -3; signs + - 0 and -.
    experts = [
        {"a": np.float32([4, 2, -2]), "b": np.float32([[0, 2]])},
        {"a": np.float32([5, -3, 2]), "b": np.float32([[1, -1]])},
    ]
    found = _merge("ties", pretrained, experts, density=0.4)
    # Column sums 9, -1, -2, 0, 2; sum of signs +1 - 1 - 1 + 0 + 1 = 0: the fourth has no values.
    np.testing.assert_array_equal(found["a"], [4.5, -3, -2])
    np.testing.assert_array_equal(found["b"], [[0, 2]])


@pytest.mark.parametrize(
    ("rest", "want"),
    [([3, 3], 1.0), ([-3, -3], -1.0), ([3, -3], -1.0)],
)
def test_a_zero_sum_takes_the_majority_sign(rest, want):
    pretrained = {"a": np.zeros(3, np.float32), "b": np.zeros((1, 2), np.float32)}
    experts = [{"a": np.float32([sign, 0, 0]), "b": np.float32([rest])} for sign in (1, -1)]
    assert _merge("ties", pretrained, experts, density=1.0)["a"][0] == want


def test_trimming_is_global_over_leaves():
    pretrained = {"a": np.zeros(3, np.float32), "b": np.zeros((1, 2), np.float32)}
    expert = {"a": np.float32([1, 2, 3]), "b": np.float32([[10, 20]])}
    found = _merge("ties", pretrained, [expert, expert], density=0.4)
    np.testing.assert_array_equal(found["a"], 0)
    np.testing.assert_array_equal(found["b"], expert["b"])


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("spread", ["one", "wide", "grid", "zeros"])
def test_thresholds_are_exact(density, spread):
    rng = np.random.default_rng(5)
    values = rng.normal(size=(3, 257)).astype(np.float32)
    if spread == "wide":  # up to 2^120 and down to 2^-120: all exponents
        values *= np.exp2(rng.integers(-120, 120, values.shape)).astype(np.float32)
    elif spread == "grid":
        values = np.round(values)
    elif spread == "zeros":
        values *= rng.random(values.shape) < 0.1
    pretrained = {"a": np.zeros((7, 20), np.float32), "b": np.zeros(117, np.float32)}
    experts = [{"a": row[:140].reshape(7, 20), "b": row[140:]} for row in values]
    found = ties.thresholds(expert_set(pretrained, experts), density)
    keep = max(1, int(density * 257))
    want = -np.sort(-np.abs(values), axis=1)[:, keep - 1]
    np.testing.assert_array_equal(found, want)
    assert found.dtype == np.float32


@pytest.mark.parametrize("first", [0, 1000])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_thresholds_are_exact_where_the_sample_misleads(density, first, monkeypatch):
    monkeypatch.setattr(ties, "_SAMPLE", 1000)
    rng = np.random.default_rng(6)
    values = rng.normal(size=(2, 8000)).astype(np.float32)
    values[0, ::8] = first  # all of what the sample sees
    pretrained = {"a": np.zeros(8000, np.float32)}
    want = -np.sort(-np.abs(values), axis=1)[:, int(density * 8000) - 1]
    for tasks in (1, 2):
        experts = [{"a": row} for row in values[:tasks]]
        found = ties.thresholds(expert_set(pretrained, experts), density)
        np.testing.assert_array_equal(found, want[:tasks])


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("part", [512, 4096])
def test_thresholds_are_exact_with_few_bins(density, part, monkeypatch):
    """Patterns are found in several rounds, and counted in several portions of each, or in one with the last part."""
    monkeypatch.setattr(ties, "_BINS", 128)
    monkeypatch.setattr(experts_module, "PART_SIZES", (part,))
    values = np.random.default_rng(7).normal(size=(3, 4000)).astype(np.float32)
    experts = [{"a": row} for row in values]
    found = ties.thresholds(expert_set({"a": np.zeros(4000, np.float32)}, experts), density)
    want = -np.sort(-np.abs(values), axis=1)[:, int(density * 4000) - 1]
    np.testing.assert_array_equal(found, want)


def test_thresholds_of_many_tasks_take_little_memory(monkeypatch):
    """Of a sample that misleads, half of all patterns are between the brackets."""
    monkeypatch.setattr(ties, "_SAMPLE", 64)
    monkeypatch.setattr(ties, "_ALL_BINS", 1 << 15)
    monkeypatch.setattr(experts_module, "PART_SIZES", (1 << 12,))
    size = 1 << 17
    values = np.random.default_rng(9).normal(size=(8, size)).astype(np.float32)
    made = expert_set({"a": np.zeros(size, np.float32)}, [{"a": row} for row in values])
    found, peak = host_peak(lambda: ties.thresholds(made, 0.2))
    want = -np.sort(-np.abs(values), axis=1)[:, int(0.2 * size) - 1]
    np.testing.assert_array_equal(found, want)
    assert peak < values.nbytes / 2


@pytest.mark.parametrize("options", [{}, {"merge": "sum"}])
def test_a_sample_does_not_change_ties(options, monkeypatch):
    pretrained, experts = references.grid_model(8)
    want = _merge("ties", pretrained, experts, **options)
    monkeypatch.setattr(ties, "_SAMPLE", 64)
    assert_close(_merge("ties", pretrained, experts, **options), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("model", [references.few_leaves, references.grid_model])
def test_parts_do_not_change_the_result(name, dtype, model, monkeypatch):
    pretrained, experts = (
        references.few_leaves(8, dtype=dtype) if model is references.few_leaves else model(8)
    )
    want = _merge(name, pretrained, experts, **MERGERS[name])
    monkeypatch.setattr(experts_module, "PART_SIZES", (16,))
    parts = expert_set(pretrained, experts).parts("dense/kernel")
    assert len(parts) > 1
    found = _merge(name, pretrained, experts, **MERGERS[name])
    for leaf in want:
        assert found[leaf].dtype == want[leaf].dtype
    assert_close(found, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MERGERS)
def test_an_error_in_a_part_is_raised(name, monkeypatch):
    experts = expert_set(*references.few_leaves(2))
    for name_of in ("stacked", "task_vectors"):
        monkeypatch.setattr(type(experts), name_of, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rtx.METHODS[name].fit(experts, **MERGERS[name])


@pytest.mark.parametrize("name", MERGERS)
def test_order_of_tasks_does_not_matter(name):
    for model in (references.few_leaves, references.grid_model):
        pretrained, experts = model(8)
        first = _merge(name, pretrained, experts, **MERGERS[name])
        second = _merge(
            name, pretrained, [experts[t] for t in (2, 0, 3, 1, 7, 5, 6, 4)], **MERGERS[name]
        )
        assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_scaling_0_gives_the_pretrained_model(name):
    pretrained, experts = references.few_leaves(8)
    found = _merge(name, pretrained, experts, scaling=0.0)
    for leaf in pretrained:
        np.testing.assert_array_equal(found[leaf], pretrained[leaf])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("weight_average", {}),
        ("task_arithmetic", {"scaling": 1.0}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "merge": "sum", "scaling": 1.0}),
    ],
)
def test_one_task_gives_the_expert(name, options):
    pretrained, experts = references.few_leaves(1)
    assert_close(_merge(name, pretrained, experts, **options), experts[0], 1e-6, 1e-6)


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_shapes_dtypes_and_buffers(name, layout):
    pretrained, experts = references.flax_model(2)
    if layout == "torch":
        pretrained, *experts = [
            {key.replace(".", "/"): leaf for key, leaf in references.as_torch(model).items()}
            for model in (pretrained, *experts)
        ]
    for expert in experts:  # the pretrained model's buffers are kept, never averaged
        for key, leaf in expert.items():
            if not references.is_float(leaf):
                expert[key] = (leaf + 1).astype(leaf.dtype)
    found = rtx.METHODS[name].fit(expert_set(pretrained, experts, layout=layout))
    found = references.flat(found)
    assert set(found) == set(pretrained)
    for key, leaf in pretrained.items():
        assert found[key].shape == leaf.shape
        assert found[key].dtype == leaf.dtype
        if not references.is_float(leaf):
            np.testing.assert_array_equal(found[key], leaf)


@pytest.mark.parametrize("name", MERGERS)
def test_wide_integer_buffers_are_kept(name):
    big = np.array([2**40, -(2**40) - 1], np.int64)
    pretrained = {"a": np.ones((2, 3), np.float32), "big": big}
    found = _merge(name, pretrained, [pretrained])
    np.testing.assert_array_equal(found["big"], big)
    assert found["big"].dtype == np.int64


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(name, dtype, step):
    pretrained, experts = references.few_leaves(8, dtype=dtype)
    found = _merge(name, pretrained, experts, **MERGERS[name])
    if name == "weight_average":
        want = references.weight_average(pretrained, experts)
    elif name == "task_arithmetic":
        want = references.task_arithmetic(pretrained, experts, 0.4)
    else:
        want = references.ties(pretrained, experts, int(0.3 * _size(pretrained)))
    for key in pretrained:
        assert found[key].dtype == pretrained[key].dtype
    assert_close(found, want, rtol=step, atol=1e-6)  # rounded once, at the end


@pytest.mark.parametrize("name", MERGERS)
def test_float64_is_stored_as_float32(name):
    pretrained, experts = references.few_leaves(2, dtype=np.float64)
    found = _merge(name, pretrained, experts, **MERGERS[name])
    for key, leaf in found.items():
        assert leaf.dtype == (np.float32 if references.is_float(leaf) else pretrained[key].dtype)
    if name == "weight_average":
        assert_close(found, references.weight_average(pretrained, experts))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_scaling_must_be_finite(name, bad):
    with pytest.raises(ValueError, match="scaling: got"):
        _merge(name, *references.few_leaves(1), scaling=bad)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, 20, np.nan])
def test_density_must_be_a_fraction(density):
    with pytest.raises(ValueError, match="density: got"):
        _merge("ties", *references.few_leaves(1), density=density)


def test_unknown_merge():
    with pytest.raises(ValueError, match="merge: got 'max'"):
        _merge("ties", *references.few_leaves(1), merge="max")


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["in parts", "whole"])
def test_more_tasks_than_are_unrolled(place):
    pretrained, experts = references.few_leaves(2 * leafwise._MOST_UNROLLED + 3)
    made = expert_set(*jax.tree.map(place, (pretrained, experts)))
    size = sum(leaf.size for leaf in pretrained.values() if references.is_float(leaf))
    wanted = {
        "weight_average": ({}, references.weight_average(pretrained, experts)),
        "task_arithmetic": (
            {"scaling": 0.01},
            references.task_arithmetic(pretrained, experts, 0.01),
        ),
        "ties": ({"density": 0.3}, references.ties(pretrained, experts, int(0.3 * size))),
    }
    for name, (options, want) in wanted.items():
        assert_close(rtx.METHODS[name].fit(made, **options), want)


@pytest.mark.parametrize("name", ["weight_average", "task_arithmetic"])
def test_parts_are_added_before_their_memory_is_read_into_again(name, monkeypatch):
    """Of parts that are not padded, JAX adds the very memory that the next experts are read into."""
    monkeypatch.setattr(leafwise, "_MOST_UNROLLED", 4)
    size = leafwise.PART_SIZES[0]
    monkeypatch.setattr(experts_module, "PART_SIZES", (size,))
    rng = np.random.default_rng(8)
    pretrained, *experts = [
        {"a": rng.integers(-8, 9, 40 * size).astype(np.float32)} for _ in range(1 + 40)
    ]
    options = MERGERS[name]
    want = getattr(references, name)(pretrained, experts, **options)
    assert_close(_merge(name, pretrained, experts, **options), want)


@pytest.mark.parametrize(
    ("size", "want"),
    [(1, 1 << 12), (1 << 12, 1 << 12), ((1 << 15) + 1, 1 << 18), ((1 << 18) + 1, (1 << 18) + 1)],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_padded_parts(size, want, dtype):
    values = np.arange(1, 1 + 2 * size).reshape(2, size).astype(dtype)
    longer = leafwise.padded(values, slice(0, size))
    assert longer.shape == (2, want) and longer.dtype == dtype
    np.testing.assert_array_equal(longer[:, :size], values)
    assert not np.asarray(longer[:, size:]).any()
    assert leafwise.padded(values, None) is values


def test_parts_are_not_copied_where_nothing_is_added():
    stack = buffers.scratch(3, 1 << 18)
    stack[:] = 1.5
    placed = leafwise.padded(stack, slice(0, 1 << 18))
    assert placed.unsafe_buffer_pointer() == stack.ctypes.data


def test_leaf_functions_under_jit_equal_eager():
    pretrained, experts = references.grid_model(8)
    start = jnp.asarray(pretrained["dense/kernel"])
    stack = jnp.stack([expert["dense/kernel"] for expert in experts])
    limits = jnp.linspace(0, 0.5, 8, dtype=jnp.float32)
    calls = [
        lambda: leafwise.sum_over_tasks(stack),
        lambda: leafwise.sum_over_tasks(jnp.tile(stack, (5, 1, 1))),
        lambda: ties.trim(stack - start, limits),
        lambda: ties.elect_signs(stack - start, -1.0),
        lambda: ties.disjoint_merge(stack - start, jnp.sign(start), "mean"),
        lambda: ties.disjoint_merge(stack - start, jnp.sign(start), "sum"),
    ]
    for call in calls:
        compiled = call()
        with jax.disable_jit():
            np.testing.assert_allclose(compiled, call(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MERGERS)
def test_merging_twice_is_bitwise_equal(name):
    pretrained, experts = references.few_leaves(8)
    first = _merge(name, pretrained, experts, **MERGERS[name])
    second = _merge(name, pretrained, experts, **MERGERS[name])
    for leaf in first:
        np.testing.assert_array_equal(first[leaf], second[leaf])


@pytest.mark.parametrize("name", MERGERS)
def test_sharded_equals_one_device(name, place_on_8_devices):
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b/kernel": (3, 3, 4, 16), "c": ()}
    pretrained = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    experts = [
        {
            key: leaf + np.float32(0.1 * rng.normal(size=leaf.shape))
            for key, leaf in pretrained.items()
        }
        for _ in range(2)
    ]
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    assert len(sharded[1]["a/kernel"].sharding.device_set) == 8
    assert not sharded[1]["a/kernel"].sharding.is_fully_replicated
    found = _merge(name, sharded[0], sharded[1:], **MERGERS[name])
    assert_close(found, _merge(name, pretrained, experts, **MERGERS[name]))
    merged = rtx.METHODS[name].fit(expert_set(sharded[0], sharded[1:]), **MERGERS[name])
    kernel = merged["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(sharded[0]["a/kernel"].sharding, kernel.ndim)
