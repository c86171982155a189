from fractions import Fraction
from math import ceil

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_dts
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set, host_peak
from hypothesis import strategies as st

from retex_jax.personalized import dts, thresholding, unseen


def _fit(pretrained, experts, layout="flax", **options):
    return dts.fit(expert_set(pretrained, experts, layout=layout), **options)


def _restore(values, scale="rms"):
    values = np.asarray(values, np.float64)
    groups = thresholding.pack(*thresholding.threshold(values, scale))
    groups = jax.tree.map(lambda array: array[None], groups)
    return np.asarray(thresholding.restore(groups, 0, values.shape[1]))


def test_thresholding_by_hand():
    # Positive: median 2.5, so {1, 2} and {3, 4}. Negative: median 2, so {1} and {3}; zero is small.
    values = [[1, 2, 3, 4, -1, 0, -3]]
    small, large = np.sqrt(2.5), np.sqrt(12.5)
    low = -np.sqrt(0.5)
    want = [[small, small, large, large, low, low, -3]]
    np.testing.assert_allclose(_restore(values), want, rtol=1e-6)
    want = [[1.5, 1.5, 3.5, 3.5, -0.5, -0.5, -3]]
    np.testing.assert_allclose(_restore(values, "mean"), want, rtol=1e-6)


def test_the_value_that_is_the_median_is_small_for_both_signs():
    values = [[1, 2, 9, -1, -2, -9]]
    small = np.sqrt(2.5)
    np.testing.assert_allclose(_restore(values), [[small, small, 9, -small, -small, -9]], rtol=1e-6)


def test_each_row_has_its_own_groups():
    values = np.array([[1.0, 2, -5, -8], [10, 20, 0, 0], [0, 0, 0, 0], [-3, -3, 3, 3]])
    np.testing.assert_allclose(_restore(values), values, rtol=1e-6)
    assert _restore(np.zeros((0, 4))).shape == (0, 4)


_VALUE = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-1e3, 1e3).filter(lambda value: value == 0 or abs(value) > 1e-6),
)
# Few lengths: each new shape costs a compilation.
_VALUES = st.sampled_from([1, 2, 7, 8, 21]).flatmap(
    lambda size: st.lists(_VALUE, min_size=size, max_size=size)
)


@hypothesis.given(_VALUES, st.sampled_from(["rms", "mean"]))
def test_thresholding_equals_the_reference(values, scale):
    found = _restore([values], scale)[0]
    np.testing.assert_allclose(found, references_dts.grouped(values, scale), rtol=1e-5, atol=1e-5)


@hypothesis.given(_VALUES)
def test_negated_values_give_negated_groups(values):
    values = [value or 1.0 for value in values]  # a zero has no sign to swap
    np.testing.assert_array_equal(_restore([values]), -_restore([np.negative(values)]))


@hypothesis.given(
    st.sampled_from([(1, 1), (1, 8), (1, 19), (2, 4), (3, 7), (5, 16)]), st.integers(0, 2**31)
)
def test_packing_keeps_every_bit(shape, seed):
    rows, size = shape
    rng = np.random.default_rng(seed)
    bits = rng.random((2, rows, size)) < 0.5
    magnitudes = rng.random((rows, 4)) + 0.5
    groups = thresholding.pack(bits, magnitudes)
    assert groups.planes.shape == (2, ceil(rows * size / 8))
    assert groups.planes.dtype == np.uint8
    found = thresholding.restore(jax.tree.map(lambda array: array[None], groups), 0, size)
    group = 2 * bits[0].astype(int) + bits[1]
    want = np.take_along_axis(np.float32(magnitudes), group, axis=1) * np.where(bits[0], 1, -1)
    np.testing.assert_array_equal(found, np.float32(want))


def test_mean_is_nearest():
    values = np.random.default_rng(0).normal(size=(1, 101))
    errors = {scale: np.sum((_restore(values, scale) - values) ** 2) for scale in ("rms", "mean")}
    assert errors["mean"] < errors["rms"]
    np.testing.assert_allclose(np.sum(_restore(values) ** 2), np.sum(values**2), rtol=1e-5)


