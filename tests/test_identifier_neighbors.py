import numpy as np
import pytest
import references_identifier as ref

from retex_jax.identifier import neighbors


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_votes_equal_brute_force(num_tasks, k):
    features = ref.points(num_tasks, 12)
    inputs = np.concatenate(ref.points(3, 7, seed=1))  # 21: more than a chunk
    found = neighbors.scores(neighbors.fit(features, k=k), inputs)
    assert found.shape == (21, num_tasks)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, ref.votes(features, inputs, k), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 4])
def test_distances_equal_brute_force(num_tasks, k):
    features = [x[: 4 + task] for task, x in enumerate(ref.points(num_tasks, 12))]
    inputs = np.concatenate(ref.points(3, 7, seed=1))
    found = neighbors.scores(neighbors.fit(features, k=k, score="distance"), inputs)
    np.testing.assert_allclose(found, ref.own_distances(features, inputs, k), rtol=1e-5)


def test_unit_length_is_the_order_by_cosine():
    features, inputs = ref.points(3, 9), ref.points(1, 8, seed=4)[0]
    found = neighbors.scores(neighbors.fit(features, k=5, normalize=True), inputs)
    cosines = ref.unit(np.float64(inputs)) @ ref.unit(np.float64(np.concatenate(features))).T
    nearest = np.argsort(-cosines, axis=1)[:, :5] // 9
    want = np.stack([(nearest == task).mean(axis=1) for task in range(3)], axis=1)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_points_of_equal_distance_share_the_votes_that_are_left():
    # 0 is at distance 1 of -1, 1, 1 and at 2 of 2: of three votes two tasks take 1 and 2; of one 1/3 and 2/3.
    features = [np.array([[-1.0]]), np.array([[1.0], [1.0], [2.0]])]
    for k, want in [
        (1, [1 / 3, 2 / 3]),
        (2, [1 / 3, 2 / 3]),
        (3, [1 / 3, 2 / 3]),
        (4, [1 / 4, 3 / 4]),
    ]:
        found = neighbors.scores(neighbors.fit(features, k=k), np.zeros((1, 1)))
        np.testing.assert_allclose(found, [want], atol=1e-6)
    swapped = neighbors.fit(features[::-1], k=1)
    np.testing.assert_allclose(neighbors.scores(swapped, np.zeros((1, 1))), [[2 / 3, 1 / 3]], 1e-5)


def test_a_calibration_point_is_its_own_neighbour_far_from_the_origin():
    # Squares of 1e4 have rounding of 10: expanded squares would not find the point.
    features = [np.float32(1e4 + x) for x in ref.points(4, 10, spread=0.1)]
    state = neighbors.fit(features, k=1, score="distance")
    for task, own in enumerate(features):
        np.testing.assert_array_equal(neighbors.scores(state, own)[:, task], 0)


def test_constant_features_and_duplicated_points():
    constant = [np.ones((3, 2)), np.ones((6, 2))]
    found = neighbors.scores(neighbors.fit(constant, k=4), np.ones((1, 2)))
    np.testing.assert_allclose(found, [[1 / 3, 2 / 3]], rtol=1e-6)
    features, inputs = ref.points(2, 8), ref.points(1, 5, seed=1)[0]
    doubled = [np.repeat(x, 2, axis=0) for x in features]
    np.testing.assert_allclose(
        neighbors.scores(neighbors.fit(doubled, k=6), inputs),
        neighbors.scores(neighbors.fit(features, k=3), inputs),
        atol=1e-6,
    )


def test_a_task_that_is_added_may_have_few_points():
    features, inputs = ref.points(3, 9), ref.points(1, 5, seed=1)[0]
    few = [*features[:2], features[2][:2]]
    found = neighbors.add(neighbors.fit(few[:2], k=5), few[2])
    np.testing.assert_allclose(
        neighbors.scores(found, inputs), neighbors.scores(neighbors.fit(few, k=5), inputs)
    )
    with pytest.raises(ValueError, match="k: got 5, expected 1 to 2"):
        neighbors.add(neighbors.fit(few[:2], k=5, score="distance"), few[2])
    alone = neighbors.take(neighbors.fit(few, k=5), [2])
    assert alone.k == 2


def test_all_problems_are_listed_at_once():
    good = ref.points(1)[0]
    with pytest.raises(ValueError, match="features") as error:
        neighbors.fit([good, good[:, :3]], k=0, score="cosine")
    starts = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert starts == ["features_per_task[1]", "k", "score"]
    for bad in (True, 2.0, "3"):
        with pytest.raises(ValueError, match="k: got"):
            neighbors.fit([good], k=bad)
    with pytest.raises(ValueError, match="k: got 61, expected 1 to 60"):
        neighbors.fit([good, good], k=61)
    neighbors.fit([good, good], k=60)
    with pytest.raises(ValueError, match="k: got 31, expected 1 to 30"):
        neighbors.fit([good, good], k=31, score="distance")
    with pytest.raises(ValueError, match="got no task"):
        neighbors.fit([])
