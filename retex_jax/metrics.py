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