def test_dts_by_hand():
    # u = (0.8, -0.6), v = (0.6, 0.8), sigma = 5: four values in four groups at most, so exact.
    matrix = 5 * np.outer([0.8, -0.6], [0.6, 0.8])
    pretrained = {"w": np.ones((2, 2), np.float32), "s": np.float32(1)}
    expert = {"w": np.float32(1 + matrix), "s": np.float32(3.5)}
    state = _fit(pretrained, [expert], "torch", rank_ratio=0.5)
    np.testing.assert_allclose(state.singular_values["w"], [[5]], rtol=1e-6)
    np.testing.assert_array_equal(state.left["w"].planes[0], [[0b10000000], [0]])
    np.testing.assert_array_equal(state.right["w"].planes[0], [[0b11000000], [0b01000000]])
    np.testing.assert_allclose(state.left["w"].magnitudes[0], [[0.6, 0, 0.8, 0]], rtol=1e-6)
    np.testing.assert_allclose(state.right["w"].magnitudes[0], [[0, 0, 0.6, 0.8]], rtol=1e-6)
    assert_close(dts.recover(state, 0), expert)
    # 2 * 2 planes of one byte, 8 magnitudes, one singular value; one scalar.
    assert dts.extra_bytes(state) == 4 + 32 + 4 + 4
    assert dts.paper_amr(state) == (3 * 4 + 32 * (8 + 1) + 32) / (32 * 5)
    assert dts.paper_amr(state, 2) == (2 * 4 + 32 * (8 + 1) + 32) / (32 * 5)


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("grouping", ["matrix", "vector"])
def test_task_variant_equals_the_reference(model, ratio, grouping):
    pretrained, experts = model
    scale = "rms" if ratio == 0.3 else "mean"
    state = _fit(pretrained, experts, rank_ratio=ratio, grouping=grouping, scale=scale)
    for task, expert in enumerate(experts):
        want = references_dts.dts(pretrained, expert, ratio, scale, grouping)
        assert_close(dts.recover(state, task), want)


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("grouping", ["matrix", "vector"])
@pytest.mark.parametrize(("scale", "levels"), [("rms", 1), ("mean", 1), ("none", 2), ("none", 1)])
def test_ablations_of_thresholding_and_scaling_equal_the_reference(model, grouping, scale, levels):
    pretrained, experts = model
    options = {"scale": scale, "levels": levels, "grouping": grouping}
    state = _fit(pretrained, experts, rank_ratio=0.3, **options)
    for task, expert in enumerate(experts):
        want = references_dts.dts(pretrained, expert, 0.3, **options)
        assert_close(dts.recover(state, task), want)
    both = _fit(pretrained, experts, rank_ratio=0.3, grouping=grouping)
    if levels == 1:  # a bit plane less
        assert dts.extra_bytes(state) < dts.extra_bytes(both)


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("levels", [1, 2])
def test_without_decomposition_equals_the_reference(model, levels):
    pretrained, experts = model
    state = _fit(pretrained, experts, decompose=False, levels=levels)
    assert not state.singular_values
    for task, expert in enumerate(experts):
        want = references_dts.dts(pretrained, expert, 1.0, levels=levels, decompose=False)
        assert_close(dts.recover(state, task), want)


def test_without_decomposition_one_experts_differences_are_held():
    model = {"a": np.random.default_rng(3).normal(size=(256, 256)).astype(np.float32)}
    _fit(model, [model] * 2, decompose=False)  # compiles
    state, peak = host_peak(lambda: _fit(model, [model] * 32, decompose=False))
    assert peak < 32 * model["a"].nbytes / 2
    assert state.num_tasks == 32


def test_defaults_are_those_of_the_paper():
    pretrained, experts = references.flax_model(2)
    found = dts.recover(_fit(pretrained, experts), 1)
    assert_close(found, references_dts.dts(pretrained, experts[1], 0.3, "rms", "matrix"))


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_ties_and_zeros(num_tasks):
    # Leaves of one axis tie and have zeros; rows and columns that no expert trained are 0.
    pretrained, experts = references.grid_model(num_tasks)
    rng = np.random.default_rng(3)
    for expert in experts:
        for name in ("dense/kernel", "token/embedding"):
            noise = 0.1 * rng.normal(size=pretrained[name].shape)
            noise[rng.random(len(noise)) < 0.4] = 0
            noise[:, 2] = 0
            expert[name] = np.float32(pretrained[name] + noise)
        expert["second/kernel"] = pretrained["second/kernel"]
    for grouping in ("matrix", "vector"):
        state = _fit(pretrained, experts, grouping=grouping, rank_ratio=0.5)
        for task, expert in enumerate(experts):
            want = references_dts.dts(pretrained, expert, 0.5, "rms", grouping)
            assert_close(dts.recover(state, task), want)


