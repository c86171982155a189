"""Independent float64 NumPy references, written from the definitions, and models to try them on.

Models here are flat: leaf name to array. Nothing is taken from `retex_jax`.
"""

import numpy as np

# How each leaf of `flax_model` is seen as a matrix (a, b) = (output, input): the order of its axes,
# and how many of them are outputs.
FLAX_MATRICES = {
    "attention/out/kernel": ((2, 0, 1), 1),
    "attention/query/kernel": ((1, 2, 0), 2),
    "conv/kernel": ((3, 2, 0, 1), 1),
    "conv1d/kernel": ((2, 1, 0), 1),
    "dense/kernel": ((1, 0), 1),
    "narrow/kernel": ((1, 0), 1),
    "second/kernel": ((1, 0), 1),
    "token/embedding": ((0, 1), 1),
}
_FLAX_SHAPES = {
    "attention/out/kernel": (3, 4, 9),
    "attention/query/kernel": (9, 3, 4),
    "conv/kernel": (2, 2, 4, 6),
    "conv1d/kernel": (3, 4, 5),
    "dense/bias": (10,),
    "dense/kernel": (12, 10),
    "narrow/kernel": (7, 1),
    "scale": (),
    "second/kernel": (12, 10),
    "token/embedding": (20, 6),
}
TORCH_MATRICES = {
    "conv.weight": ((0, 1, 2, 3), 1),
    "conv1d.weight": ((0, 1, 2), 1),
    "dense.weight": ((0, 1), 1),
    "token.weight": ((0, 1), 1),
}
_FEW_LEAVES = ("dense/bias", "dense/kernel", "scale", "second/kernel", "token/embedding")
_BUFFERS = {
    "buffers/mask": np.array([True, False, True]),
    "buffers/positions": np.arange(5, dtype=np.int32),
    "buffers/steps": np.array(7, dtype=np.int32),
}

Flat = dict[str, np.ndarray]
Model = tuple[Flat, list[Flat]]  # pretrained, experts


def nested(flat: Flat) -> dict:
    """Leaf names "a/b" to a nested dict."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flat(tree: dict, prefix: str = "") -> Flat:
    """A nested dict to leaf names "a/b"."""
    result: Flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[prefix + key] = np.asarray(value)
    return result


def is_float(leaf: np.ndarray) -> bool:
    return leaf.dtype.kind not in "iub"


def flax_model(num_tasks: int, seed: int = 0, dtype: object = np.float32) -> Model:
    """A pretrained model with leaves of 0 to 4 axes and integer buffers, and its experts."""
    return _model(num_tasks, seed, dtype, tuple(_FLAX_SHAPES))


def few_leaves(num_tasks: int, seed: int = 0, dtype: object = np.float32) -> Model:
    """As `flax_model`, with leaves of 0 to 2 axes: each new shape costs a compilation."""
    return _model(num_tasks, seed, dtype, _FEW_LEAVES)


def _model(num_tasks: int, seed: int, dtype: object, names: tuple[str, ...]) -> Model:
    rng = np.random.default_rng(seed)
    pretrained = {name: np.array(rng.normal(size=_FLAX_SHAPES[name])) for name in names}
    experts = [
        {
            name: np.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), dtype)
            for name, leaf in pretrained.items()
        }
        for _ in range(num_tasks)
    ]
    pretrained = {name: np.asarray(leaf, dtype) for name, leaf in pretrained.items()}
    return {**pretrained, **_BUFFERS}, [{**expert, **_BUFFERS} for expert in experts]


def grid_model(num_tasks: int, seed: int = 0) -> Model:
    """As `few_leaves`, but task vectors are few distinct multiples of 1/8: many ties and zeros.

    All sums and differences are exact in float32.
    """
    rng = np.random.default_rng(seed)
    pretrained = {
        name: np.asarray(rng.integers(-16, 17, _FLAX_SHAPES[name]) / 8, np.float32)
        for name in _FEW_LEAVES
    }
    experts = [
        {
            name: np.asarray(leaf + rng.integers(-3, 4, leaf.shape) / 8, np.float32)
            for name, leaf in pretrained.items()
        }
        for _ in range(num_tasks)
    ]
    return {**pretrained, **_BUFFERS}, [{**expert, **_BUFFERS} for expert in experts]


def as_torch(model: Flat) -> Flat:
    """The leaves of a `flax_model` that PyTorch stores as well, as PyTorch stores them."""
    return {
        "conv.weight": np.ascontiguousarray(np.transpose(model["conv/kernel"], (3, 2, 0, 1))),
        "conv1d.weight": np.ascontiguousarray(np.transpose(model["conv1d/kernel"], (2, 1, 0))),
        "dense.bias": model["dense/bias"],
        "dense.weight": np.ascontiguousarray(model["dense/kernel"].T),
        "scale": model["scale"],
        "steps": model["buffers/steps"],
        "token.weight": model["token/embedding"],
    }


def as_matrix(leaf: np.ndarray, view: tuple[tuple[int, ...], int]) -> np.ndarray:
    axes, outputs = view
    permuted = np.transpose(np.asarray(leaf, np.float64), axes)
    return permuted.reshape(int(np.prod(permuted.shape[:outputs])), -1)


def as_leaf(matrix: np.ndarray, view: tuple[tuple[int, ...], int], shape: tuple) -> np.ndarray:
    axes, _ = view
    permuted = matrix.reshape([shape[axis] for axis in axes])
    return np.transpose(permuted, np.argsort(axes))


def _as_float64(model: Flat) -> Flat:
    return {name: leaf.astype(np.float64) for name, leaf in model.items() if is_float(leaf)}


def _buffers(model: Flat) -> Flat:
    return {name: leaf for name, leaf in model.items() if not is_float(leaf)}


def weight_average(pretrained: Flat, experts: list[Flat]) -> Flat:
    """The mean of the experts; buffers are the pretrained model's."""
    merged = {}
    for name in _as_float64(pretrained):
        total = np.zeros(pretrained[name].shape)
        for expert in experts:
            total = total + expert[name].astype(np.float64)
        merged[name] = total / len(experts)
    return merged | _buffers(pretrained)


