import numpy as np
import pytest
import references_identifier
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

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


def _ties(seed):
    """Scores of few values, and labels of both kinds."""
    rng = np.random.default_rng(seed)
    labels = rng.random(rng.integers(2, 40)) < 0.4
    labels[:2] = True, False
    return np.round(rng.normal(labels, 1), int(rng.integers(0, 3))), labels


@pytest.mark.parametrize("seed", range(20))
def test_ranking_equals_counting_pairs_and_scikit_learn(seed):
    scores, labels = _ties(seed)
    found = metrics.auroc(scores, labels), metrics.aupr(scores, labels)
    assert found[0] == pytest.approx(references_identifier.auroc(scores, labels), abs=1e-12)
    want = references_identifier.average_precision(scores, labels)
    assert found[1] == pytest.approx(want, abs=1e-12)
    assert found == pytest.approx(
        (roc_auc_score(labels, scores), average_precision_score(labels, scores)), abs=1e-12
    )
    order = np.random.default_rng(0).permutation(len(labels))
    assert (
        metrics.auroc(scores[order], labels[order]),
        metrics.aupr(scores[order], labels[order]),
    ) == found
    assert metrics.auroc(-scores, labels) == pytest.approx(1 - found[0], abs=1e-12)


def test_ranking_by_hand():
    labels = np.array([True, False, True, False])
    assert metrics.auroc(np.array([4, 3, 2, 1]), labels) == 0.75
    assert metrics.aupr(np.array([4, 3, 2, 1]), labels) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.auroc(np.zeros(4), labels) == metrics.aupr(np.zeros(4), labels) == 0.5
    assert metrics.auroc(np.array([9, 1, 8, 2]), labels) == 1
    assert metrics.aupr(np.array([9, 1, 8, 2]), labels) == 1
    assert metrics.aupr(np.array([1, 0]), np.array([True, True])) == 1


@pytest.mark.parametrize("seed", range(10))
def test_detection_equals_scikit_learn(seed):
    scores, labels = _ties(seed)
    predictions = scores > 0.5
    found = [
        measure(predictions, labels) for measure in (metrics.precision, metrics.recall, metrics.f1)
    ]
    want = precision_recall_fscore_support(labels, predictions, average="binary", zero_division=0)
    assert found == pytest.approx(list(want[:3]), abs=1e-12)


def test_detection_by_hand():
    labels = np.array([1, 1, 1, 0, 0], bool)
    predictions = np.array([1, 1, 0, 1, 0], bool)
    assert metrics.precision(predictions, labels) == pytest.approx(2 / 3)
    assert metrics.recall(predictions, labels) == pytest.approx(2 / 3)
    assert metrics.f1(np.array([1, 0, 0, 1, 0]), labels) == pytest.approx(0.4)
    nothing = np.zeros(5, bool)
    assert [m(nothing, labels) for m in (metrics.precision, metrics.recall, metrics.f1)] == [
        0,
        0,
        0,
    ]


def test_detection_rejects():
    for measure in (metrics.precision, metrics.recall, metrics.f1):
        with pytest.raises(ValueError, match="predictions: got shape"):
            measure(np.ones(2, bool), np.ones(3, bool))
        with pytest.raises(ValueError, match="labels: none is positive"):
            measure(np.ones(2, bool), np.zeros(2, bool))
    for measure in (metrics.auroc, metrics.aupr):
        for scores in (np.ones(2), np.array([1, np.nan, 2]), np.ones((3, 1))):
            with pytest.raises(ValueError, match="scores: got shape"):
                measure(scores, np.ones(3, bool))
        for count in (0, 2):
            with pytest.raises(ValueError, match="labels: none is positive"):
                measure(np.zeros(count), np.zeros(count, bool))
    with pytest.raises(ValueError, match="labels: all are positive"):
        metrics.auroc(np.zeros(2), np.ones(2, bool))


# What a task is measured by


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40).filter(
        lambda pairs: len({label for pair in pairs for label in pair}) > 1  # scikit-learn warns
    )
)
def test_matthews_equals_scikit_learn(pairs):
    predictions, labels = np.array(pairs).T
    found = metrics.matthews(predictions, labels)
    assert found == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-12)
    assert found == pytest.approx(metrics.matthews(labels, predictions), abs=1e-12)


