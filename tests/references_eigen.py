"""Stacks of known spectra, and the best approximation of each, in float64."""

import numpy as np


def spectrum(kind: str, size: int, rank: int) -> np.ndarray:
    """Squared singular values, descending, [size]."""
    order = np.arange(1, size + 1, dtype=np.float64)
    if kind == "decaying":
        return 1 / order
    if kind == "steep":
        return 1e-9 + order**-4.0
    if kind == "flat":
        return 1 + 0.5 * (1 - order / size)
    if kind == "tied":  # more equal values about the rank than an iteration's block holds
        return np.where(order <= rank // 2, 2.0, np.where(order <= 4 * rank, 1.0, 0.1))
    if kind == "equal":
        return np.ones(size)
    if kind == "low rank":
        return np.where(order <= rank // 2, 1 / order, 0.0)
    if kind == "zero":
        return np.zeros(size)
    raise ValueError(kind)


def stack(kind: str, shape: tuple[int, int, int], rank: int, seed: int = 0) -> np.ndarray:
    """D_t, [T, a, b], float32, whose vertical stack has about that spectrum; "random" of Gaussian entries."""
    num_tasks, rows, columns = shape
    size = min(num_tasks * rows, columns)
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.normal(size=shape).astype(np.float32)
    left = np.linalg.qr(rng.normal(size=(num_tasks * rows, size)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, size)))[0]
    values = np.sqrt(spectrum(kind, size, rank))
    return ((left * values) @ right.T).reshape(shape).astype(np.float32)


def squared_singular_values(offsets: np.ndarray) -> np.ndarray:
    """Of the vertical stack, descending."""
    matrix = offsets.reshape(-1, offsets.shape[-1]).astype(np.float64)
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def residual(offsets: np.ndarray, task_factors: np.ndarray, shared: np.ndarray) -> float:
    """sum_t ||D_t - G_t S||^2."""
    products = task_factors.astype(np.float64) @ shared.astype(np.float64)
    return float(np.sum((offsets - products) ** 2))


def captured(gram: np.ndarray, rank: int) -> float:
    """The sum of the largest eigenvalues."""
    return float(np.linalg.eigvalsh(gram)[::-1][:rank].sum())
