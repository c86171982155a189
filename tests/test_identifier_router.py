import jax
import numpy as np
import pytest
import references_identifier as ref
import references_routed

from retex_jax.identifier import router

FAST = {"epochs": 3, "batch_size": 16}


def _standardized(features, count):
    """What the router reads, if all tasks have `count` inputs: a function of inputs."""
    x = np.float64(np.concatenate([task[:count] for task in features]))
    return lambda inputs: (np.float64(inputs) - x.mean(axis=0)) / x.std(axis=0)


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_linear_scores_are_logits_of_standardised_features(num_tasks):
    features, inputs = ref.points(num_tasks, 12), ref.points(1, 5, seed=1)[0]
    state = router.fit(features, **FAST)
    out = jax.device_get(state.router.variables)["params"]["out"]
    want = _standardized(features, 12)(inputs) @ np.float64(out["kernel"]) + out["bias"]
    found = router.scores(state, inputs)
    assert found.dtype == np.float32
    assert found.shape == (5, num_tasks)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_mlp_scores_are_logits_of_standardised_features(batch_norm):
    features, inputs = ref.points(3, 12), ref.points(1, 5, seed=1)[0]
    state = router.fit(features, kind="mlp", batch_norm=batch_norm, **FAST)
    variables = jax.device_get(state.router.variables)
    want = references_routed.mlp_router(variables, _standardized(features, 12)(inputs), batch_norm)
    np.testing.assert_allclose(router.scores(state, inputs), want, rtol=1e-4, atol=1e-5)


def test_features_of_unit_length():
    features, inputs = ref.points(2, 12), ref.points(1, 5, seed=1)[0]
    state = router.fit(features, normalize=True, **FAST)
    other = router.fit([np.float32(ref.unit(x)) for x in features], **FAST)
    np.testing.assert_allclose(
        router.scores(state, inputs), router.scores(other, ref.unit(inputs)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_learns_to_tell_tasks_apart(kind):
    features = ref.points(4, 60, spread=0.3)
    state = router.fit(
        [x[:40] for x in features], kind=kind, epochs=60, learning_rate=2e-2, batch_size=64
    )
    for task, x in enumerate(features):
        assert (np.asarray(router.scores(state, x[40:])).argmax(axis=1) == task).mean() > 0.9


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_units_of_features_do_not_matter(kind):
    features, inputs = ref.points(3, 16), ref.points(1, 5, seed=1)[0]
    scale = np.float32([1, 8, 0.125, 2, 4, 0.5])  # powers of two are exact
    first, second = (router.fit([x * s for x in features], kind=kind, **FAST) for s in (1, scale))
    np.testing.assert_allclose(
        router.scores(second, inputs * scale), router.scores(first, inputs), rtol=1e-3, atol=1e-4
    )


def test_constant_features_get_no_weight():
    def wider(x):
        return np.concatenate([x, np.full((len(x), 1), 7, np.float32)], axis=1)

    features, inputs = ref.points(2, 16), ref.points(1, 5, seed=1)[0]
    state = router.fit([wider(x) for x in features], **FAST)
    assert state.scale[-1] == 0
    moved = wider(inputs)
    moved[:, -1] = 1e6
    np.testing.assert_array_equal(router.scores(state, moved), router.scores(state, wider(inputs)))
    flat = router.fit([np.ones((4, 3)), np.ones((4, 3))], **FAST)
    assert np.isfinite(router.scores(flat, np.ones((1, 3)))).all()


def test_calibration_is_balanced(monkeypatch):
    seen = []
    real = router.routers.fit

    def spy(features, *args, **kwargs):
        seen.append([len(x) for x in features])
        return real(features, *args, **kwargs)

    monkeypatch.setattr(router.routers, "fit", spy)
    features = [x[:count] for x, count in zip(ref.points(3, 40), (40, 12, 20), strict=True)]
    router.fit(features, **FAST)
    router.fit(features, num_inputs=7, **FAST)
    assert seen == [[12] * 3, [7] * 3]
    with pytest.raises(ValueError, match=r"features_per_task\[1\]: got 12 inputs, expected 13"):
        router.fit(features, num_inputs=13, **FAST)


def test_the_key_decides():
    features = ref.points(2, 16)
    first, again, other = (
        jax.device_get(router.fit(features, key=jax.random.key(seed), **FAST)) for seed in (3, 3, 4)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [r.router.variables["params"]["out"]["kernel"] for r in (first, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_all_problems_are_listed_at_once():
    good = ref.points(1)[0]
    bad = {"kind": "deep", "dropout": 1, "learning_rate": 0, "epochs": 0, "held_out": 0}
    with pytest.raises(ValueError, match="features") as error:
        router.fit([good, good[:, :3], good[:1]], batch_size=0, num_inputs=1, **bad)
    lines = str(error.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {
        "features_per_task[1]",
        "features_per_task[2]",
        "batch_size",
        "num_inputs",
        *bad,
    }
    with pytest.raises(ValueError, match="got no task"):
        router.fit([])
