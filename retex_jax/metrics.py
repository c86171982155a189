"""What a merged model is measured by. NumPy, float64; labels and predictions are integer arrays [n].

A task names what it is measured by: an entry of `METRICS`, from the outputs of its head and its labels.
"""

from collections.abc import Callable, Mapping

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


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation, of any number of classes (Gorodkin's R_K; CoLA's metric in GLUE, arXiv:1804.07461).

    Args:
      predictions: [n], integers.
      labels: [n], integers.

    Returns:
      -1 to 1; 0 where it is not defined, because all predictions or all labels are of one class.

    Raises:
      ValueError: if the arrays differ in shape or are empty.
    """
    right = accuracy(predictions, labels)
    classes = np.unique([predictions, labels])
    predicted, true = (
        (np.asarray(values) == classes[:, None]).mean(axis=1) for values in (predictions, labels)
    )
    spread = (1 - predicted @ predicted) * (1 - true @ true)
    return float((right - predicted @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of numbers, -1 to 1; 0 where it is not defined, because one of the two does not vary.

    Args:
      predictions: [n].
      labels: [n].

    Raises:
      ValueError: if the arrays differ in shape, are empty, or hold what is not finite.
    """
    x, y = _numbers(predictions, labels)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    # Scaled, so that no square leaves the range of float64.
    x, y = ((values - values.mean()) / np.ptp(values) for values in (x, y))
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """`pearson` of ranks; numbers that are equal share the mean of their ranks."""
    return pearson(*(_ranks(values) for values in _numbers(predictions, labels)))


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


def _numbers(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    accuracy(predictions, labels)  # checks the shapes
    x, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions, labels: expected finite numbers")
    return x, y


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


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


def _of_classes(
    measure: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda outputs, labels: measure(np.argmax(outputs, axis=1), labels)


def _mean(
    first: Callable[[np.ndarray, np.ndarray], float],
    second: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda predictions, labels: (
        (first(predictions, labels) + second(predictions, labels)) / 2
    )


def _f1_of_class_1(predictions: np.ndarray, labels: np.ndarray) -> float:
    accuracy(predictions, labels)  # checks the shapes
    predicted, positive = np.asarray(predictions) == 1, np.asarray(labels) == 1
    return f1(predicted, positive) if positive.any() else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _of_classes(accuracy),
    "matthews": _of_classes(matthews),
    "f1": _of_classes(_f1_of_class_1),
    "accuracy_f1": _of_classes(_mean(accuracy, _f1_of_class_1)),
    "pearson_spearman": lambda outputs, labels: _mean(pearson, spearman)(outputs[:, 0], labels),
}
"""By name: (a head's outputs [n, C], labels [n]) -> number; the larger the better.

"accuracy_f1" is the mean of the two, and "f1" that of class 1: 0 where no label is 1. "pearson_spearman", the
mean of the two correlations, is of tasks whose head has one output; the others take the class of the largest.
"""

REGRESSION = frozenset({"pearson_spearman"})
"""The entries of `METRICS` that measure numbers, not classes."""


def score(metric: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    """Measures a task by an entry of `METRICS`.

    Args:
      metric: its name.
      outputs: of the task's head, or the scores of the answers to choose from, [n, C].
      labels: [n].

    Returns:
      The larger the better.

    Raises:
      ValueError: if there is no such metric, the outputs are not [n, C] with at least 2 of them (a regression: 1),
        or as the metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {list(METRICS)}")
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    fits = outputs.ndim == 2 and (outputs.shape[1] == 1) == (metric in REGRESSION)
    if not fits or outputs.shape[:1] != labels.shape:
        wanted = "1" if metric in REGRESSION else "2 or more"
        raise ValueError(
            f"outputs: got shape {outputs.shape}, expected [{len(labels)}, {wanted}] for {metric!r}"
        )
    return METRICS[metric](outputs, labels)


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
