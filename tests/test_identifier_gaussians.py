import jax
import numpy as np
import pytest
import references_identifier as ref

from retex_jax.identifier import mahalanobis, shared_mahalanobis

BOTH = [shared_mahalanobis, mahalanobis]


def _close(found, want, rtol=1e-4):
    np.testing.assert_allclose(found, want, rtol=rtol, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("shrinkage", [0, 0.1, 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_shared_covariance_equals_the_reference(num_tasks, shrinkage, normalize):
    features = ref.points(num_tasks)
    inputs = np.concatenate(ref.points(2, 5, seed=1))
    state = shared_mahalanobis.fit(features, shrinkage=shrinkage, normalize=normalize)
    found = shared_mahalanobis.scores(state, inputs)
    assert found.shape == (10, num_tasks)
    assert found.dtype == np.float32
    _close(found, ref.shared_scores(features, inputs, shrinkage, normalize))


def test_shared_covariance_is_linear_discriminant_analysis():
    features, inputs = ref.points(4), np.concatenate(ref.points(4, 6, seed=2))
    found = np.float64(
        shared_mahalanobis.scores(shared_mahalanobis.fit(features, shrinkage=0), inputs)
    )
    want = ref.discriminants(features, inputs)
    # Up to a number of the input's own, half the scores are the discriminant functions.
    np.testing.assert_allclose((found - found[:, :1]) / 2, want - want[:, :1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("shrinkage", [0, 0.1, 1])
def test_own_covariance_equals_the_reference(num_tasks, shrinkage):
    features = ref.points(num_tasks)
    inputs = np.stack([np.concatenate(ref.points(2, 4, seed=s)) for s in range(num_tasks)])
    state = mahalanobis.fit(features, shrinkage=shrinkage)
    found = mahalanobis.scores(state, inputs)
    assert found.shape == (8, num_tasks)
    assert found.dtype == np.float32
    _close(found, ref.own_scores(features, inputs, shrinkage))
    same = mahalanobis.scores(state, inputs[0])
    _close(same, ref.own_scores(features, [inputs[0]] * num_tasks, shrinkage))


def test_calibration_inputs_lie_at_the_distance_of_the_dimensions():
    # With C_t inverted as it is, the mean squared distance of the inputs it is from is d.
    features = ref.points(2, 40, 5)
    state = mahalanobis.fit(features, shrinkage=0)
    found = np.asarray(mahalanobis.scores(state, np.stack(features)))
    np.testing.assert_allclose(found.mean(axis=0), -5, rtol=1e-4)


def test_by_hand():
    # Variances 4 and 1 about (0, 0), the same about (8, 2).
    cloud = np.array([[2.0, 1], [2, -1], [-2, 1], [-2, -1]])
    features = [cloud, cloud + np.array([8, 2])]
    inputs = np.array([[4.0, 0], [8, 5]])
    want = [[-4, -8], [-41, -9]]
    for module in BOTH:
        state = module.fit(features, shrinkage=0)
        np.testing.assert_allclose(module.scores(state, inputs), want, rtol=1e-5)


@pytest.mark.parametrize("module", BOTH)
def test_moving_all_features_changes_nothing(module):
    features, inputs = ref.points(3), ref.points(1, 8, seed=3)[0]
    want = module.scores(module.fit(features), inputs)
    moved = module.fit([x + 5 for x in features])
    np.testing.assert_allclose(module.scores(moved, inputs + 5), want, rtol=1e-3, atol=1e-3)


def test_any_linear_map_changes_nothing_without_shrinkage():
    features, inputs = ref.points(3), ref.points(1, 8, seed=3)[0]
    change = np.random.default_rng(0).normal(size=(6, 6)) + 3 * np.eye(6)
    for module in BOTH:
        want = module.scores(module.fit(features, shrinkage=0), inputs)
        changed = module.fit([np.float64(x) @ change for x in features], shrinkage=0)
        found = module.scores(changed, np.float64(inputs) @ change)
        np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("module", BOTH)
def test_fewer_inputs_than_dimensions(module):
    features, inputs = ref.points(2, 5, 12), ref.points(1, 4, 12, seed=1)[0]
    if module is mahalanobis:
        want = [ref.own_scores(features, [inputs] * 2, s) for s in (0, 0.2)]
    else:
        want = [ref.shared_scores(features, inputs, s) for s in (0, 0.2)]
    for shrinkage, scores in zip((0, 0.2), want, strict=True):
        found = module.scores(module.fit(features, shrinkage=shrinkage), inputs)
        np.testing.assert_allclose(found, scores, rtol=2e-3)


@pytest.mark.parametrize("module", BOTH)
def test_constant_features_tell_nothing_and_break_nothing(module):
    features, inputs = ref.points(3), ref.points(1, 8, seed=3)[0]
    want = module.scores(module.fit(features, shrinkage=0), inputs)

    def wider(x):
        return np.concatenate([x, np.full((len(x), 2), 7.0)], axis=1)

    state = module.fit([wider(x) for x in features], shrinkage=0)
    np.testing.assert_allclose(module.scores(state, wider(inputs)), want, rtol=1e-4, atol=1e-4)


def test_equal_inputs_have_no_covariance():
    same = np.ones((4, 3))
    rest = ref.points(1, 9, 3)[0]
    with pytest.raises(ValueError, match="the inputs of each task are all equal"):
        shared_mahalanobis.fit([same, 2 * same])
    # One direction: of unit length they are equal.
    with pytest.raises(ValueError, match="the inputs of each task are all equal"):
        shared_mahalanobis.fit([same * [[1], [2], [3], [5]]], normalize=True)
    with pytest.raises(ValueError, match=r"features_per_task\[1\]: the inputs are all equal"):
        mahalanobis.fit([rest, same])
    found = shared_mahalanobis.scores(shared_mahalanobis.fit([same, rest], shrinkage=0), same[:1])
    assert found[0, 0] == pytest.approx(0, abs=1e-4)


def test_scores_need_all_experts():
    state = mahalanobis.fit(ref.points(3))
    with pytest.raises(ValueError, match=r"features: got shape \(2, 4, 6\), expected \[3, B, d\]"):
        mahalanobis.scores(state, np.zeros((2, 4, 6)))


@pytest.mark.parametrize("module", BOTH)
def test_all_problems_are_listed_at_once(module):
    good = ref.points(1)[0]
    spoiled = good.copy()
    spoiled[0, 0] = np.nan
    with pytest.raises(ValueError, match="features") as error:
        module.fit([good, good[:, :3], good[:0], spoiled], shrinkage=2)
    starts = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert starts == [*(f"features_per_task[{task}]" for task in (1, 2, 3)), "shrinkage"]
    with pytest.raises(ValueError, match="got no task"):
        module.fit([])
    for bad in (-0.1, np.nan, True):
        with pytest.raises(ValueError, match="shrinkage: got"):
            module.fit([good], shrinkage=bad)


@pytest.mark.parametrize("module", BOTH)
def test_products_are_at_the_highest_precision(module):
    text = str(jax.make_jaxpr(module.scores)(module.fit(ref.points(2)), np.ones((4, 6), "f4")))
    assert text.count("dot_general[") == text.count("(Precision.HIGHEST, Precision.HIGHEST)") == 1