def test_vectors_of_no_energy_have_no_part_in_the_groups():
    rng = np.random.default_rng(2)
    low = rng.integers(-4, 5, (12, 2)) @ rng.integers(-4, 5, (2, 10)) / 8
    pretrained = {"w": np.zeros((12, 10), np.float32)}
    expert = {"w": low.astype(np.float32)}
    for grouping in ("matrix", "vector"):
        few, many = (
            references.flat(
                dts.recover(_fit(pretrained, [expert], rank_ratio=r, grouping=grouping), 0)
            )
            for r in (0.2, 1.0)
        )
        np.testing.assert_allclose(many["w"], few["w"], rtol=1e-6, atol=1e-6)


def test_the_sign_of_a_pair_is_of_no_account_to_groups_of_vectors():
    rng = np.random.default_rng(4)
    left, values, right = np.linalg.svd(rng.normal(size=(9, 7)), full_matrices=False)
    signs = np.array([1, -1, -1, 1, -1, 1, -1])

    def approximation(left, right, rows):
        factors = [_restore(side.reshape(rows, -1)).reshape(side.shape) for side in (left, right)]
        return (factors[0].T * values) @ factors[1]

    pairs = (left.T, right), (left.T * signs[:, None], right * signs[:, None])
    found = [approximation(*pair, rows=7) for pair in pairs]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    found = [approximation(*pair, rows=1) for pair in pairs]
    assert np.abs(found[0] - found[1]).max() > 1e-3  # so the sign is chosen


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize(
    ("base", "options"),
    [(None, None), ("ties", {"density": 0.5}), ("weight_average", None)],
)
def test_difference_variant_equals_the_reference(num_tasks, base, options):
    pretrained, experts = references.few_leaves(num_tasks)
    state = _fit(pretrained, experts, variant="difference", base=base, base_options=options)
    size = sum(leaf.size for leaf in pretrained.values() if references.is_float(leaf))
    if base == "weight_average":
        assert_close(state.base, references.weight_average(pretrained, experts))
    else:
        keep = int((options or {"density": 0.2})["density"] * size)
        assert_close(state.base, references.ties(pretrained, experts, keep))
    start = references.flat(state.base)
    for task, expert in enumerate(experts):
        assert_close(dts.recover(state, task), references_dts.dts(start, expert, 0.3))


def test_one_task_over_the_weight_average_is_the_expert():
    pretrained, experts = references.flax_model(1)
    state = _fit(pretrained, experts, variant="difference", base="weight_average")
    assert_close(dts.recover(state, 0), experts[0], 1e-6, 1e-6)


def test_difference_variant_does_without_the_pretrained_model():
    pretrained, experts = references.few_leaves(2)
    states = [
        _fit(start, experts, variant="difference", base="weight_average")
        for start in (pretrained, experts[0])
    ]
    for found, want in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(found, want)


def test_no_difference_gives_the_base():
    pretrained, _ = references.flax_model(1)
    for grouping in ("matrix", "vector"):
        state = _fit(pretrained, [pretrained] * 2, grouping=grouping)
        for name, leaf in references.flat(dts.recover(state, 1)).items():
            np.testing.assert_array_equal(leaf, pretrained[name])


def test_order_of_tasks_does_not_matter():
    pretrained, experts = references.few_leaves(8)
    order = (2, 0, 3, 1, 7, 5, 6, 4)
    first = _fit(pretrained, experts)
    second = _fit(pretrained, [experts[task] for task in order])
    for place, task in enumerate(order):
        found = references.flat(dts.recover(second, place))
        for name, want in references.flat(dts.recover(first, task)).items():
            np.testing.assert_array_equal(found[name], want)


def test_chunks_do_not_matter():
    pretrained, experts = references.few_leaves(2)
    first, second = _fit(pretrained, experts, group_bytes=1), _fit(pretrained, experts)
    for task in range(2):
        assert_close(dts.recover(first, task), references.flat(dts.recover(second, task)))


