from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_dts
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set

from retex_jax.personalized import low_rank, svd


def _fit(pretrained, experts, layout="flax", **options):
    return svd.fit(expert_set(pretrained, experts, layout=layout), **options)


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 5}, {"rank_ratio": 0.3}])
@pytest.mark.parametrize("base", [None, "task_arithmetic"])
def test_equals_the_reference(model, options, base):
    pretrained, experts = model
    state = _fit(pretrained, experts, base=base, **options)
    start = pretrained if base is None else references.task_arithmetic(pretrained, experts, 0.3)
    assert_close(state.base, start)
    for task, expert in enumerate(experts):
        want = references_dts.svd_baseline(
            start, expert, options.get("rank"), options.get("rank_ratio")
        )
        assert_close(svd.recover(state, task), want)


def test_by_hand():
    # [[3, 0], [0, 4]] kept to its larger singular value; the vector is kept as it is.
    pretrained = {"w": np.ones((2, 2), np.float32), "v": np.zeros(2, np.float32)}
    expert = {"w": np.float32([[4, 1], [1, 5]]), "v": np.float32([1, -7])}
    found = svd.recover(_fit(pretrained, [expert], rank=1), 0)
    assert_close(found, {"w": np.array([[1, 1], [1, 5]]), "v": np.array([1, -7])})


@pytest.mark.parametrize(("a", "b"), [(9, 9), (12, 5), (5, 12), (1, 6), (6, 1)])
def test_truncated_svd(a, b):
    matrices = np.random.default_rng(0).normal(size=(3, a, b))
    rank = min(a, b, 4)
    with jax.enable_x64(True):
        found = jax.device_get(low_rank.truncated_svd(jnp.asarray(matrices), rank))
    for index, matrix in enumerate(matrices):
        left, values, right = references_dts.svd(matrix, rank)
        np.testing.assert_allclose(found.values[index], values, rtol=1e-10)
        np.testing.assert_allclose(found.left[index].T, left, atol=1e-10)
        np.testing.assert_allclose(found.right[index], right, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_vectors_without_energy_are_zero(shape):
    rng = np.random.default_rng(1)
    low = rng.normal(size=(shape[0], 2)) @ rng.normal(size=(2, shape[1]))
    with jax.enable_x64(True):
        found = low_rank.truncated_svd(jnp.asarray(np.stack([low, 0 * low])), 4)
    for part in found:
        assert np.all(np.asarray(part[0, :2]).any(axis=-1))
        np.testing.assert_array_equal(part[0, 2:], 0)
        np.testing.assert_array_equal(part[1], 0)


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_full_rank_gives_the_experts_and_stores_no_factors(model):
    pretrained, experts = model
    for options in ({"rank": 1000}, {"rank_ratio": 1.0}):
        state = _fit(pretrained, experts, **options)
        assert not state.left
        for task, expert in enumerate(experts):
            assert_close(svd.recover(state, task), expert, 1e-6, 1e-6)


def test_no_difference_gives_the_base():
    pretrained, _ = references.flax_model(1)
    state = _fit(pretrained, [pretrained, pretrained], rank=3)
    for name, leaf in references.flat(svd.recover(state, 1)).items():
        np.testing.assert_array_equal(leaf, pretrained[name])


def test_order_of_tasks_does_not_matter():
    pretrained, experts = references.few_leaves(8)
    order = (2, 0, 3, 1, 7, 5, 6, 4)
    first = _fit(pretrained, experts, rank=3)
    second = _fit(pretrained, [experts[task] for task in order], rank=3)
    for place, task in enumerate(order):
        found, want = (
            references.flat(svd.recover(*pair)) for pair in ((second, place), (first, task))
        )
        for name in want:
            np.testing.assert_array_equal(found[name], want[name])


def test_chunks_do_not_matter():
    pretrained, experts = references.few_leaves(2)
    calls = []
    first = _fit(
        pretrained, experts, rank=3, group_bytes=1, progress=lambda *done: calls.append(done)
    )
    assert calls == [(done, 6) for done in range(1, 7)]
    second = _fit(pretrained, experts, rank=3)
    for task in range(2):
        assert_close(svd.recover(first, task), references.flat(svd.recover(second, task)))


def _bytes(pretrained, ranks):
    total = 0
    for name, leaf in pretrained.items():
        if not references.is_float(leaf):
            continue
        if name not in ranks:
            total += 4 * leaf.size
        else:
            shape = references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
            whole = ranks[name] >= min(shape)
            total += 4 * (leaf.size if whole else ranks[name] * sum(shape))
    return total


def _ranks(pretrained, ratio):
    return {
        name: references_dts.kept_rank(references.as_matrix(pretrained[name], view).shape, ratio)
        for name, view in references.FLAX_MATRICES.items()
        if name in pretrained
    }


def test_bytes_are_those_stored():
    pretrained, experts = references.flax_model(2)
    state = _fit(pretrained, experts, rank_ratio=0.3)
    assert svd.extra_bytes(state) == 2 * _bytes(pretrained, _ranks(pretrained, 0.3))


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8, 1.2, 2.0])
def test_the_budget_is_used_and_kept(share):
    pretrained, experts = references.flax_model(2)
    ratios = {Fraction(rank, side) for side in (1, 5, 6, 9, 10) for rank in range(1, side + 1)}
    everything = _bytes(pretrained, {})
    model_bytes = sum(leaf.nbytes for leaf in pretrained.values())
    fitting = [
        ratio
        for ratio in ratios
        if _bytes(pretrained, _ranks(pretrained, ratio)) <= share * everything
    ]
    want = _bytes(pretrained, _ranks(pretrained, max(fitting)))
    for options in (
        {"bytes_per_task": share * everything},
        {"amr": share * everything / model_bytes},
    ):
        state = _fit(pretrained, experts, **options)
        assert svd.extra_bytes(state) == 2 * want


