"""Independent float64 NumPy references of DTS and of the SVD baseline, written from the definitions.

Models are flat: leaf name to array. Nothing is taken from `retex_jax`.
"""

from fractions import Fraction
from math import floor

import numpy as np
from references import FLAX_MATRICES, Flat, as_leaf, as_matrix, is_float


def kept_rank(shape: tuple[int, int], ratio: float) -> int:
    """floor(ratio * min(a, b)) of the decimal that `ratio` is written as, at least 1."""
    return max(1, floor(Fraction(str(ratio)) * min(shape)))


def svd(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, Sigma, V^T; the sign of a pair makes the largest entry of u positive."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    used = values > 1e-6 * values[0]
    left, values, right = left[:, used], values[used], right[used]
    for pair in range(len(values)):
        column = left[:, pair]
        leading = column[np.flatnonzero(np.abs(column) >= 0.999 * np.abs(column).max())[0]]
        if leading < 0:
            left[:, pair], right[pair] = -column, -right[pair]
    for side in (left, right):
        if side.size:
            side[np.abs(side) <= 1e-9 * np.abs(side).max()] = 0
    return left, values, right


def grouped(values: np.ndarray, scale: str, levels: int = 2) -> np.ndarray:
    """Every value replaced by the sign and the magnitude of its group, one set of two groups a level."""
    flat = [float(value) for value in np.ravel(values)]
    medians = {}
    for sign in (1, -1):
        sizes = sorted(sign * value for value in flat if sign * value > 0)
        middle = len(sizes) // 2
        if not sizes:
            medians[sign] = 0.0
        elif len(sizes) % 2:
            medians[sign] = sizes[middle]
        else:
            medians[sign] = (sizes[middle - 1] + sizes[middle]) / 2
    members: dict[tuple[int, bool], list[int]] = {}
    for index, value in enumerate(flat):
        sign = 1 if value > 0 else -1  # a zero is a small negative
        is_large = levels == 2 and abs(value) > medians[sign]
        members.setdefault((sign, is_large), []).append(index)
    result = np.zeros(len(flat))
    for (sign, _), indices in members.items():
        group = np.array([flat[index] for index in indices])
        if scale == "rms":
            magnitude = np.linalg.norm(group) / np.sqrt(len(group))
        elif scale == "none":
            magnitude = 1.0 if any(group) else 0.0
        else:
            magnitude = np.sum(np.abs(group)) / len(group)
        result[indices] = sign * magnitude
    return result.reshape(np.shape(values))


def dts_matrix(
    matrix: np.ndarray, rank: int, scale: str, grouping: str, levels: int = 2
) -> np.ndarray:
    """U^ Sigma V^."""
    left, values, right = svd(matrix, rank)
    if not len(values):
        return np.zeros(matrix.shape)
    if grouping == "matrix":
        return grouped(left, scale, levels) @ np.diag(values) @ grouped(right, scale, levels)
    total = np.zeros(matrix.shape)
    for pair, value in enumerate(values):
        total += value * np.outer(
            grouped(left[:, pair], scale, levels), grouped(right[pair], scale, levels)
        )
    return total


def dts(
    base: Flat,
    expert: Flat,
    ratio: float,
    scale: str = "rms",
    grouping: str = "matrix",
    matrices: dict = FLAX_MATRICES,
    levels: int = 2,
    decompose: bool = True,
) -> Flat:
    """One recovered expert; its buffers are the base's."""
    recovered = {}
    for name, start in base.items():
        if not is_float(start):
            recovered[name] = start
            continue
        start = start.astype(np.float64)
        offset = expert[name].astype(np.float64) - start
        if name in matrices and decompose:
            matrix = as_matrix(offset, matrices[name])
            rank = kept_rank(matrix.shape, ratio)
            approximation = dts_matrix(matrix, rank, scale, grouping, levels)
            offset = as_leaf(approximation, matrices[name], start.shape)
        elif offset.ndim:
            offset = grouped(offset, scale, levels)
        recovered[name] = start + offset
    return recovered


def svd_baseline(
    base: Flat,
    expert: Flat,
    rank: int | None = None,
    ratio: float | None = None,
    matrices: dict = FLAX_MATRICES,
) -> Flat:
    """One recovered expert; its buffers are the base's."""
    recovered = {}
    for name, start in base.items():
        if not is_float(start):
            recovered[name] = start
            continue
        start = start.astype(np.float64)
        offset = expert[name].astype(np.float64) - start
        if name in matrices:
            matrix = as_matrix(offset, matrices[name])
            kept = rank if ratio is None else kept_rank(matrix.shape, ratio)
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            matrix = (left[:, :kept] * values[:kept]) @ right[:kept]
            offset = as_leaf(matrix, matrices[name], start.shape)
        recovered[name] = start + offset
    return recovered
