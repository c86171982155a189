"""What a merged model is measured by. NumPy, float64; labels and predictions are integer arrays [n]."""

from collections.abc import Mapping

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of equal entries.

    Raises:
      ValueError: if the arrays differ in shape or are empty.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.size == 0:
        raise ValueError(
            f"predictions: got shape {predictions.shape}, expected that of labels, "
            f"{labels.shape}, and at least one entry"
        )
    return float(np.mean(predictions == labels))


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur in `labels` of the accuracy within the class."""
    accuracy(predictions, labels)  # checks the shapes
    return float(
        np.mean(
            [accuracy(predictions[labels == c], labels[labels == c]) for c in np.unique(labels)]
        )
    )


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [num_classes, num_classes], int64: row = true class, column = predicted class."""
    for name, values in (("labels", labels), ("predictions", predictions)):
        if np.size(values) and not 0 <= np.min(values) <= np.max(values) < num_classes:
            raise ValueError(
                f"{name}: got {np.min(values)} to {np.max(values)}, expected 0 to {num_classes} - 1"
            )
    flat = np.asarray(labels) * num_classes + np.asarray(predictions)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def precision(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the inputs predicted positive that are: 0 if none is predicted.

    Args:
      predictions: whether an input is taken as positive, bool [n].
      labels: whether it is, bool [n].

    Raises:
      ValueError: if the arrays differ in shape or are empty, or no label is positive.
    """
    hits, predicted, _ = _hits(predictions, labels)
    return hits / predicted if predicted else 0.0


def recall(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the positive inputs that are predicted positive; see `precision`."""
    hits, _, positive = _hits(predictions, labels)
    return hits / positive


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall, 0 if both are; see `precision`."""
    hits, predicted, positive = _hits(predictions, labels)
    return 2 * hits / (predicted + positive)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive input scores higher than a negative one; ties count half.

    Args:
      scores: larger means positive, [n].
      labels: whether an input is positive, bool [n].

    Raises:
      ValueError: if the arrays differ in shape, a score is not finite, or one of the classes is empty.
    """
    positive, negative = _counts(scores, labels)
    if not negative.sum():
        raise ValueError("labels: all are positive, expected both kinds")
    below = np.cumsum(negative) - negative
    wins = np.sum(positive * (below + negative / 2))
    return float(wins / (positive.sum() * negative.sum()))


def aupr(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision: the sum over distinct thresholds of precision times the gain in recall.

    Inputs of equal score pass a threshold together, so that their order does not matter.

    Args:
      scores: larger means positive, [n].
      labels: whether an input is positive, bool [n].

    Raises:
      ValueError: if the arrays differ in shape, a score is not finite, or no label is positive.
    """
    positive, negative = (counts[::-1] for counts in _counts(scores, labels))
    hits = np.cumsum(positive)
    precisions = hits / (hits + np.cumsum(negative))
    return float(np.sum(precisions * positive) / positive.sum())


def _hits(predictions: np.ndarray, labels: np.ndarray) -> tuple[int, int, int]:
    """Inputs that are predicted positive and are, that are predicted, and that are."""
    accuracy(predictions, labels)  # checks the shapes
    predicted, positive = np.asarray(predictions, bool), np.asarray(labels, bool)
    if not positive.any():
        raise ValueError("labels: none is positive")
    return int(np.sum(predicted & positive)), int(predicted.sum()), int(positive.sum())


def _counts(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative inputs of each distinct score, ascending."""
    scores, positive = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if scores.shape != positive.shape or scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(
            f"scores: got shape {scores.shape}, expected finite numbers of the shape of labels, "
            f"{positive.shape}, of one axis"
        )
    if not positive.any():
        raise ValueError("labels: none is positive")
    values, places = np.unique(scores, return_inverse=True)
    count = len(values)
    return (
        np.bincount(places[positive], minlength=count),
        np.bincount(places[~positive], minlength=count),
    )


def normalized_accuracy(merged: Mapping[str, float], individual: Mapping[str, float]) -> float:
    """Mean over tasks of merged / individual accuracy (ReTeX, section 5).

    Raises:
      ValueError: if the two do not name the same tasks or an individual accuracy is 0.
    """
    _check_tasks(merged, individual)
    return float(np.mean([merged[task] / individual[task] for task in individual]))


def worst_normalized_accuracy(
    merged: Mapping[str, float], individual: Mapping[str, float]
) -> float:
    """The least merged / individual accuracy of a task, which a good mean can hide."""
    _check_tasks(merged, individual)
    return float(min(merged[task] / individual[task] for task in individual))


def accuracy_ratio(merged: Mapping[str, float], individual: Mapping[str, float]) -> float:
    """Mean merged accuracy / mean individual accuracy: the ratio of means, not the mean of ratios."""
    _check_tasks(merged, individual)
    return float(sum(merged.values()) / sum(individual.values()))


def adr(merged: Mapping[str, float], individual: Mapping[str, float]) -> float:
    """Accuracy drop rate of DTS: (individual - merged) / individual, of the mean accuracies."""
    return 1.0 - accuracy_ratio(merged, individual)


def amr(bytes_per_task: float, model_bytes: float) -> float:
    """Additional memory rate of DTS, a fraction: extra bytes a task / bytes of one model.

    Raises:
      ValueError: if `model_bytes` is not positive or `bytes_per_task` is negative.
    """
    if model_bytes <= 0 or bytes_per_task < 0:
        raise ValueError(
            f"bytes: got {bytes_per_task} a task and {model_bytes} a model, expected >= 0 and > 0"
        )
    return bytes_per_task / model_bytes


def _check_tasks(merged: Mapping[str, float], individual: Mapping[str, float]) -> None:
    if set(merged) != set(individual):
        raise ValueError(f"merged: got tasks {sorted(merged)}, expected {sorted(individual)}")
    if not individual:
        raise ValueError("individual: got no task")
    zero = [task for task, value in individual.items() if value <= 0]
    if zero:
        raise ValueError(f"individual: accuracy is 0 for {zero}, expected > 0")
