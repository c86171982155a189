from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_masks
from references_masks import MODELS, assert_close, assert_like

import retex_jax as rtx
from retex_jax.personalized import t_switch


def _fit(pretrained, experts, **options):
    trees = [references.nested(expert) for expert in experts]
    return t_switch.fit(rtx.ExpertSet.from_trees(references.nested(pretrained), trees), **options)


def _recover(state, task):
    return references.flat(t_switch.recover(state, task))


def _reference(pretrained, experts, dropped_tenths, variant):
    changes = references_masks.t_switch(pretrained, experts, dropped_tenths, variant)
    return [references_masks.plus(pretrained, change) for change in changes]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dropped_tenths", [0, 6, 8, 9])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_against_the_definition(model, dropped_tenths, variant):
    pretrained, experts = MODELS[model]
    state = _fit(pretrained, experts, drop=dropped_tenths / 10, variant=variant)
    want = _reference(pretrained, experts, dropped_tenths, variant)
    for task, expert in enumerate(want):
        assert_close(_recover(state, task), expert)


def test_by_hand():
    pretrained = {"a": np.float32([[1, 1, 1, 1], [1, 1, 1, 1]])}
    experts = [{"a": np.float32([[2, 3, 4, 5], [0, -1, -2, 1]])}]
    # Positive 1 2 3 4 and negative 1 2 3; half of them, rounded down: 3, 4 and -3.
    state = _fit(pretrained, experts, drop=0.5)
    scale = np.sqrt((9 + 16 + 9) / 3)
    want = [[1, 1, 1 + scale, 1 + scale], [1, 1, 1 - scale, 1]]
    np.testing.assert_allclose(_recover(state, 0)["a"], want, rtol=1e-6)
    np.testing.assert_array_equal(state.masks["a"], [[0b00110010]])
    np.testing.assert_array_equal(state.signs["a"], [[0b00110000]])
    assert state.scales["a"].shape == (1, 1)
    state = _fit(pretrained, experts, drop=0.5, variant="paper")
    up = np.sqrt((9 + 16) / 2)
    want = [[1, 1, 1 + up, 1 + up], [1, 1, -2, 1]]
    np.testing.assert_allclose(_recover(state, 0)["a"], want, rtol=1e-6)
    np.testing.assert_allclose(state.scales["a"], [[up, 3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "drop", "kept"),
    [
        ([1, 2, 2, 2, 3], "0.6", [2, 2, 2, 3]),  # two are asked for: 3, and all that tie with 2
        ([1, 2], "0.6", [1, 2]),  # floor(0.8) is none, so all
        ([1, 2, 3], "0.6", [3]),  # floor(1.2)
        ([1, 2, 3, 4, 5], "0.8", [5]),  # 5 * (1 - 0.8) is 0.99... in floats
        ([5, 0, -7, 0, 4], "0.5", [5]),  # neither zeros nor negatives count
        ([0, -1], "0.5", []),
        ([3], "0.9", [3]),
        ([1, 1, 1], "0.9", [1, 1, 1]),
    ],
)
def test_what_is_kept(values, drop, kept):
    values = np.float32(values)
    found = values[t_switch.keep_largest(values, 1 - Fraction(drop))]
    np.testing.assert_array_equal(np.sort(found), kept)


def test_default_drops_six_tenths_with_one_scale():
    pretrained, experts = references.few_leaves(2)
    assert_close(
        _recover(_fit(pretrained, experts), 1), _reference(pretrained, experts, 6, "code")[1]
    )


@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_constant_magnitudes_are_exact(drop):
    rng = np.random.default_rng(0)
    pretrained = {"a": np.float32(rng.integers(-8, 9, (5, 7)) / 4), "s": np.float32(2)}
    signs = rng.choice([-1, 1], size=(5, 7))
    expert = {"a": np.float32(pretrained["a"] + 0.5 * signs), "s": np.float32(1.25)}
    assert_close(_recover(_fit(pretrained, [expert], drop=drop), 0), expert, 1e-6, 1e-6)


def test_the_norm_of_what_is_kept_stays():
    pretrained, experts = references.few_leaves(2)
    vectors = references_masks.task_vectors(pretrained, experts)
    for variant in ("code", "paper"):
        state = _fit(pretrained, experts, drop=0.0, variant=variant)
        for task in range(2):
            found = references_masks.task_vectors(pretrained, [_recover(state, task)])
            for name, leaf in vectors.items():
                got, want = np.linalg.norm(found[name]), np.linalg.norm(leaf[task])
                assert got == pytest.approx(want, rel=1e-5)


def test_a_task_that_learned_nothing_gets_the_pretrained_model():
    pretrained, experts = references.few_leaves(1)
    for variant in ("code", "paper"):
        state = _fit(pretrained, [experts[0], pretrained], variant=variant)
        assert_close(_recover(state, 1), pretrained, rtol=0, atol=0)


def test_a_tensor_of_one_sign():
    pretrained = {"a": np.zeros(4, np.float32)}
    experts = [{"a": np.float32([1, 2, 3, 4])}, {"a": np.float32([-1, -2, -3, -4])}]
    for variant in ("code", "paper"):
        state = _fit(pretrained, experts, drop=0.5, variant=variant)
        change = np.sqrt(12.5) * np.array([0, 0, 1, 1])
        np.testing.assert_allclose(_recover(state, 0)["a"], change, rtol=1e-6)
        np.testing.assert_allclose(_recover(state, 1)["a"], -change, rtol=1e-6)


def test_tasks_do_not_depend_on_each_other():
    order = (2, 0, 3, 1)
    pretrained, experts = references.grid_model(4)
    first = _fit(pretrained, experts)
    second = _fit(pretrained, [experts[task] for task in order])
    for place, task in enumerate(order):
        assert_close(_recover(second, place), _recover(first, task), rtol=0, atol=0)
        alone = _fit(pretrained, [experts[task]])
        assert_close(_recover(alone, 0), _recover(first, task), rtol=0, atol=0)


def test_mixing():
    pretrained, experts = references.few_leaves(8)
    for variant in ("code", "paper"):
        state = _fit(pretrained, experts, variant=variant)
        weights = np.linspace(-0.2, 0.6, 8)
        changes = references_masks.t_switch(pretrained, experts, 6, variant)
        total = {
            name: sum(w * change[name] for w, change in zip(weights, changes, strict=True))
            for name in changes[0]
        }
        found = references.flat(t_switch.mix(state, weights))
        assert_close(found, references_masks.plus(pretrained, total))
        one_hot = references.flat(t_switch.mix(state, jnp.eye(8)[3]))
        assert_close(one_hot, _recover(state, 3), 1e-6, 1e-6)
        nothing = references.flat(t_switch.mix(state, jnp.zeros(8)))
        assert_close(nothing, pretrained, rtol=0, atol=0)
        compiled = references.flat(jax.jit(t_switch.mix)(state, jnp.asarray(weights)))
        assert_close(compiled, found, 1e-6, 1e-6)


@pytest.mark.parametrize(("variant", "scales"), [("code", 1), ("paper", 2)])
def test_bytes(variant, scales):
    pretrained, experts = references.few_leaves(8)
    state = _fit(pretrained, experts, variant=variant)
    sizes = [leaf.size for leaf in pretrained.values() if references.is_float(leaf)]
    want = 8 * (2 * sum(-(-size // 8) for size in sizes) + 4 * scales * len(sizes))
    assert t_switch.extra_bytes(state) == want
    assert t_switch.paper_amr(state) == 0.0625
    whole = {"a": pretrained["dense/kernel"]}  # no bits are lost to whole bytes
    state = _fit(whole, [{"a": expert["dense/kernel"]} for expert in experts], variant=variant)
    planes = t_switch.extra_bytes(state) - 8 * 4 * scales
    assert planes / 8 == t_switch.paper_amr(state) * whole["a"].nbytes


def test_shapes_dtypes_and_buffers():
    pretrained, experts = references.flax_model(2)
    state = _fit(pretrained, references_masks.other_buffers(experts))
    assert_like(_recover(state, 1), pretrained)
    assert_like(references.flat(t_switch.mix(state, jnp.ones(2))), pretrained)


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    found = _recover(_fit(pretrained, experts), 1)
    assert_like(found, pretrained)
    want = _reference(pretrained, experts, 6, "code")[1]
    assert_close(found, want, rtol=step, atol=1e-6)  # rounded once, at the end


def test_float64_is_stored_as_float32():
    pretrained, experts = references.few_leaves(2, dtype=np.float64)
    found = _recover(_fit(pretrained, experts), 0)
    assert found["dense/kernel"].dtype == np.float32
    assert_close(found, _reference(pretrained, experts, 6, "code")[0])


def test_traced_task_and_jit_equal_eager():
    state = _fit(*references.few_leaves(8), variant="paper")
    compiled = jax.jit(t_switch.recover)
    for task in range(8):
        assert_close(references.flat(compiled(state, task)), _recover(state, task), 1e-6, 1e-6)
    with jax.disable_jit():
        eager = _recover(state, 5)
    assert_close(eager, _recover(state, 5), 1e-6, 1e-6)


def test_sharded_equals_one_device(place_on_8_devices):
    pretrained, experts = references_masks.model_for_8_devices()
    sharded = [place_on_8_devices(model) for model in (pretrained, *experts)]
    state, plain = _fit(sharded[0], sharded[1:]), _fit(pretrained, experts)
    for task in range(2):
        assert_close(_recover(state, task), _recover(plain, task))
    mixed = [references.flat(t_switch.mix(s, jnp.asarray([0.3, 0.7]))) for s in (state, plain)]
    assert_close(*mixed)


@pytest.mark.parametrize("drop", [1, -0.1, 60, np.nan])
def test_drop_must_leave_something(drop):
    with pytest.raises(ValueError, match="drop: got"):
        _fit(*references.few_leaves(1), drop=drop)


def test_unknown_variant():
    with pytest.raises(ValueError, match="variant: got 'two'"):
        _fit(*references.few_leaves(1), variant="two")


@pytest.mark.parametrize("task", [-1, 2])
def test_task_must_exist(task):
    with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 1"):
        t_switch.recover(_fit(*references.few_leaves(2)), task)


def test_weights_must_be_one_a_task():
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\), expected \(2,\)"):
        t_switch.mix(_fit(*references.few_leaves(2)), jnp.ones(3))


@hypothesis.given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=30),
    tenths=st.integers(0, 9),
)
def test_keeping_the_largest(values, tenths):
    found = t_switch.keep_largest(np.float32(values), Fraction(10 - tenths, 10))
    positive = sorted(value for value in values if value > 0)
    kept = [value for value, keep in zip(values, found, strict=True) if keep]
    dropped = [value for value, keep in zip(values, found, strict=True) if not keep and value > 0]
    assert all(value > 0 for value in kept)
    assert max(dropped, default=0) < min(kept, default=1)
    assert len(kept) >= (len(positive) * (10 - tenths) // 10 or len(positive))
    least = [value for value in kept if value == min(kept)]
    assert len(kept) - len(least) < (len(positive) * (10 - tenths) // 10 or len(positive) or 1)
