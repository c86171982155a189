import numpy as np
import pytest
import references_held_out as held
import references_identifier as ref

from retex_jax.identifier import held_out
from retex_jax.identifier import out_of_distribution as ood


def _splits(num_tasks, layers=False):
    """Calibration, validation and test features of different inputs of the same clouds."""
    rng = np.random.default_rng(3)
    whole = ref.points(num_tasks, 60)
    whole = [x[rng.permutation(60)] for x in whole]
    if layers:
        whole = [np.stack([x, x[:, ::-1] + 1], axis=1) for x in whole]
    return [[x[rows] for x in whole] for rows in (slice(0, 30), slice(30, 45), slice(45, 60))]


@pytest.mark.parametrize(("num_tasks", "unseen"), [(2, [1]), (4, [0]), (8, [5, 2])])
@pytest.mark.parametrize("target", [0.8, 1.0])
def test_figures_equal_the_reference(num_tasks, unseen, target):
    calibration, validation, test = _splits(num_tasks)
    found = held_out.detect(
        "shared_mahalanobis",
        {"shrinkage": 0.2},
        calibration,
        validation,
        test,
        unseen,
        target=target,
    )
    seen = [task for task in range(num_tasks) if task not in unseen]
    fitted = [calibration[task] for task in seen]

    def scores(tasks, features):
        inputs = np.concatenate([features[task] for task in tasks])
        return ref.shared_scores(fitted, inputs, 0.2)

    known, inside, outside = scores(seen, validation), scores(seen, test), scores(unseen, test)
    warmth = held.temperature(known, np.repeat(range(len(seen)), 15)) if len(seen) > 1 else 1.0
    measures = {
        "entropy": lambda x: held.entropy(x, warmth),
        "residual": lambda x: -x.max(axis=1),
    }
    assert [one.measure for one in found] == list(measures) == list(held_out.MEASURES)
    for one in found:
        measure = measures[one.measure]
        want = held.detection(measure(known), measure(inside), measure(outside), target)
        assert one.unseen == tuple(unseen)
        np.testing.assert_allclose(one.inside, measure(inside), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(one.outside, measure(outside), rtol=1e-3, atol=1e-4)
        if len(seen) == 1 and one.measure == "entropy":  # of one task it is 0
            assert one.figures["auroc"] == 0.5
            continue
        for name, value in want.items():
            assert one.figures[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
        assert one.figures["temperature"] == (
            pytest.approx(warmth, rel=1e-3) if one.measure == "entropy" else None
        )


def test_far_tasks_are_told_and_equal_ones_are_not():
    calibration, validation, test = _splits(3)
    far = [*test[:2], test[2] + 1e3]
    _, residual = held_out.detect("subspace", {"rank": 2}, calibration, validation, far, [2])
    assert residual.figures["auroc"] == residual.figures["recall"] == 1
    same = [test[0], test[1], np.concatenate(test[:2])]
    for one in held_out.detect("subspace", {"rank": 2}, calibration, validation, same, [2]):
        assert one.figures["auroc"] == pytest.approx(0.5)


def test_nothing_of_the_held_out_tasks_is_used_but_their_test_inputs():
    calibration, validation, test = _splits(3, layers=True)
    args = ("subspace", {"rank": 2, "joint": True})
    want = held_out.detect(*args, calibration, validation, test, [1])
    for part in (calibration, validation):
        part[1] = np.full_like(part[1], np.nan)
    for one, other in zip(
        held_out.detect(*args, calibration, validation, test, [1]), want, strict=True
    ):
        assert one.figures == other.figures
        np.testing.assert_array_equal(one.outside, other.outside)


def test_the_threshold_is_not_of_test_inputs():
    calibration, validation, test = _splits(3)
    args = ("subspace", {"rank": 2}, calibration, validation)
    one = held_out.detect(*args, test, [1])
    other = held_out.detect(*args, [x + 5 for x in test], [1])
    for before, after in zip(one, other, strict=True):
        for name in ("threshold", "temperature"):
            assert before.figures[name] == after.figures[name]
        assert before.figures["auroc"] != after.figures["auroc"]


def test_experts_features():
    calibration, validation, test = _splits(3)
    validation, test = ([np.stack([x] * 3) for x in part] for part in (validation, test))
    _, residual = held_out.detect("mahalanobis", {}, calibration, validation, test, [0])
    fitted = calibration[1:]
    inputs = np.concatenate([x[0] for x in test[1:]])
    want = -ref.own_scores(fitted, [inputs] * 2, 0.1).max(axis=1)
    np.testing.assert_allclose(residual.inside, want, rtol=1e-3)


@pytest.mark.parametrize("unseen", [[], [0, 1, 2], [1, 1], [3], [-1]])
def test_tasks_to_hold_out_are_checked(unseen):
    with pytest.raises(ValueError, match="unseen: got"):
        held_out.detect("subspace", {"rank": 2}, *_splits(3), unseen)


@pytest.mark.parametrize("num_tasks", [2, 8])
def test_temperature_equals_the_reference(num_tasks):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, num_tasks, 40)
    scores = 7 * (np.eye(num_tasks)[ids] + rng.normal(size=(40, num_tasks)))
    assert ood.fit_temperature(scores, ids) == pytest.approx(held.temperature(scores, ids))
    shifted = scores + rng.normal(size=(40, 1))
    assert ood.fit_temperature(3 * shifted, ids) == pytest.approx(
        3 * ood.fit_temperature(scores, ids)
    )


def test_temperature_of_scores_that_tell_nothing():
    assert ood.fit_temperature(np.zeros((4, 1)), [0] * 4) == 1
    assert ood.fit_temperature(np.full((4, 3), -2.0), [0, 1, 2, 0]) == 1


@pytest.mark.parametrize(
    ("scores", "ids", "said"),
    [
        (np.zeros(3), [0] * 3, "scores: got shape"),
        (np.zeros((0, 2)), [], "scores: got shape"),
        (np.full((2, 2), np.nan), [0, 1], "scores: got shape"),
        (np.zeros((2, 2)), [0], "task_ids: got shape"),
        (np.zeros((2, 2)), [0, 2], "task_ids: got shape"),
    ],
)
def test_temperature_checks_what_it_gets(scores, ids, said):
    with pytest.raises(ValueError, match=said):
        ood.fit_temperature(scores, ids)
