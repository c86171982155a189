"""Inputs with mixtures of experts in one pass, against each input's own mixed parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from test_recovery_modes import (
    MODELS,
    NUM_TASKS,
    assert_agree,
    experts_of,
    fitted,
    inputs_of,
    mostly_slow,
)

import retex_jax as rtx
from retex_jax import offsets, recovery

WEIGHTS = np.random.default_rng(4).dirichlet(np.ones(NUM_TASKS), 6).astype(np.float32)


def one_by_one(model, state, inputs, weights):
    """Each input alone through the parameters of its own mixture."""

    @jax.jit
    def run(state, inputs, weights):
        def one(row):
            params = offsets.mix(state, row[1])
            return model.apply({"params": params}, {k: v[None] for k, v in row[0].items()}).pooled

        return jax.lax.map(one, (inputs, weights))[:, 0]

    return np.asarray(run(state, inputs, weights))


@pytest.mark.parametrize(
    "form",
    mostly_slow(
        [("vit", "left"), ("vit", "separate"), ("roberta", "affine"), ("roberta", "coded")],
        ("vit", "separate"),
        ("roberta", "coded"),
    ),
    ids=str,
)
def test_mixtures_of_every_kind_of_factors(form):
    name, fit = form
    model = MODELS[name]
    state, inputs = fitted(model, fit), inputs_of(model, len(WEIGHTS))
    found = recovery.Recoverer(model, state, max_batch=4).mixed_features(inputs, WEIGHTS)
    want = one_by_one(model, state, inputs, WEIGHTS)
    assert_agree(found, want)
    uniform = np.full_like(WEIGHTS, 1 / NUM_TASKS)
    assert np.abs(one_by_one(model, state, inputs, uniform) - want).max() > 0.01


def test_one_hot_weights_are_tasks():
    model, ids = MODELS["vit"], np.array([2, 0, 2, 3, 0])
    recoverer = recovery.Recoverer(model, fitted(model))
    inputs = inputs_of(model, len(ids))
    found = recoverer.mixed_features(inputs, np.eye(NUM_TASKS)[ids])
    assert_agree(found, recoverer.features(inputs, ids, "factored"))


def test_offsets_that_were_learned():
    model = MODELS["vit"]
    pretrained, tasks = experts_of(model, NUM_TASKS)
    state = offsets.fit(
        rtx.ExpertSet.from_trees(pretrained, tasks),
        solver="adam",
        rank=3,
        d_emb=3,
        steps=3,
        warmup_steps=1,
        key=jax.random.key(0),
    )
    recoverer, inputs = recovery.Recoverer(model, state), inputs_of(model, len(WEIGHTS))
    want = one_by_one(model, state, inputs, WEIGHTS)
    assert_agree(recoverer.mixed_features(inputs, WEIGHTS), want)
    ids = np.array([3, 1, 1, 0, 2, 3])
    want = recovery.run_grouped(model, lambda task: offsets.recover(state, task), inputs, ids, 8)
    assert_agree(recoverer.features(inputs, ids, "factored"), want)


def test_factors_that_lie_on_eight_devices():
    model = MODELS["vit"]
    state, inputs = fitted(model, "full rank"), inputs_of(model, len(WEIGHTS))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        axes = [None] * np.ndim(x)
        for axis in reversed(range(np.ndim(x))):
            if np.shape(x)[axis] % 4 == 0:
                axes[axis] = "x" if np.shape(x)[axis] % 8 == 0 else None
                break
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    spread = dataclasses.replace(
        state, merged=jax.tree.map(place, state.merged), offsets=jax.tree.map(place, state.offsets)
    )
    assert any(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(spread.offsets))
    want = recovery.Recoverer(model, state)
    found = recovery.Recoverer(model, spread)
    ids = np.array([3, 1, 1, 0, 2, 3])
    for mode in ("factored", "materialized"):
        assert_agree(found.features(inputs, ids, mode), want.features(inputs, ids, mode))
    assert_agree(found.mixed_features(inputs, WEIGHTS), want.mixed_features(inputs, WEIGHTS))


def test_wrong_weights():
    model = MODELS["vit"]
    recoverer, inputs = recovery.Recoverer(model, fitted(model)), inputs_of(model, 6)
    with pytest.raises(ValueError, match=r"weights: got shape \(6, 3\), expected \(6, 4\)"):
        recoverer.mixed_features(inputs, WEIGHTS[:, :3])
    for wrong in (np.zeros((6, 4)), np.full((6, 4), np.nan)):
        with pytest.raises(ValueError, match="expected rows of sum 1"):
            recoverer.mixed_features(inputs, wrong)
