"""What every identifier does: order of tasks and inputs, layers, jit, adding, taking, saving."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import references_identifier as ref
from safetensors.numpy import load, save

from retex_jax import tree
from retex_jax.identifier import IDENTIFIERS, serialization, subspace
from retex_jax.identifier.layers import Joint, Layered

OPTIONS = {
    "subspace": [{"rank": 2}, {"rank": 2, "whiten": True, "normalize": True, "center": False}],
    "router": [
        {"epochs": 3, "learning_rate": 1e-2},
        {"kind": "mlp", "epochs": 2, "normalize": True},
    ],
    "shared_mahalanobis": [{}, {"normalize": True}],
    "mahalanobis": [{}, {"normalize": True, "shrinkage": 0.5}],
    "neighbors": [{"k": 3}, {"k": 3, "score": "distance", "normalize": True}],
}
CASES = [(name, options) for name, choices in OPTIONS.items() for options in choices]
EACH = pytest.mark.parametrize(("name", "options"), CASES)


def _layered(num_tasks=3, count=16, seed=0):
    """Two layers of a different size: T arrays [count, 2, 6]."""
    parts = [ref.points(num_tasks, count, seed=seed + i, spread=1 + i) for i in range(2)]
    return [np.stack([x, 10 * y], axis=1) for x, y in zip(*parts, strict=True)]


def _inputs(name, features, rows=slice(0, 3)):
    """Some inputs of all tasks, [..., B, ...]; the experts' features are shifted, one from another."""
    x = np.concatenate([task[rows] for task in features])
    if not IDENTIFIERS[name].needs_experts:
        return x
    return np.stack([x + 0.1 * task for task in range(len(features))])


def test_every_identifier_is_tested_and_says_what_it_needs():
    assert OPTIONS.keys() == IDENTIFIERS.keys()
    for name, method in IDENTIFIERS.items():
        assert method.needs.startswith("unlabelled calibration inputs of each task")
        assert ("experts" in method.needs) == method.needs_experts == (name == "mahalanobis")
        assert method.random == (name == "router")
        assert "key" not in method.options
        assert "normalize" in method.options


@EACH
@pytest.mark.parametrize("layers", [False, True])
def test_order_of_tasks_and_inputs(name, options, layers):
    method = IDENTIFIERS[name]
    features = _layered() if layers else ref.points(3, 16)
    inputs = _inputs(name, features)
    found = np.asarray(method.scores(method.fit(features, **options), inputs))
    assert found.shape == (9, 3)
    assert found.dtype == np.float32
    order = [2, 0, 1]
    permuted = method.fit([features[task] for task in order], **options)
    turned = inputs[order][:, ::-1] if method.needs_experts else inputs[::-1]
    again = method.scores(permuted, turned)
    np.testing.assert_allclose(again, found[::-1][:, order], rtol=1e-4, atol=1e-4)
    for row in (0, 8):
        alone = inputs[..., row : row + 1, :, :] if layers else inputs[..., row : row + 1, :]
        one = method.scores(method.fit(features, **options), alone)
        np.testing.assert_allclose(one[0], found[row], rtol=1e-4, atol=1e-4)


@EACH
def test_one_task_and_tasks_that_are_equal(name, options):
    method, features = IDENTIFIERS[name], ref.points(1, 16)
    alone = method.fit(features, **options)
    assert method.scores(alone, _inputs(name, features)).shape == (3, 1)
    state = method.fit(features * 2, **options)
    x = np.stack(features * 2) if method.needs_experts else features[0]
    found = np.asarray(method.scores(state, x))
    assert np.isfinite(found).all()
    if name != "router":  # it starts from random numbers, one a task
        np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=1e-6)