def test_the_default_stores_as_much_as_dts():
    pretrained = {"w": np.zeros((160, 320), np.float32)}
    expert = {"w": np.random.default_rng(0).normal(size=(160, 320)).astype(np.float32)}
    state = _fit(pretrained, [expert])
    assert state.left["w"].shape == (1, 320, 3)  # a Flax kernel is (b, a); floor(0.01875 * 160) = 3
    assert svd.extra_bytes(state) == 4 * 3 * 480


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
    state = _fit(pretrained, experts, layout, rank=2)
    for found in (svd.recover(state, 1), svd.mix(state, jnp.array([0.5, 0.5]))):
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
    state, twin = _fit(torch[0], torch[1:], "torch", rank=3), _fit(*flax, rank=3)
    for task in range(2):
        want = references.as_torch(references.flat(svd.recover(twin, task)))
        assert_close(
            svd.recover(state, task), {key.replace(".", "/"): leaf for key, leaf in want.items()}
        )


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    found = svd.recover(_fit(pretrained, experts, rank=3), 1)
    for name, leaf in references.flat(found).items():
        assert leaf.dtype == pretrained[name].dtype
    want = references_dts.svd_baseline(pretrained, experts[1], 3)
    assert_close(found, want, rtol=step, atol=1e-5)


def test_float64_is_stored_as_float32():
    pretrained, experts = references.few_leaves(2, dtype=np.float64)
    found = svd.recover(_fit(pretrained, experts, rank=3), 1)
    for leaf in references.flat(found).values():
        assert leaf.dtype != np.float64
    assert_close(found, references_dts.svd_baseline(pretrained, experts[1], 3))


def test_mix():
    pretrained, experts = references.few_leaves(2)
    state = _fit(pretrained, experts, rank=3)
    first, second = (references_dts.svd_baseline(pretrained, expert, 3) for expert in experts)
    want = {
        name: first[name] + 0.25 * (second[name] - start) - 0.5 * (first[name] - start)
        if references.is_float(start)
        else start
        for name, start in pretrained.items()
    }
    assert_close(svd.mix(state, jnp.array([0.5, 0.25])), want)
    assert_close(svd.mix(state, jnp.array([0.0, 1.0])), references.flat(svd.recover(state, 1)))


def test_a_traced_task_and_eager_are_equal():
    state = _fit(*references.few_leaves(2), rank=3)
    want = references.flat(svd.recover(state, 1))
    assert_close(jax.jit(svd.recover)(state, 1), want, 1e-6, 1e-6)
    with jax.disable_jit():
        assert_close(svd.recover(state, 1), want, 1e-6, 1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b/kernel": (3, 3, 4, 16), "c": (), "d": (8,)}
    pretrained = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    experts = [
        {key: np.float32(leaf + 0.1 * rng.normal(size=leaf.shape)) for key, leaf in items}
        for items in [pretrained.items()] * 2
    ]
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    state = _fit(sharded[0], sharded[1:], rank=5)
    found = svd.recover(state, 1)
    assert_close(found, references.flat(svd.recover(_fit(pretrained, experts, rank=5), 1)))
    kernel = found["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(sharded[0]["a/kernel"].sharding, kernel.ndim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": True}, "rank: got True"),
        ({"rank": 2.0}, "rank: got 2.0"),
        ({"rank_ratio": 0.0}, "rank_ratio: got 0.0"),
        ({"rank_ratio": 1.5}, "rank_ratio: got 1.5"),
        ({"amr": np.nan}, "amr: got nan"),
        ({"amr": -1.0, "rank": -1}, r"(?s)amr: got 2 of .*rank: got -1.*amr: got -1.0"),
        ({"bytes_per_task": 30}, "bytes_per_task, amr: leave -14 bytes for matrices"),
        ({"base": "tise"}, "base: got 'tise', .*did you mean 'ties'"),
        ({"base_options": {"scaling": 1.0}}, "base_options: got"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(*references.few_leaves(1), **options)


def test_bad_task_and_weights():
    state = _fit(*references.few_leaves(2), rank=1)
    for task in (-1, 2):
        with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 1"):
            svd.recover(state, task)
    with pytest.raises(ValueError, match="task: got 'a', expected an integer"):
        svd.recover(state, "a")
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\)"):
        svd.mix(state, jnp.ones(3))


def test_ranks_are_not_lost_to_rounding():
    assert 0.29 * 100 < 29
    assert low_rank.leaf_rank((200, 100), 0.29) == 29
    assert low_rank.leaf_rank((768, 3072), 0.3) == 230
    assert low_rank.leaf_rank((3, 50), 0.3) == 1
