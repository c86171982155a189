"""Identifiers and measures of detection in float64 NumPy, from their definitions; nothing of the package is used."""

import numpy as np


def points(num_tasks=3, count=30, width=6, seed=0, spread=1.0):
    """Gaussian clouds of one full covariance, a mean a task: T arrays [count, width], float32."""
    rng = np.random.default_rng(seed)
    shape = rng.normal(size=(width, width)) + 2 * np.eye(width)
    means = 3 * rng.normal(size=(num_tasks, width))
    return [np.float32(mean + spread * rng.normal(size=(count, width)) @ shape) for mean in means]


def unit(x):
    """Rows of length one."""
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True))


def ml_covariance(x):
    """Mean of the outer products about the mean, one at a time."""
    x = np.float64(x)
    return sum(np.outer(row, row) for row in x - x.mean(axis=0)) / len(x)


def shrunk(covariance, shrinkage):
    """Towards the identity times the mean variance."""
    width = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)


def squared_distance(x, mean, covariance):
    """Mahalanobis, with the pseudo-inverse."""
    inverse = np.linalg.pinv(covariance, rcond=1e-10, hermitian=True)
    return np.array([(row - mean) @ inverse @ (row - mean) for row in np.float64(x)])


def shared_scores(features, inputs, shrinkage, normalize=False):
    """Minus Mahalanobis distances with the mean of the tasks' covariances, [B, T]."""
    if normalize:
        features, inputs = [unit(np.float64(x)) for x in features], unit(np.float64(inputs))
    covariance = shrunk(sum(ml_covariance(x) for x in features) / len(features), shrinkage)
    columns = [squared_distance(inputs, np.float64(x).mean(axis=0), covariance) for x in features]
    return -np.stack(columns, axis=1)


def own_scores(features, inputs, shrinkage):
    """Minus Mahalanobis distances, a covariance a task; inputs [T, B, d]."""
    columns = [
        squared_distance(own, np.float64(x).mean(axis=0), shrunk(ml_covariance(x), shrinkage))
        for x, own in zip(features, inputs, strict=True)
    ]
    return -np.stack(columns, axis=1)


def discriminants(features, inputs):
    """Linear discriminant functions x' C^-1 mu - mu' C^-1 mu / 2 of equal priors, [B, T]."""
    inverse = np.linalg.inv(sum(ml_covariance(x) for x in features) / len(features))
    means = np.stack([np.float64(x).mean(axis=0) for x in features])
    return np.float64(inputs) @ inverse @ means.T - np.diag(means @ inverse @ means.T) / 2


def whitened_subspace_scores(features, inputs, rank, center, shrinkage):
    """Minus residuals in the coordinates of the Cholesky factor of the inverse covariance, [B, T]."""
    covariance = shrunk(sum(ml_covariance(x) for x in features) / len(features), shrinkage)
    factor = np.linalg.cholesky(np.linalg.inv(covariance))
    columns = []
    for x in features:
        white = np.float64(x) @ factor
        mean = white.mean(axis=0) if center else np.zeros(white.shape[1])
        _, _, right = np.linalg.svd(white - mean)
        outside = (np.float64(inputs) @ factor - mean) @ right[rank:].T
        columns.append(-np.sqrt(np.sum(outside**2, axis=1)))
    return np.stack(columns, axis=1)


def votes(features, inputs, k):
    """Share of the k nearest points, each vote of points as far as the k-th divided among them, [B, T]."""
    result = np.zeros((len(inputs), len(features)))
    for row, x in enumerate(np.float64(inputs)):
        far = sorted(
            (np.sum((x - np.float64(point)) ** 2), task)
            for task, own in enumerate(features)
            for point in own
        )
        last = far[k - 1][0]
        nearer = [task for distance, task in far if distance < last]
        tied = [task for distance, task in far if distance == last]
        for task in nearer:
            result[row, task] += 1 / k
        for task in tied:
            result[row, task] += (k - len(nearer)) / len(tied) / k
    return result


def own_distances(features, inputs, k):
    """Minus the mean distance to the k nearest points of each task, [B, T]."""
    result = np.zeros((len(inputs), len(features)))
    for row, x in enumerate(np.float64(inputs)):
        for task, own in enumerate(features):
            far = sorted(np.sqrt(np.sum((x - np.float64(point)) ** 2)) for point in own)
            result[row, task] = -np.mean(far[:k])
    return result


def softmax(x):
    """Along the last axis."""
    e = np.exp(np.float64(x) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def auroc(scores, labels):
    """Over all pairs of a positive and a negative input."""
    pairs = [(p, n) for p in scores[labels] for n in scores[~labels]]
    return np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])


def average_precision(scores, labels):
    """Sum over thresholds of precision times the gain in recall."""
    total, before = 0.0, 0.0
    for cut in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= cut
        recall = np.sum(labels & taken) / np.sum(labels)
        total += (recall - before) * np.sum(labels & taken) / np.sum(taken)
        before = recall
    return total


def youden(seen, unseen):
    """The largest true positive rate minus false positive rate of any threshold."""
    cuts = [-np.inf, *seen, *unseen]
    return max(np.mean(unseen > cut) - np.mean(seen > cut) for cut in cuts)
