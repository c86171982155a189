import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_masks
from expert_sets import expert_set
from references_masks import MODELS, assert_close, assert_like

from retex_jax import experts as experts_module
from retex_jax.mergers import average, dare, task_arithmetic, ties

KEY = jax.random.key(3)
UNDER = {
    "weight_average": (average, {}),
    "task_arithmetic": (task_arithmetic, {"scaling": 0.4}),
    "ties": (ties, {"density": 0.3}),
}


def _merge(pretrained, experts, *, key=KEY, names=None, **options):
    return references.flat(
        dare.fit(expert_set(pretrained, experts, names=names), key=key, **options)
    )


def _kept(pretrained, num_tasks, drop, key=KEY):
    """What the definition keeps: 16-bit integers of a stream seeded by the key and both names."""
    return [
        {
            name: _drawn(key, name, f"task_{task}", leaf.size).reshape(leaf.shape) >= drop * 65536
            for name, leaf in pretrained.items()
            if references.is_float(leaf)
        }
        for task in range(num_tasks)
    ]


def _drawn(key, leaf, task, count):
    seed = [int(word) for word in jax.random.key_data(key)]
    stream = np.random.PCG64DXSM([*seed, zlib.crc32(leaf.encode()), zlib.crc32(task.encode())])
    words = [int(word) for word in stream.random_raw(count // 4 + 1)]
    return np.array([word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)][:count])


def _reference(pretrained, experts, drop, merge, rescale=True, key=KEY):
    drop = round(drop * 65536) / 65536
    kept = _kept(pretrained, len(experts), drop, key)
    remaining = references_masks.dare(pretrained, experts, kept, drop, rescale)
    if merge == "weight_average":
        return references.weight_average(pretrained, remaining)
    if merge == "task_arithmetic":
        return references.task_arithmetic(pretrained, remaining, 0.4)
    size = sum(leaf.size for leaf in pretrained.values() if references.is_float(leaf))
    return references.ties(pretrained, remaining, int(0.3 * size))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("merge", UNDER)
def test_against_the_definition(model, merge):
    pretrained, experts = MODELS[model]
    found = _merge(pretrained, experts, drop=0.5, merge=merge, merge_options=UNDER[merge][1])
    assert_close(found, _reference(pretrained, experts, 0.5, merge))


@pytest.mark.parametrize("drop", [0.1, 0.9])
@pytest.mark.parametrize("rescale", [True, False])
def test_other_rates(drop, rescale):
    pretrained, experts = references.few_leaves(2)
    options = {"merge": "task_arithmetic", "merge_options": {"scaling": 0.4}}
    found = _merge(pretrained, experts, drop=drop, rescale=rescale, **options)
    assert_close(found, _reference(pretrained, experts, drop, "task_arithmetic", rescale))


def test_defaults_are_half_rescaled_and_task_arithmetic():
    experts = expert_set(*references.few_leaves(2))
    found = dare.fit(experts)
    options = {"merge": "task_arithmetic", "merge_options": {"scaling": 0.3}}
    want = dare.fit(experts, key=jax.random.key(0), drop=0.5, rescale=True, **options)
    assert_close(references.flat(found), references.flat(want), rtol=0, atol=0)


def test_by_hand():
    vectors = jnp.asarray([[1, -2, 3], [0, 6, 8]], jnp.float32)
    kept = jnp.asarray([[True, False, True], [True, True, False]])
    found = dare.drop_leaf(vectors, kept, 4 / 3)
    np.testing.assert_allclose(found, [[4 / 3, 0, 4], [0, 8, 0]], rtol=1e-6)


def test_masks_are_the_same_on_every_machine():
    found = dare.draw_mask(jax.random.key(0), "a", "x", 20, 0.5)
    np.testing.assert_array_equal(
        found.astype(int), [1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0]
    )


def test_a_part_of_a_mask_is_drawn_as_in_the_whole():
    whole = dare.draw_mask(KEY, "a", "x", 100_003, 0.3)
    for start, size in ((0, 5), (4, 40_001), (65_536, 34_467), (100_000, 3)):
        part = dare.draw_mask(KEY, "a", "x", size, 0.3, start)
        np.testing.assert_array_equal(part, whole[start : start + size])


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.99])
def test_the_mean_stays(drop):
    shape = (400, 500)
    pretrained = {"a": np.zeros(shape, np.float32)}
    experts = expert_set(pretrained, [{"a": np.ones(shape, np.float32)}] * 2)
    found = np.asarray(dare.dropped(experts, KEY, drop).task_vectors("a")).reshape(2, -1)
    deviation = np.sqrt(drop / (1 - drop) / found.shape[1])
    assert np.all(np.abs(found.mean(axis=1) - 1) < 4 * deviation)
    both = ((found[0] != 0) & (found[1] != 0)).mean()  # tasks are independent
    assert abs(both - (1 - drop) ** 2) < 4 * np.sqrt((1 - drop) ** 2 / found.shape[1])


def test_the_least_and_the_greatest_rate():
    count = 1_000_000  # every 16-bit integer is drawn about 15 times
    assert dare.draw_mask(KEY, "a", "x", count, 0.0).all()
    few = dare.draw_mask(KEY, "a", "x", count, 65535 / 65536)
    assert 1 <= few.sum() < 50


@pytest.mark.parametrize(
    ("drop", "want"), [(0.5, 0.5), (0.1, 6554 / 65536), (1e-9, 0), (1 - 1e-9, 65535 / 65536)]
)
def test_the_rate_is_rounded(drop, want):
    assert dare.rounded(drop) == want