@EACH
@pytest.mark.parametrize("layers", [False, True])
def test_jit_and_eager_are_equal(name, options, layers):
    method = IDENTIFIERS[name]
    features = _layered() if layers else ref.points(3, 16)
    state, inputs = method.fit(features, **options), _inputs(name, features)
    want = method.scores(state, inputs)
    np.testing.assert_allclose(jax.jit(method.scores)(state, inputs), want, rtol=1e-5, atol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(method.scores(state, inputs), want, rtol=1e-4, atol=1e-4)


@EACH
def test_layers_are_a_mean_of_scores_in_units_of_their_spread(name, options):
    method, features = IDENTIFIERS[name], _layered()
    state, inputs = method.fit(features, **options), _inputs(name, features)
    assert isinstance(state, Layered)
    assert state.num_tasks == 3
    each, spreads = [], []
    for layer in range(2):
        own = [x[:, layer] for x in features]
        key = jax.random.fold_in(jax.random.key(0), layer)
        keyed = {"key": key} if method.random else {}
        one = method.module.fit(own, **keyed, **options)
        each.append(np.float64(method.scores(one, inputs[..., layer, :])))
        if method.needs_experts:
            spreads.append(1.0)
        else:
            found = [np.float64(method.scores(one, x)) for x in own]
            squares = [(x - x.mean(axis=1, keepdims=True)) ** 2 for x in found]
            spreads.append(np.sqrt(np.mean(squares)))
    np.testing.assert_allclose(state.spreads, spreads, rtol=1e-5)
    want = (each[0] / spreads[0] + each[1] / spreads[1]) / 2
    np.testing.assert_allclose(method.scores(state, inputs), want, rtol=1e-4, atol=1e-4)


@EACH
def test_joint_layers_are_one_vector(name, options):
    method, features = IDENTIFIERS[name], _layered()
    state, inputs = method.fit(features, joint=True, **options), _inputs(name, features)
    assert isinstance(state, Joint)
    assert (state.num_tasks, state.num_layers) == (3, 2)
    flat = [np.concatenate([x[:, 0], x[:, 1]], axis=1) for x in features]
    wide = np.concatenate([inputs[..., 0, :], inputs[..., 1, :]], axis=-1)
    alone = method.fit(flat, key=jax.random.key(0), **options)
    if not method.random:  # its key is folded by the place of the layer
        np.testing.assert_array_equal(method.scores(state, inputs), method.scores(alone, wide))
    if name == "subspace" and options.get("whiten"):
        units = [ref.unit(np.float64(x)) for x in flat]
        want = ref.whitened_subspace_scores(units, ref.unit(np.float64(wide)), 2, False, 0.1)
        np.testing.assert_allclose(method.scores(state, inputs), want, rtol=1e-3, atol=1e-4)
    want = np.asarray(method.scores(state, inputs))
    np.testing.assert_allclose(jax.jit(method.scores)(state, inputs), want, rtol=1e-5, atol=1e-5)
    tensors, facts = serialization.to_tensors(state)
    read = serialization.from_tensors(load(save(jax.device_get(tensors))), facts)
    np.testing.assert_array_equal(method.scores(read, inputs), want)
    assert method.bytes(read) == method.bytes(state)
    some = method.take(state, [2, 0])
    assert isinstance(some, Joint)
    kept = inputs[[2, 0]] if method.needs_experts else inputs
    if (name, options.get("score")) != ("neighbors", None):  # of other points, other votes
        np.testing.assert_allclose(method.scores(some, kept), want[:, [2, 0]], rtol=1e-4, atol=1e-4)
    if name != "router":
        fewer = method.fit(features[:2], joint=True, **options)
        before = method.take(method.add(fewer, features[2]), [0, 1])
        jax.tree.map(np.testing.assert_array_equal, before, fewer)
    with pytest.raises(ValueError, match="features: got shape"):
        method.scores(state, inputs[..., :1, :])


def test_joint_needs_several_layers():
    with pytest.raises(ValueError, match="joint: the features are of one layer"):
        IDENTIFIERS["subspace"].fit(ref.points(3, 16), rank=2, joint=True)
    assert IDENTIFIERS["subspace"].problems({"joint": 1}) == [
        "joint: got 1, expected True or False"
    ]
    assert IDENTIFIERS["subspace"].problems({"joint": True}) == []


def test_a_layer_that_tells_nothing_decides_nothing():
    features = [np.stack([x, ref.points(1, 16)[0]], axis=1) for x in ref.points(3, 16)]
    method = IDENTIFIERS["subspace"]
    state = method.fit(features, rank=2)
    assert state.spreads[1] == 1
    found = method.scores(state, np.concatenate(features)).argmax(axis=1)
    alone = method.fit([x[:, 0] for x in features], rank=2)
    want = method.scores(alone, np.concatenate(features)[:, 0]).argmax(axis=1)
    np.testing.assert_array_equal(found, want)


@EACH
@pytest.mark.parametrize("layers", [False, True])
def test_taking_tasks_and_adding_one(name, options, layers):
    method = IDENTIFIERS[name]
    features = _layered() if layers else ref.points(3, 16)
    state, inputs = method.fit(features, **options), _inputs(name, features)
    want = np.asarray(method.scores(state, inputs))
    some = method.take(state, [2, 0])
    assert some.num_tasks == 2
    if (name, options.get("score")) == ("neighbors", None):  # of other points, other votes
        fitted = method.fit([features[2], features[0]], **options)
        if layers:  # what is kept are the spreads
            fitted = dataclasses.replace(fitted, spreads=state.spreads)
        np.testing.assert_allclose(
            method.scores(some, inputs), method.scores(fitted, inputs), rtol=1e-6
        )
    else:
        kept = inputs[[2, 0]] if method.needs_experts else inputs
        np.testing.assert_allclose(method.scores(some, kept), want[:, [2, 0]], rtol=1e-4, atol=1e-5)
    if name == "router":
        with pytest.raises(ValueError, match="identifier: 'router' takes a new task only by a fit"):
            method.add(state, features[0])
        return
    fewer = method.fit(features[:2], **options)
    added = method.add(fewer, features[2])
    assert added.num_tasks == 3
    before = method.take(added, [0, 1])
    jax.tree.map(np.testing.assert_array_equal, before, fewer)
    if not layers and (name, options.get("whiten")) in {
        ("subspace", None),
        ("mahalanobis", None),
        ("neighbors", None),
    }:  # nothing is shared by the tasks
        np.testing.assert_allclose(method.scores(added, inputs), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="features"):
        method.add(fewer, np.zeros(3))


def test_a_task_is_added_in_the_coordinates_of_the_others():
    features = ref.points(3, 16)
    for center in (True, False):
        fewer = subspace.fit(features[:2], rank=2, whiten=True, center=center)
        added = subspace.add(fewer, features[2])
        white = [fewer.whitening.on_host(np.float64(x)) for x in features]
        zero = fewer.whitening.on_host(np.zeros(6))
        mean = white[2].mean(axis=0) if center else zero
        np.testing.assert_allclose(added.centers[2], mean, rtol=1e-4, atol=1e-5)
        _, _, right = np.linalg.svd(white[2] - mean)
        found = np.asarray(added.bases[2])
        np.testing.assert_allclose(found.T @ found, right[:2].T @ right[:2], atol=1e-4)
    gaussians = IDENTIFIERS["shared_mahalanobis"]
    added = gaussians.add(gaussians.fit(features[:2]), features[2])
    np.testing.assert_allclose(
        added.means[2],
        added.whitening.on_host(np.float64(features[2])).mean(axis=0),
        rtol=1e-5,
        atol=1e-5,
    )


@EACH
@pytest.mark.parametrize("layers", [False, True])
def test_saved_states_are_read_bit_by_bit(name, options, layers):
    method = IDENTIFIERS[name]
    features = _layered() if layers else ref.points(3, 16)
    state = method.fit(features, **options)
    tensors, facts = serialization.to_tensors(state)
    assert sum(np.asarray(x).nbytes for x in tensors.values()) == method.bytes(state)
    file = save({name: np.asarray(x) for name, x in tensors.items()})
    again = serialization.from_tensors(load(file), json.loads(json.dumps(facts)))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    inputs = _inputs(name, features)
    np.testing.assert_array_equal(method.scores(again, inputs), method.scores(state, inputs))
    assert tree.flatten(tree.unflatten(tensors)).keys() == tensors.keys()


def test_damaged_states_are_refused():
    tensors, facts = serialization.to_tensors(subspace.fit(ref.points(2), 2))
    with pytest.raises(ValueError, match="identifier: 'bases' is missing or unknown"):
        serialization.from_tensors({"centers": tensors["centers"]}, facts)
    with pytest.raises(ValueError, match="identifier: 'signs' is missing or unknown"):
        serialization.from_tensors(tensors, {**facts, "class": "signs"})


def test_bytes_by_hand():
    features = ref.points(3, 16)
    want = {
        "subspace": 4 * (3 * 6 + 3 * 2 * 6),
        "router": 4 * (6 + 6 + 6 * 3 + 3),
        "shared_mahalanobis": 4 * (6 + 36 + 3 * 6),
        "mahalanobis": 4 * (3 * 6 + 3 * 36),
        "neighbors": 4 * (48 * 6 + 48),
    }
    for name, method in IDENTIFIERS.items():
        assert method.bytes(method.fit(features, **OPTIONS[name][0])) == want[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_problems_of_options_are_found_without_features(name):
    method = IDENTIFIERS[name]
    for options in OPTIONS[name]:
        assert method.problems(options) == []
    (found,) = method.problems({"nromalize": True})
    assert found.startswith(f"nromalize: unknown, expected some of {list(method.options)}")


def test_layers_must_fit():
    method = IDENTIFIERS["shared_mahalanobis"]
    features = _layered()
    for bad in ([features[0], features[1][:, 0]], [features[0], features[1][:, :1]]):
        with pytest.raises(ValueError, match=r"features_per_task: got shapes .* with one L"):
            method.fit(bad)
    state = method.fit(features)
    for bad in (features[0][:, :1], features[0][:, 0]):
        with pytest.raises(ValueError, match=r"features: got shape .* expected \[B, 2, d\]"):
            method.scores(state, bad)
    with pytest.raises(ValueError, match=r"features: got shape .* expected \[n, 2, d\]"):
        method.add(state, features[0][:, 0])


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("center", [True, False])
def test_whitened_signatures_equal_the_reference(num_tasks, center):
    features, inputs = ref.points(num_tasks), np.concatenate(ref.points(2, 5, seed=1))
    # One task's own whitened features have no direction before another; shrinkage gives them one.
    for shrinkage in (0.3, 0)[: min(num_tasks, 2)]:
        state = subspace.fit(features, 2, whiten=True, center=center, shrinkage=shrinkage)
        want = ref.whitened_subspace_scores(features, inputs, 2, center, shrinkage)
        np.testing.assert_allclose(subspace.scores(state, inputs), want, rtol=1e-4, atol=1e-4)


def test_whitening_needs_a_covariance_and_a_fraction():
    with pytest.raises(ValueError, match="the inputs of each task are all equal"):
        subspace.fit([np.ones((4, 3))], 1, whiten=True)
    with pytest.raises(ValueError, match=r"(?s)energy: got 2.*shrinkage: got -1"):
        subspace.fit(ref.points(1), 1, shrinkage=-1, energy=2)
