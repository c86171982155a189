"""Detection of inputs of held-out tasks in float64 NumPy, from its definition; nothing of the package is used."""

import numpy as np


def temperature(scores, task_ids):
    """Of 25 powers of sqrt(2) times the spread, the one of the least cross-entropy."""
    spread = np.sqrt(np.mean((scores - scores.mean(axis=1, keepdims=True)) ** 2))
    losses = {}
    for step in range(25):
        tried = spread * 2.0 ** ((step - 12) / 2)
        loss = 0.0
        for row, task in zip(scores / tried, task_ids, strict=True):
            loss += np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[task]
        losses[tried] = loss / len(scores)
    return min(losses, key=losses.get)


def entropy(scores, warmth):
    """Of softmax(scores / warmth), one input at a time."""
    result = []
    for row in scores / warmth:
        p = np.exp(row - row.max())
        p /= p.sum()
        result.append(-sum(x * np.log(x) for x in p if x > 0))
    return np.array(result)


def detection(validation, inside, outside, target):
    """Figures of a measure: the threshold is the least measure of `validation` that lets `target` of them pass."""
    ordered = sorted(validation)
    threshold = next(x for x in ordered if np.mean(np.array(ordered) <= x) >= target - 1e-12)
    hits, alarms = np.sum(outside > threshold), np.sum(inside > threshold)
    precision = hits / (hits + alarms) if hits + alarms else 0.0
    recall = hits / len(outside)
    passed = 1 - alarms / len(inside)
    total = len(inside) + len(outside)
    return {
        "threshold": threshold,
        "accuracy": (hits + len(inside) - alarms) / total,
        "balanced_accuracy": (recall + passed) / 2,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "auroc": np.mean([(x > y) + (x == y) / 2 for x in outside for y in inside]),
    }
