import functools

import jax
import numpy as np
import pytest
import references
from expert_sets import assert_close, expert_set

import retex_jax as rtx
from retex_jax import offsets, tree
from retex_jax.offsets.forms import Extended

RETEX = rtx.METHODS["retex"]
PRETRAINED, EXPERTS = references.flax_model(4)
FEW = references.few_leaves(4)
FITS = {
    "shared": {"rank": 3},
    "left, 4 bits": {"rank": 3, "orientation": "left", "bits": 4, "vector_bits": 8},
    "separate, 3 bits": {"budget": 0.4, "sharing": "separate", "bits": 3, "vector_bits": 4},
    "auto": {"budget": 0.5, "sharing": "auto", "orientation": "auto", "bits": 8},
}


def models(name):
    """Coding is compiled for every shape of a leaf: all of them are tried with one fit."""
    return (PRETRAINED, EXPERTS) if name == "shared" else FEW


@functools.cache
def fitted(name, count=3):
    pretrained, experts = models(name)
    return RETEX.fit(expert_set(pretrained, experts[:count]), **FITS[name])


def added(name):
    """The expert that is added to such a fit."""
    return models(name)[1][3]


def identical(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(first, second)


def squared_error(params, expert):
    found = references.flat(params)
    return sum(
        np.sum((np.asarray(found[name], np.float64) - np.asarray(expert[name], np.float64)) ** 2)
        for name in expert
    )


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("project", [True, False])
def test_what_older_tasks_store_stays_to_the_last_bit(fit, project):
    state = fitted(fit)
    extended = offsets.add_task(
        state, references.nested(added(fit)), budget=0.95, bits=4, vector_bits=8, project=project
    )
    assert extended.num_tasks == 4
    for task in range(3):
        want = references.flat(RETEX.recover(state, task))
        assert_close(RETEX.recover(extended, task), want, rtol=1e-6, atol=1e-6)
    stored = {id(x) for x in jax.tree.leaves(extended.offsets)}
    assert {id(x) for x in jax.tree.leaves(state.offsets)} <= stored


@pytest.mark.parametrize("fit", FITS)
def test_removing_what_was_added_gives_back_the_state(fit):
    state = fitted(fit)
    extended = offsets.add_task(state, references.nested(added(fit)), budget=0.95, bits=4)
    identical(offsets.remove_task(extended, 3), state)


@pytest.mark.parametrize("fit", FITS)
def test_enough_bytes_recover_the_added_expert(fit):
    state = fitted(fit)
    model_bytes = tree.param_bytes(state.merged)
    extended = offsets.add_task(state, references.nested(added(fit)), budget=4.0 * model_bytes)
    assert_close(RETEX.recover(extended, 3), added(fit))


def test_more_bytes_are_nearer_and_the_budget_is_kept():
    state = fitted("shared")
    last = np.inf
    for fraction in (0.3, 0.45, 0.7):
        extended = offsets.add_task(state, references.nested(EXPERTS[3]), budget=fraction, bits=8)
        spent = RETEX.extra_bytes(extended) - RETEX.extra_bytes(state)
        assert spent <= fraction * tree.param_bytes(state.merged)
        error = squared_error(RETEX.recover(extended, 3), EXPERTS[3])
        assert error < last
        last = error


def test_all_that_a_task_adds_is_in_its_budget():
    rng = np.random.default_rng(0)
    shapes = {"w/kernel": (7, 5)} | {f"b_{number}/bias": (3,) for number in range(5)}
    models = [
        {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
        for _ in range(41)
    ]
    state = RETEX.fit(expert_set(models[0], models[1:]), rank=1)
    for budget in range(368, 412, 4):
        extended = offsets.add_task(
            state, references.nested(models[1]), budget=budget, bits=3, vector_bits=4, project=False
        )
        assert RETEX.extra_bytes(extended) - RETEX.extra_bytes(state) <= budget


def test_projection_is_the_least_squares_factor():
    # All the budget goes to the projection: the offset is D S^T S.
    state = fitted("shared")
    extended = offsets.add_task(state, references.nested(EXPERTS[3]), budget=0.99)
    merged = references.flat(state.merged)
    name, axes = next(iter(references.FLAX_MATRICES.items()))
    form = extended.offsets[name]
    assert isinstance(form, Extended)
    difference = references.as_matrix(
        EXPERTS[3][name].astype(np.float64) - merged[name].astype(np.float64), axes
    )
    shared = np.asarray(state.offsets[name].shared, np.float64)
    np.testing.assert_allclose(form.projection[0], difference @ shared.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("task", [0, 1, 2])
def test_removing_an_older_task_leaves_the_others(fit, task):
    state = fitted(fit)
    rest = offsets.remove_task(state, task)
    assert rest.num_tasks == 2
    assert RETEX.extra_bytes(rest) < RETEX.extra_bytes(state)
    for new, old in enumerate(index for index in range(3) if index != task):
        assert_close(
            RETEX.recover(rest, new),
            references.flat(RETEX.recover(state, old)),
            rtol=1e-6,
            atol=1e-6,
        )


def test_adding_and_removing_in_any_order():
    state, experts = fitted("separate, 3 bits", 2), FEW[1]
    options = {"budget": 0.8, "bits": 4, "vector_bits": 8}
    once = offsets.add_task(state, references.nested(experts[2]), **options)
    twice = offsets.add_task(once, references.nested(experts[3]), **options)
    other = offsets.add_task(state, references.nested(experts[3]), **options)
    without = offsets.remove_task(twice, 2)
    assert_close(
        RETEX.recover(without, 2), references.flat(RETEX.recover(other, 2)), rtol=1e-6, atol=1e-6
    )
    weights = np.array([0.2, 0.3, 0.1, 0.4], np.float32)
    merged = references.flat(twice.merged)
    mixture = references.flat(RETEX.mix(twice, weights))
    for name in merged:
        if not np.issubdtype(merged[name].dtype, np.floating):
            continue
        want = merged[name].astype(np.float64) + sum(
            weight
            * (references.flat(RETEX.recover(twice, task))[name].astype(np.float64) - merged[name])
            for task, weight in enumerate(weights)
        )
        np.testing.assert_allclose(mixture[name], want, rtol=1e-4, atol=1e-5)


def test_what_is_left_of_an_added_task_alone_is_recovered():
    state, name = fitted("separate, 3 bits", 2), "second/kernel"
    expert = {**FEW[1][2], name: references.flat(state.merged)[name]}
    rest = offsets.add_task(
        state, references.nested(expert), budget=4.0 * tree.param_bytes(state.merged)
    )
    assert isinstance(rest.offsets[name], Extended)
    for _ in range(2):
        rest = offsets.remove_task(rest, 0)
    assert name not in rest.offsets
    assert_close(RETEX.recover(rest, 0), expert)


def test_bad_input():
    state = fitted("shared")
    wrong = dict(EXPERTS[3])
    name = next(iter(references.FLAX_MATRICES))
    wrong[name] = np.full_like(wrong[name], np.nan)
    dropped = next(key for key in wrong if key != name)
    del wrong[dropped]
    with pytest.raises(ValueError, match=f"(?s){name} has values.*missing leaf {dropped}"):
        offsets.add_task(state, references.nested(wrong), budget=0.5)
    with pytest.raises(ValueError, match=r"budget: got 1e-06, .* bytes too few"):
        offsets.add_task(state, references.nested(EXPERTS[3]), budget=1e-6)
    for task in (-1, 3):
        with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 2"):
            offsets.remove_task(state, task)
    for task in ("a", 1.0, None):
        for take in (offsets.remove_task, offsets.recover):
            with pytest.raises(ValueError, match=f"task: got {task!r}, expected an integer"):
                take(state, task)
    alone = RETEX.fit(expert_set(PRETRAINED, EXPERTS[:1]), rank=2)
    with pytest.raises(ValueError, match="one task must stay"):
        offsets.remove_task(alone, 0)