def task_arithmetic(pretrained: Flat, experts: list[Flat], scaling: float) -> Flat:
    """theta_0 + lambda * sum_t (theta_t - theta_0)."""
    merged = {}
    for name, start in _as_float64(pretrained).items():
        merged[name] = start.copy()
        for expert in experts:
            merged[name] = merged[name] + scaling * (expert[name].astype(np.float64) - start)
    return merged | _buffers(pretrained)


def ties(
    pretrained: Flat, experts: list[Flat], keep: int, merge: str = "mean", scaling: float = 1.0
) -> Flat:
    """TIES over the whole flattened model.

    Each task keeps its `keep` largest magnitudes and whatever equals the smallest of them; the sign
    is that of the sum; a zero sum takes the sign of the sum of all signs, negative if that is zero.
    """
    start = _as_float64(pretrained)
    names = sorted(start)
    vectors = np.stack(
        [
            np.concatenate(
                [(expert[name].astype(np.float64) - start[name]).ravel() for name in names]
            )
            for expert in experts
        ]
    )
    for vector in vectors:
        smallest_kept = np.sort(np.abs(vector))[::-1][keep - 1]
        vector[np.abs(vector) < smallest_kept] = 0
    signs = np.sign(vectors.sum(axis=0))
    majority = 1.0 if signs.sum() > 0 else -1.0
    merged = np.zeros(vectors.shape[1])
    for entry in range(vectors.shape[1]):
        sign = signs[entry] or majority
        agreeing = [value for value in vectors[:, entry] if value * sign > 0]
        if agreeing:
            merged[entry] = np.sum(agreeing) if merge == "sum" else np.mean(agreeing)
    result, offset = {}, 0
    for name in names:
        size = start[name].size
        result[name] = start[name] + scaling * merged[offset : offset + size].reshape(
            start[name].shape
        )
        offset += size
    return result | _buffers(pretrained)


def low_rank(offsets: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The best approximation D_t ~ G_t S of [T, a, b] of rank r, and its sum of squared errors."""
    num_tasks, rows, columns = offsets.shape
    stack = np.concatenate(list(offsets.astype(np.float64)), axis=0)
    assert stack.shape == (num_tasks * rows, columns)
    left, values, right = np.linalg.svd(stack, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    return best.reshape(num_tasks, rows, columns), float(np.sum(values[rank:] ** 2))


def leaf_rank(shape: tuple[int, int], rank: int, rule: str = "paper") -> int:
    """r, or what becomes of it where r >= min(a, b)."""
    if rank >= min(shape):
        return min(shape) if rule == "clip" else max(1, min(shape) // 2)
    return rank


def retex(
    base: Flat,
    experts: list[Flat],
    rank: int,
    matrices: dict[str, tuple[tuple[int, ...], int]],
    rule: str = "paper",
) -> tuple[list[Flat], dict[str, float]]:
    """Recovered experts, and the least residual by leaf; leaves below two axes are exact."""
    recovered: list[Flat] = [_buffers(base) for _ in experts]
    residuals = {}
    for name, merged in base.items():
        if not is_float(merged):
            continue
        merged = merged.astype(np.float64)
        if name not in matrices:
            for task, expert in enumerate(experts):
                recovered[task][name] = expert[name].astype(np.float64)
            residuals[name] = 0.0
            continue
        offsets = np.stack(
            [
                as_matrix(expert[name].astype(np.float64) - merged, matrices[name])
                for expert in experts
            ]
        )
        best, residuals[name] = low_rank(offsets, leaf_rank(offsets.shape[1:], rank, rule))
        for task, offset in enumerate(best):
            recovered[task][name] = merged + as_leaf(offset, matrices[name], merged.shape)
    return recovered, residuals


def subspace_scores(
    features_per_task: list[np.ndarray],
    features: np.ndarray,
    rank: int,
    center: bool = True,
    normalize: bool = False,
) -> np.ndarray:
    """Minus the distance of each feature from each task's (affine) subspace, [B, T]."""

    def unit(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x / np.sqrt(np.sum(x**2, axis=1, keepdims=True)) if normalize else x

    columns = []
    for calibration in features_per_task:
        points = unit(calibration)
        mean = points.mean(axis=0) if center else np.zeros(points.shape[1])
        _, _, right = np.linalg.svd(points - mean, full_matrices=True)
        outside = np.eye(points.shape[1]) - right[:rank].T @ right[:rank]
        distances = [np.linalg.norm(outside @ (point - mean)) for point in unit(features)]
        columns.append(-np.array(distances))
    return np.stack(columns, axis=1)


def adam(
    params: dict[str, np.ndarray],
    gradient: object,
    learning_rates: list[float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> dict[str, np.ndarray]:
    """Adam (arXiv:1412.6980, algorithm 1) in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, rate in enumerate(learning_rates, start=1):
        gradients = gradient(params)
        for name, value in gradients.items():
            first[name] = b1 * first[name] + (1 - b1) * value
            second[name] = b2 * second[name] + (1 - b2) * value**2
            corrected = second[name] / (1 - b2**step)
            params[name] = params[name] - rate * (first[name] / (1 - b1**step)) / (
                np.sqrt(corrected) + eps
            )
    return params