def test_matthews_by_hand():
    labels = np.array([1, 1, 1, 0, 0])
    assert metrics.matthews(labels, labels) == pytest.approx(1)
    assert metrics.matthews(1 - labels, labels) == pytest.approx(-1)
    assert metrics.matthews(np.ones(5, int), labels) == 0
    # 2 true and 1 false positives, 1 false and 1 true negatives: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2).
    assert metrics.matthews(np.array([1, 1, 0, 1, 0]), labels) == pytest.approx(1 / 6)


@pytest.mark.parametrize("decimals", [0, 1, 8])
@pytest.mark.parametrize("seed", range(8))
def test_correlations_equal_scipys(seed, decimals):
    """With few decimals there are ties."""
    rng = np.random.default_rng(seed)
    y = np.round(rng.uniform(0, 5, rng.integers(3, 60)), decimals)
    x = np.round(y + rng.normal(0, 2, len(y)), decimals).astype(np.float32)
    found = metrics.pearson(x, y), metrics.spearman(x, y)
    want = scipy.stats.pearsonr(x.astype(float), y).statistic, scipy.stats.spearmanr(x, y).statistic
    assert found == pytest.approx(want, abs=1e-12)
    assert metrics.score("pearson_spearman", x[:, None], y) == pytest.approx(np.mean(want))


def test_correlations_by_hand():
    x, y = np.array([1.0, 2, 3, 10]), np.array([1.0, 2, 3, 4])
    assert metrics.spearman(x, y) == pytest.approx(1)
    assert metrics.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert metrics.pearson(-x, x) == -1
    assert metrics.pearson(1e300 * x, 1e-300 * x) == pytest.approx(1)
    assert metrics.pearson(np.full(4, 0.1), y) == metrics.spearman(y, np.full(4, 0.1)) == 0


def test_correlations_reject():
    for measure in (metrics.pearson, metrics.spearman):
        with pytest.raises(ValueError, match="predictions: got shape"):
            measure(np.ones(2), np.ones(3))
        with pytest.raises(ValueError, match="expected finite numbers"):
            measure(np.array([1, np.nan]), np.ones(2))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", accuracy_score),
        ("matthews", matthews_corrcoef),
        ("f1", f1_score),
        ("accuracy_f1", lambda y, x: (accuracy_score(y, x) + f1_score(y, x)) / 2),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_of_the_largest_output(name, reference, seed):
    rng = np.random.default_rng(seed)
    outputs, labels = rng.normal(size=(50, 2)), rng.integers(0, 2, 50).astype(np.float32)
    want = reference(labels.astype(int), outputs.argmax(axis=1))
    assert metrics.score(name, outputs, labels) == pytest.approx(want, abs=1e-12)


def test_f1_of_inputs_of_which_none_is_positive_is_0():
    outputs, labels = np.array([[2.0, 1], [1, 2], [3, 0], [2, 0]]), np.zeros(4)
    assert metrics.score("f1", outputs, labels) == 0
    assert metrics.score("accuracy_f1", outputs, labels) == 0.75 / 2
    with pytest.raises(ValueError, match="at least one entry"):
        metrics.score("f1", outputs[:0], labels[:0])


def test_every_metric_is_named():
    assert {*metrics.METRICS} == {"accuracy", "matthews", "f1", "accuracy_f1", "pearson_spearman"}
    assert {"pearson_spearman"} == metrics.REGRESSION


def test_score_rejects():
    labels = np.array([0, 1])
    with pytest.raises(ValueError, match="metric: got 'mcc', expected one of"):
        metrics.score("mcc", np.ones((2, 2)), labels)
    for name, shape in (
        ("accuracy", (2, 1)),
        ("matthews", (2,)),
        ("pearson_spearman", (2, 2)),
        ("accuracy", (3, 2)),
    ):
        with pytest.raises(ValueError, match="outputs: got shape"):
            metrics.score(name, np.ones(shape), labels)
