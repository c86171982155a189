"""Independent float64 NumPy references of activation-aware fits, written from the definition.

What is minimised is the squared change of a layer's outputs on inputs. No covariance's root is taken: errors are
measured on inputs, and the least of them come from eigenvalues of products. Nothing is taken from `retex_jax`.
"""

import numpy as np
from references import Flat

# The leaves of `references.flax_model` that are layers here, and what each reads: [N, in] in its own order.
WIDTHS = {
    "attention/out/kernel": 12,
    "attention/query/kernel": 9,
    "conv/kernel": 16,
    "dense/kernel": 12,
    "second/kernel": 12,
}
TORCH_WIDTHS = {"conv.weight": 16, "dense.weight": 12}


def inputs(num_tasks: int, count: int = 40, width: int = 16, seed: int = 3) -> list[np.ndarray]:
    """Inputs of every task, [N, width], float32: few directions are much larger than the others."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.normal(size=(width, width)))[0] * 0.7 ** np.arange(width)[:, None]
    made = [
        rng.normal(size=(count, width)) @ mix + 0.1 * rng.normal(size=width)
        for _ in range(num_tasks)
    ]
    return [(4 * x).astype(np.float32) for x in made]


def samples(reads: list[np.ndarray], shrinkage: float) -> np.ndarray:
    """Rows A whose mean squares are the metric's: sum of squares of E A^T is the error of E, [a, b].

    Each task's inputs count equally, and rows of zeros do not count; the identity's share has rows of its own.
    """
    width = reads[0].shape[1]
    rows = [x[np.any(x != 0, axis=1)].astype(np.float64) for x in reads]
    rows = [x / np.sqrt(len(x) * len(reads)) for x in rows if len(x)]
    pooled = np.concatenate([np.zeros((0, width)), *rows])
    size = np.sum(pooled**2) / width
    if size == 0:
        return np.eye(width)
    return np.concatenate(
        [np.sqrt((1 - shrinkage) / size) * pooled, np.sqrt(shrinkage) * np.eye(width)]
    )


def error(offsets: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> float:
    """Squared changes of outputs: of [T, a, b] with rows [n, b]."""
    outputs = np.einsum("tab,nb->tna", np.asarray(offsets, np.float64), rows)
    return float(np.sum(weights**2 * np.sum(outputs**2, axis=(1, 2))))


def optimum(
    offsets: np.ndarray, rows: np.ndarray, weights: np.ndarray, rank: int, orientation: str
) -> float:
    """The least error of G_t S (right; S holds inputs), or S^T G_t^T (left; S holds outputs).

    On the right S spans an invariant space of sum w^2 D^T D C, of which no root of C is needed; on the left
    one of sum w^2 D C D^T.
    """
    second = rows.T @ rows
    weighted = np.asarray(offsets, np.float64) * weights[:, None, None]
    if orientation == "right":
        product = sum(offset.T @ offset for offset in weighted) @ second
    else:
        product = sum(offset @ second @ offset.T for offset in weighted)
    values = np.sort(np.linalg.eigvals(product).real)[::-1]
    return float(np.sum(np.maximum(values[rank:], 0)))


def alternating(
    offsets: np.ndarray, rows: np.ndarray, rank: int, sweeps: int = 400
) -> tuple[np.ndarray, float]:
    """G_t S by least squares in turn, on outputs: offsets [T, a, b], and their error."""
    num_tasks, height, width = offsets.shape
    stack = np.asarray(offsets, np.float64).reshape(-1, width)
    wanted = stack @ rows.T
    shared = np.random.default_rng(0).normal(size=(rank, width))
    for _ in range(sweeps):
        factors = np.linalg.lstsq((shared @ rows.T).T, wanted.T, rcond=None)[0].T
        left = np.linalg.lstsq(factors, wanted, rcond=None)[0]
        shared = np.linalg.lstsq(rows, left.T, rcond=None)[0].T
    found = (factors @ shared).reshape(num_tasks, height, width)
    return found, float(np.sum((wanted - factors @ shared @ rows.T) ** 2))


def outputs_matrix(name: str, leaf: np.ndarray) -> np.ndarray:
    """A kernel as (out, in), with the inputs in the layer's own order."""
    leaf = np.asarray(leaf, np.float64)
    if name.endswith(".weight"):  # PyTorch's
        return leaf.reshape(len(leaf), -1)
    width = WIDTHS[name]
    return leaf.reshape(width, -1).T


def errors_of(
    base: Flat, experts: list[Flat], recovered: list[Flat], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """D_t, and what recovery leaves of it: [T, a, b] each."""
    matrices = [outputs_matrix(name, expert[name]) for expert in experts]
    offsets = np.stack([matrix - outputs_matrix(name, base[name]) for matrix in matrices])
    left = np.stack(
        [
            matrix - outputs_matrix(name, model[name])
            for matrix, model in zip(matrices, recovered, strict=True)
        ]
    )
    return offsets, left