def _count(pretrained, ratio, grouping, levels=2):
    """(bytes stored for a task, thresholded elements, other numbers, parameters)."""
    stored = elements = numbers = parameters = 0
    for name, leaf in pretrained.items():
        if not references.is_float(leaf):
            continue
        parameters += leaf.size
        if name in references.FLAX_MATRICES:
            sides = references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
            rank = references_dts.kept_rank(sides, ratio)
            sets = rank if grouping == "vector" else 1
            numbers += rank + 8 * sets
            stored += 4 * (rank + 8 * sets)
            for side in sides:
                elements += rank * side
                stored += levels * ceil(rank * side / 8)
        elif leaf.ndim:
            numbers += 4
            elements += leaf.size
            stored += 16 + levels * ceil(leaf.size / 8)
        else:
            numbers += 1
            stored += 4
    return stored, elements, numbers, parameters


@pytest.mark.parametrize("grouping", ["matrix", "vector"])
def test_bytes_and_the_papers_accounting(grouping):
    pretrained, experts = references.flax_model(2)
    state = _fit(pretrained, experts, grouping=grouping, rank_ratio=0.4)
    stored, elements, numbers, parameters = _count(pretrained, 0.4, grouping)
    assert dts.extra_bytes(state) == 2 * stored
    for bits in (3, 2):
        want = (bits * elements / 32 + numbers) / parameters
        assert dts.paper_amr(state, bits) == pytest.approx(want, rel=1e-12)
    assert dts.paper_amr(state) == dts.paper_amr(state, 3)


@pytest.mark.parametrize("grouping", ["matrix", "vector"])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 5.0])
def test_the_budget_is_used_and_kept(grouping, levels, share):
    pretrained, experts = references.flax_model(2)
    kept = {"grouping": grouping, "levels": levels}
    budget = share * _count(pretrained, 1, **kept)[0]
    model_bytes = sum(leaf.nbytes for leaf in pretrained.values())
    ratios = {Fraction(rank, side) for side in (1, 5, 6, 9, 10) for rank in range(1, side + 1)}
    counts = {ratio: _count(pretrained, ratio, **kept)[0] for ratio in ratios}
    fitting = [ratio for ratio in ratios if counts[ratio] <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="bytes_per_task, amr: leave"):
            _fit(pretrained, experts, **kept, bytes_per_task=budget)
        return
    for options in ({"bytes_per_task": budget}, {"amr": budget / model_bytes}):
        state = _fit(pretrained, experts, **kept, **options)
        assert dts.extra_bytes(state) == 2 * counts[max(fitting)]


@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_shapes_dtypes_and_buffers(layout):
    pretrained, experts = references.flax_model(2)
    if layout == "torch":
        pretrained, *experts = [
            {key.replace(".", "/"): leaf for key, leaf in references.as_torch(model).items()}
            for model in (pretrained, *experts)
        ]
    pretrained["big"] = np.array([2**40, -(2**40) - 1], np.int64)
    for expert in experts:
        expert["big"] = pretrained["big"] + 1
    state = _fit(pretrained, experts, layout)
    for found in (dts.recover(state, 1), dts.mix(state, jnp.array([0.5, 0.5]))):
        for name, leaf in references.flat(found).items():
            assert leaf.shape == pretrained[name].shape
            assert leaf.dtype == pretrained[name].dtype
            if not references.is_float(leaf):
                np.testing.assert_array_equal(leaf, pretrained[name])


def test_torch_layout_gives_the_same_model():
    flax = references.flax_model(2)
    torch = [
        {key.replace(".", "/"): leaf for key, leaf in references.as_torch(model).items()}
        for model in (flax[0], *flax[1])
    ]
    state, twin = _fit(torch[0], torch[1:], "torch"), _fit(*flax)
    for task in range(2):
        want = references.as_torch(references.flat(dts.recover(twin, task)))
        assert_close(
            dts.recover(state, task), {key.replace(".", "/"): leaf for key, leaf in want.items()}
        )


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    found = dts.recover(_fit(pretrained, experts), 1)
    for name, leaf in references.flat(found).items():
        assert leaf.dtype == pretrained[name].dtype
    want = references_dts.dts(pretrained, experts[1], 0.3)
    assert_close(found, want, rtol=step, atol=1e-5)


