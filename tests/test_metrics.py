import numpy as np
import pytest

from retex_jax import metrics

MERGED = {"a": 0.4, "b": 0.9}
INDIVIDUAL = {"a": 0.8, "b": 1.0}


def test_accuracy():
    assert metrics.accuracy(np.array([1, 2, 3, 3]), np.array([1, 0, 3, 2])) == 0.5
    assert metrics.accuracy([1], [1]) == 1
    assert isinstance(metrics.accuracy(np.array([1]), np.array([0])), float)


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 1), (2,))])
def test_accuracy_rejects(shapes):
    with pytest.raises(ValueError, match="predictions: got shape"):
        metrics.accuracy(*map(np.zeros, shapes))


def test_balanced_accuracy():
    labels = np.array([0, 0, 0, 2])
    assert metrics.balanced_accuracy(np.array([0, 0, 1, 2]), labels) == pytest.approx(5 / 6)
    assert metrics.balanced_accuracy(np.zeros(4, int), labels) == 0.5


def test_balanced_accuracy_rejects():
    for predictions, labels in [([0, 1], [0, 1, 1]), ([], [])]:
        with pytest.raises(ValueError, match="predictions: got shape"):
            metrics.balanced_accuracy(np.array(predictions, int), np.array(labels, int))


def test_confusion_matrix_has_true_classes_as_rows():
    predictions, labels = np.array([0, 1, 1, 2, 0]), np.array([0, 0, 1, 2, 2])
    found = metrics.confusion_matrix(predictions, labels, 4)
    np.testing.assert_array_equal(found, [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert found.dtype == np.int64
    assert not metrics.confusion_matrix(np.array([], int), np.array([], int), 2).any()


@pytest.mark.parametrize(("predictions", "labels"), [([3], [0]), ([0], [3]), ([-1], [1])])
def test_confusion_matrix_rejects_classes_that_are_none(predictions, labels):
    # Such an entry would otherwise be counted in another row, or far from where it belongs.
    with pytest.raises(ValueError, match="3"):
        metrics.confusion_matrix(np.array(predictions), np.array(labels), 3)


def test_means_over_tasks():
    assert metrics.normalized_accuracy(MERGED, INDIVIDUAL) == pytest.approx(0.7)
    assert metrics.accuracy_ratio(MERGED, INDIVIDUAL) == pytest.approx(1.3 / 1.8)
    assert metrics.adr(MERGED, INDIVIDUAL) == pytest.approx(0.5 / 1.8)
    reordered = dict(reversed(MERGED.items()))
    assert metrics.normalized_accuracy(reordered, INDIVIDUAL) == pytest.approx(0.7)
    assert metrics.normalized_accuracy(INDIVIDUAL, INDIVIDUAL) == 1
    assert metrics.adr(INDIVIDUAL, INDIVIDUAL) == 0


@pytest.mark.parametrize(
    "function", ["normalized_accuracy", "worst_normalized_accuracy", "accuracy_ratio", "adr"]
)
def test_means_over_tasks_reject(function):
    function = getattr(metrics, function)
    with pytest.raises(ValueError, match="merged: got tasks"):
        function({"a": 1.0}, INDIVIDUAL)
    with pytest.raises(ValueError, match="merged: got tasks"):
        function({**MERGED, "c": 1.0}, INDIVIDUAL)
    with pytest.raises(ValueError, match=r"individual.*'a'"):
        function(MERGED, {"a": 0.0, "b": 1.0})
    with pytest.raises(ValueError, match="task"):
        function({}, {})


def test_amr():
    assert metrics.amr(25, 100) == 0.25
    assert metrics.amr(0, 1) == 0
    for sizes in [(1, 0), (1, -1), (-1, 1)]:
        with pytest.raises(ValueError, match="bytes"):
            metrics.amr(*sizes)
