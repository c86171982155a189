import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references

from retex_jax.identifier import subspace


def _features(num_tasks=3, count=20, width=12, seed=0):
    """Points near affine planes of three dimensions, one a task."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(num_tasks):
        center, plane = rng.normal(size=width), rng.normal(size=(3, width))
        points = center + rng.normal(size=(count, 3)) @ plane
        result.append((points + 0.05 * rng.normal(size=points.shape)).astype(np.float32))
    return result


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_equal_the_reference(num_tasks, center, normalize):
    calibration = _features(num_tasks)
    inputs = np.concatenate([*_features(num_tasks, 4, seed=0), *_features(2, 3, seed=9)])
    signatures = subspace.fit(calibration, rank=3, center=center, normalize=normalize)
    found = subspace.scores(signatures, inputs)
    want = references.subspace_scores(calibration, inputs, 3, center, normalize)
    assert found.shape == (len(inputs), num_tasks)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert (np.asarray(found) <= 0).all()


def test_defaults_are_rank_8_centred_and_not_normalised():
    calibration = _features(2)
    found = subspace.scores(subspace.fit(calibration), calibration[0])
    want = references.subspace_scores(calibration, calibration[0], 8, True, False)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_finds_the_task():
    calibration = _features(8, 40)
    signatures = subspace.fit([task[:30] for task in calibration], rank=3)
    for task, features in enumerate(calibration):
        found = np.asarray(subspace.scores(signatures, features[30:])).argmax(axis=1)
        assert (found == task).all()


def test_by_hand():
    # A line through (0, 1) along x, and one through (5, 5) along y.
    lines = [np.array([[-1, 1], [1, 1]]), np.array([[5, 4], [5, 6]])]
    signatures = subspace.fit(lines, rank=1)
    found = subspace.scores(signatures, np.array([[7.0, 3.0], [5.0, -9.0]]))
    np.testing.assert_allclose(found, [[-2, -2], [-10, 0]], rtol=1e-6, atol=1e-6)
    uncentred = subspace.fit([np.array([[0, 2], [0, 3]])], rank=1, center=False)
    found = subspace.scores(uncentred, np.array([[3.0, 7.0]]))
    np.testing.assert_allclose(found, [[-3]], rtol=1e-6)


def test_order_of_tasks_and_inputs():
    calibration, inputs = _features(4), np.concatenate(_features(4, 2, seed=5))
    found = subspace.scores(subspace.fit(calibration, rank=3), inputs)
    order = [2, 0, 3, 1]
    permuted = subspace.fit([calibration[task] for task in order], rank=3)
    again = subspace.scores(permuted, inputs[::-1])
    np.testing.assert_allclose(again, np.asarray(found)[::-1][:, order], rtol=1e-5, atol=1e-5)
    # The score of an input does not depend on the inputs beside it.
    for row in range(len(inputs)):
        alone = subspace.scores(subspace.fit(calibration, rank=3), inputs[row : row + 1])
        np.testing.assert_allclose(alone[0], found[row], rtol=1e-5, atol=1e-5)


def test_tasks_of_different_sizes():
    calibration = [
        features[:count] for features, count in zip(_features(3), (5, 20, 9), strict=True)
    ]
    signatures = subspace.fit(calibration, rank=3)
    assert signatures.bases.shape == (3, 3, 12)
    assert signatures.centers.shape == (3, 12)
    for basis in np.asarray(signatures.bases):
        np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-6)
    inputs = calibration[0]
    np.testing.assert_allclose(
        subspace.scores(signatures, inputs),
        references.subspace_scores(calibration, inputs, 3),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("center", [True, False])
def test_energy_takes_only_the_dimensions_it_needs(center):
    rng = np.random.default_rng(0)
    # Squared singular values 16, 4, 1, 0.25 and a cloud that is centred already.
    left = np.linalg.qr(np.concatenate([x := rng.normal(size=(10, 4)), -x]))[0]
    right = np.linalg.qr(rng.normal(size=(7, 4)))[0].T
    features = left @ np.diag([4.0, 2.0, 1.0, 0.5]) @ right
    total = 21.25
    for energy, want in [(0.5, 1), (16.1 / total, 2), (20.5 / total, 3), (1.0, 4), (1e-9, 1)]:
        signatures = subspace.fit([features], rank=4, center=center, energy=energy)
        norms = np.linalg.norm(np.asarray(signatures.bases[0]), axis=1)
        np.testing.assert_allclose(norms, [1] * want + [0] * (4 - want), atol=1e-6)
        np.testing.assert_allclose(
            subspace.scores(signatures, features),
            references.subspace_scores([features], features, want, center),
            rtol=1e-4,
            atol=1e-5,
        )
    capped = subspace.fit([features], rank=2, energy=1.0)
    assert capped.bases.shape == (1, 2, 7)


def test_repeated_inputs_span_no_more_than_they_do():
    # Four distinct inputs span three centred dimensions: a fourth direction would be rounding, and
    # an input outside would be scored by chance.
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(4, 9))
    signatures = subspace.fit([np.repeat(distinct, 5, axis=0)], rank=6)
    norms = np.linalg.norm(np.asarray(signatures.bases[0]), axis=1)
    np.testing.assert_allclose(norms, [1, 1, 1, 0, 0, 0], atol=1e-6)
    inputs = rng.normal(size=(5, 9))
    np.testing.assert_allclose(
        subspace.scores(signatures, inputs),
        references.subspace_scores([distinct], inputs, 3),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes(dtype):
    calibration = [features.astype(dtype) for features in _features(2)]
    for features in (calibration, [jnp.asarray(task, jnp.float32) for task in calibration]):
        found = subspace.scores(subspace.fit(features, rank=3), np.float32(calibration[0]))
        want = references.subspace_scores(calibration, calibration[0], 3)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_signatures_are_a_pytree_and_scores_run_under_jit():
    calibration = _features(3)
    signatures = subspace.fit(calibration, rank=3, normalize=True)
    leaves, structure = jax.tree.flatten(signatures)
    assert len(leaves) == 2
    rebuilt = jax.tree.unflatten(structure, list(map(np.asarray, leaves)))
    want = subspace.scores(signatures, calibration[0])
    np.testing.assert_array_equal(subspace.scores(rebuilt, calibration[0]), want)
    within = jax.jit(lambda signatures, features: subspace.scores(signatures, features).argmax(1))
    np.testing.assert_array_equal(within(signatures, calibration[0]), np.asarray(want).argmax(1))
    with jax.disable_jit():
        np.testing.assert_allclose(
            subspace.scores(signatures, calibration[0]), want, rtol=1e-5, atol=1e-6
        )


def test_fitting_twice_is_bitwise_equal():
    one, other = (subspace.fit(_features(3), rank=3) for _ in range(2))
    np.testing.assert_array_equal(one.bases, other.bases)
    np.testing.assert_array_equal(one.centers, other.centers)


def test_sharded_inputs(place_on_8_devices):
    calibration = _features(3, 24, 16)
    signatures = subspace.fit(calibration, rank=3)
    inputs = place_on_8_devices({"features": np.ascontiguousarray(calibration[1].T)})["features"].T
    assert not inputs.sharding.is_fully_replicated
    np.testing.assert_allclose(
        subspace.scores(signatures, inputs),
        subspace.scores(signatures, calibration[1]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_products_are_at_the_highest_precision():
    signatures = subspace.fit(_features(3), rank=3)
    text = str(jax.make_jaxpr(subspace.scores)(signatures, jnp.ones((4, 12))))
    assert text.count("dot_general[") == 2
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


@pytest.mark.parametrize("rank", [0, -1, 12, 100, True, 2.0, "3", None])
def test_bad_ranks(rank):
    with pytest.raises(ValueError, match=r"rank: got .* expected 1 to 11"):
        subspace.fit(_features(2), rank=rank)


@pytest.mark.parametrize(("center", "largest"), [(True, 4), (False, 5)])
def test_rank_is_limited_by_the_inputs(center, largest):
    features = [task[:5] for task in _features(2)]
    subspace.fit(features, rank=largest, center=center)
    with pytest.raises(ValueError, match=f"rank: got {largest + 1}, expected 1 to {largest}"):
        subspace.fit(features, rank=largest + 1, center=center)


@pytest.mark.parametrize("energy", [0, -1.0, 1.1, np.nan])
def test_bad_energy(energy):
    with pytest.raises(ValueError, match="energy: got"):
        subspace.fit(_features(2), rank=2, energy=energy)


def test_no_task():
    with pytest.raises(ValueError, match="features_per_task: got no task"):
        subspace.fit([])


def test_all_problems_are_listed_at_once():
    good = _features(1)[0]
    spoiled = good.copy()
    spoiled[3, 4] = np.inf
    bad = [good, good[:, :5], good[0], spoiled, good[:2]]
    with pytest.raises(ValueError, match="features") as error:
        subspace.fit(bad, rank=5, energy=2)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "features_per_task[1]",
        "features_per_task[2]",
        "features_per_task[3]",
        "rank",
        "energy",
    ]
    assert "task 4" in lines[3]