def test_float64_is_stored_as_float32():
    pretrained, experts = references.few_leaves(2, dtype=np.float64)
    found = dts.recover(_fit(pretrained, experts), 1)
    for leaf in references.flat(found).values():
        assert leaf.dtype != np.float64
    start = {
        name: np.float32(leaf) if references.is_float(leaf) else leaf
        for name, leaf in pretrained.items()
    }
    assert_close(found, references_dts.dts(start, experts[1], 0.3))


def test_mix():
    pretrained, experts = references.few_leaves(2)
    state = _fit(pretrained, experts)
    first, second = (references_dts.dts(pretrained, expert, 0.3) for expert in experts)
    want = {
        name: start + 0.75 * (first[name] - start) + 0.25 * (second[name] - start)
        if references.is_float(start)
        else start
        for name, start in pretrained.items()
    }
    assert_close(dts.mix(state, jnp.array([0.75, 0.25])), want)
    assert_close(dts.mix(state, np.array([0.0, 1.0])), references.flat(dts.recover(state, 1)))
    assert_close(dts.mix(state, np.zeros(2)), pretrained)


def test_similarity_weights_by_hand():
    seen = np.array([[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])
    found = unseen.similarity_weights(np.array([5.0, 0.0]), seen)  # cosines 1, 0.6 and -1
    np.testing.assert_allclose(found, [0.625, 0.375, 0], rtol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones(3), np.ones((2, 2)), r"unseen, seen: got \(3,\), \(2, 2\)"),
        (np.ones(2), np.ones(2), "unseen, seen: got"),
        (np.ones(2), np.zeros((1, 2)), "a vector that is 0 or not finite"),
        (np.array([np.nan, 1]), np.ones((1, 2)), "a vector that is 0 or not finite"),
        (np.ones(2), -np.ones((2, 2)), "no embedding has a positive cosine"),
    ],
)
def test_bad_embeddings(first, second, message):
    with pytest.raises(ValueError, match=message):
        unseen.similarity_weights(first, second)


@pytest.mark.parametrize("grouping", ["matrix", "vector"])
def test_a_traced_task_and_eager_are_equal(grouping):
    state = _fit(*references.few_leaves(2), grouping=grouping)
    want = references.flat(dts.recover(state, 1))
    assert_close(jax.jit(dts.recover)(state, 1), want, 1e-6, 1e-6)
    with jax.disable_jit():
        assert_close(dts.recover(state, 1), want, 1e-6, 1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b/kernel": (3, 3, 4, 16), "c": (), "d": (8,)}
    pretrained = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    experts = [
        {key: np.float32(leaf + 0.1 * rng.normal(size=leaf.shape)) for key, leaf in items}
        for items in [pretrained.items()] * 2
    ]
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    for options in ({}, {"variant": "difference", "base": "weight_average"}):
        found = dts.recover(_fit(sharded[0], sharded[1:], **options), 1)
        want = dts.recover(_fit(pretrained, experts, **options), 1)
        assert_close(found, references.flat(want))
        kernel = found["a"]["kernel"]
        assert kernel.sharding.is_equivalent_to(sharded[0]["a/kernel"].sharding, kernel.ndim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "t"}, "variant: got 't', expected 'task' or 'difference'"),
        ({"base": "ties"}, "base: got 'ties', expected none for variant 'task'"),
        ({"scale": "max", "grouping": "row"}, r"(?s)scale: got 'max'.*grouping: got 'row'"),
        ({"levels": 3, "scale": "max"}, "(?s)scale: got 'max'.*levels: got 3, expected 1 or 2"),
        ({"decompose": False, "amr": 0.1}, "amr: got 0.1, expected none without decomposition"),
        ({"variant": "difference", "base": "tise"}, "base: got 'tise', .*did you mean 'ties'"),
        ({"base_options": {"density": 1.0}}, "base_options: got"),
        ({"rank_ratio": 0.0}, "rank_ratio: got 0.0"),
        ({"rank_ratio": 1.01}, "rank_ratio: got 1.01"),
        ({"amr": 0.1, "bytes_per_task": 10}, "bytes_per_task, amr: got 2 of"),
        ({"amr": 1e-6}, "bytes_per_task, amr: leave -"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(1), **options)


def test_bad_task_and_weights():
    state = _fit(*references.few_leaves(2))
    for task in (-1, 2):
        with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 1"):
            dts.recover(state, task)
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\)"):
        dts.mix(state, jnp.ones(3))