@pytest.mark.parametrize("merge", UNDER)
def test_dropping_nothing_is_the_plain_merger(merge):
    module, options = UNDER[merge]
    pretrained, experts = references.few_leaves(8)
    found = _merge(pretrained, experts, drop=0.0, merge=merge, merge_options=options)
    want = references.flat(module.fit(expert_set(pretrained, experts), **options))
    assert_close(found, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merge", ["task_arithmetic", "ties"])
def test_scaling_0_gives_the_pretrained_model(merge):
    pretrained, experts = references.few_leaves(2)
    found = _merge(pretrained, experts, merge=merge, merge_options={"scaling": 0.0})
    assert_close(found, pretrained, rtol=0, atol=0)


@pytest.mark.parametrize("merge", UNDER)
def test_order_of_tasks_does_not_matter(merge):
    pretrained, experts = references.few_leaves(8)
    order = (2, 0, 3, 1, 7, 5, 6, 4)
    options = {"merge": merge, "merge_options": UNDER[merge][1]}
    names = [f"t{task}" for task in range(8)]
    first = _merge(pretrained, experts, names=names, **options)
    permuted = [experts[task] for task in order]
    second = _merge(pretrained, permuted, names=[names[task] for task in order], **options)
    assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_masks_do_not_depend_on_the_other_leaves_and_tasks():
    pretrained, experts = references.few_leaves(2)
    whole = dare.dropped(expert_set(pretrained, experts), KEY, 0.5)
    part = expert_set(pretrained, experts[1:], names=["task_1"], exclude=["bias", "scale"])
    part = dare.dropped(part, KEY, 0.5)
    for name in part.float_leaves:
        np.testing.assert_array_equal(whole.task_vectors(name)[1], part.task_vectors(name)[0])


def test_keys_leaves_and_tasks_have_masks_of_their_own():
    pretrained, experts = references.few_leaves(2)
    same = [experts[0], experts[0]]
    found = dare.dropped(expert_set(pretrained, same), KEY, 0.5)
    other = dare.dropped(expert_set(pretrained, same), jax.random.key(4), 0.5)
    dense = np.asarray(found.task_vectors("dense/kernel")) != 0
    second = np.asarray(found.task_vectors("second/kernel")) != 0
    assert not np.array_equal(dense[0], dense[1])
    assert not np.array_equal(dense[0], second[0])
    assert not np.array_equal(dense, np.asarray(other.task_vectors("dense/kernel")) != 0)


def test_dropped_experts_read_alike_in_every_way(monkeypatch):
    monkeypatch.setattr(experts_module, "PART_SIZES", (16,))
    pretrained, experts = references.few_leaves(2, dtype=np.float16)
    found = dare.dropped(expert_set(pretrained, experts), KEY, 0.5)
    name = "dense/kernel"
    assert len(found.parts(name)) > 1
    for read in (found.task_vectors, found.stacked):
        pieces = [np.array(read(name, part)) for part in found.parts(name)]
        whole = np.asarray(read(name)).reshape(2, -1)
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    start = pretrained[name].astype(np.float32)
    np.testing.assert_array_equal(found.stacked(name), start + found.task_vectors(name))
    leaf = found.expert(name, 1)
    assert leaf.dtype == np.float16
    np.testing.assert_array_equal(leaf, np.asarray(found.stacked(name)[1], np.float16))
    buffer = found.expert("buffers/positions", 1)
    np.testing.assert_array_equal(buffer, pretrained["buffers/positions"])


def test_shapes_dtypes_and_buffers():
    pretrained, experts = references.flax_model(2)
    assert_like(_merge(pretrained, references_masks.other_buffers(experts)), pretrained)


@pytest.mark.parametrize("merge", UNDER)
@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(merge, dtype, step):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    found = _merge(pretrained, experts, merge=merge, merge_options=UNDER[merge][1])
    assert_like(found, pretrained)
    assert_close(found, _reference(pretrained, experts, 0.5, merge), rtol=step, atol=1e-6)


def test_jit_equals_eager():
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    kept = dare.draw_mask(KEY, "a", "x", 30, 0.3).reshape(2, 5, 3)
    compiled = dare.drop_leaf(vectors, kept, 1.4)
    with jax.disable_jit():
        np.testing.assert_allclose(compiled, dare.drop_leaf(vectors, kept, 1.4), rtol=1e-6)


@pytest.mark.parametrize("merge", UNDER)
def test_sharded_equals_one_device(merge, place_on_8_devices):
    pretrained, experts = references_masks.model_for_8_devices()
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    options = {"merge": merge, "merge_options": UNDER[merge][1]}
    found = dare.fit(expert_set(sharded[0], sharded[1:]), key=KEY, **options)
    assert_close(references.flat(found), _merge(pretrained, experts, **options))
    kernel = found["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(sharded[0]["a/kernel"].sharding, kernel.ndim)


@pytest.mark.parametrize("drop", [1, 1.0, -0.1, 20, np.nan])
def test_drop_must_leave_something(drop):
    with pytest.raises(ValueError, match="drop: got"):
        _merge(*references.few_leaves(1), drop=drop)


def test_unknown_merge():
    with pytest.raises(ValueError, match=r"merge: got 'tie'.*did you mean 'ties'"):
        _merge(*references.few_leaves(1), merge="tie")


def test_options_reach_the_merger():
    with pytest.raises(ValueError, match="density: got 2"):
        _merge(*references.few_leaves(1), merge="ties", merge_options={"density": 2})
