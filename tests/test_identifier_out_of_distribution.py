import jax
import numpy as np
import pytest
import references_identifier as ref

from retex_jax.identifier import out_of_distribution as ood


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_entropy_equals_the_reference(num_tasks, temperature):
    scores = 5 * np.random.default_rng(0).normal(size=(9, num_tasks)).astype("f4")
    found = ood.entropy(scores, temperature)
    p = ref.softmax(np.float64(scores) / temperature)
    np.testing.assert_allclose(found, -np.sum(p * np.log(p), axis=1), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32
    with jax.disable_jit():
        np.testing.assert_allclose(ood.entropy(scores, temperature), found, rtol=1e-5, atol=1e-6)


def test_entropy_by_hand():
    found = ood.entropy(np.array([[0.0, 0, 0, 0], [-1e4, 0, -1e4, -1e4], [0, 0, -1e4, -1e4]]))
    np.testing.assert_allclose(found, [np.log(4), 0, np.log(2)], atol=1e-6)
    for bad in (0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="temperature: got"):
            ood.entropy(np.zeros((1, 2)), bad)


def test_residual_is_minus_the_largest_score():
    scores = np.array([[-3.0, -1.0], [-7.0, -9.0]])
    np.testing.assert_array_equal(ood.residual(scores), [1, 7])


def test_a_target_keeps_that_many_seen_inputs():
    rng = np.random.default_rng(0)
    for count in (1, 7, 20, 100):
        seen = np.round(rng.normal(size=count), 1)  # with ties
        for target in (1e-9, 0.1, 0.5, 0.95, 1.0):
            found = ood.threshold(seen, target=target)
            assert np.mean(seen <= found) >= target - 1e-12
            below = seen[seen < found]
            assert np.mean(seen < found) < target or not len(below)
    assert ood.threshold(np.arange(20.0), target=0.95) == 18
    assert ood.threshold(np.arange(10.0), target=0.3) == 2
    assert ood.threshold(np.zeros(3)) == 0


def test_youden_by_hand():
    # Above 3: nothing seen, two of three unseen. Halfway between 3 and 5.
    assert ood.threshold(np.array([1.0, 2, 3]), np.array([2.0, 5, 6])) == 4
    assert ood.threshold(np.array([1.0, 2]), np.array([3.0])) == 2.5
    # Nothing is gained anywhere: nothing is taken as outside.
    assert ood.threshold(np.array([1.0, 2]), np.array([1.0, 2])) == 2
    assert ood.threshold(np.array([5.0]), np.array([1.0])) == 5


def test_youden_is_the_best_of_all_thresholds():
    rng = np.random.default_rng(0)
    for _ in range(30):
        seen = np.round(rng.normal(size=rng.integers(1, 30)), 1)
        unseen = np.round(rng.normal(0.7, 1, size=rng.integers(1, 30)), 1)
        cut = ood.threshold(seen, unseen)
        gain = np.mean(unseen > cut) - np.mean(seen > cut)
        assert gain == pytest.approx(ref.youden(seen, unseen), abs=1e-12)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match="seen") as error:
        ood.threshold(np.zeros((2, 2)), np.array([np.nan]), target=0)
    starts = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert starts == ["seen", "unseen", "target"]
    with pytest.raises(ValueError, match=r"seen: got shape \(0,\)"):
        ood.threshold(np.zeros(0))
    for bad in (1.1, np.nan):
        with pytest.raises(ValueError, match="target: got"):
            ood.threshold(np.zeros(3), target=bad)
