"""An independent float64 NumPy reference of AdaMerging, written from the definition, and a model to try it on.

The model uses leaves of 0 to 4 axes, one leaf that it does not use, and a buffer, and its gradient is
written out by hand. Models are flat: leaf name to array. Nothing is taken from `retex_jax`.
"""

import numpy as np
from references import Flat, adam

INPUTS, WIDTH, CLASSES, BATCH = 5, 4, 3, 6
_SHAPES = {
    "conv/kernel": (2, 2, 3, WIDTH),
    "dense/bias": (WIDTH,),
    "dense/kernel": (INPUTS, WIDTH),
    "mixer/kernel": (3, 2, WIDTH),
    "scale": (),
    "unused": (3, 2),
}


def model(num_tasks: int, seed: int = 0, grid: bool = False, dtype: object = np.float32):
    """A pretrained model and its experts; with `grid`, task vectors of many ties, zeros and conflicts."""
    rng = np.random.default_rng(seed)
    buffers = {"buffers/gate": np.array([1, 0, 1, 1], np.int32), "buffers/big": np.array(2**40)}
    pretrained = {name: rng.normal(size=shape) for name, shape in _SHAPES.items()}
    if grid:
        pretrained = {name: np.round(4 * leaf) / 4 for name, leaf in pretrained.items()}
    experts = []
    for _ in range(num_tasks):
        expert = {}
        for name, leaf in pretrained.items():
            step = (
                rng.integers(-3, 4, leaf.shape) / 8 if grid else 0.3 * rng.normal(size=leaf.shape)
            )
            expert[name] = np.asarray(leaf + step, dtype)
        experts.append(expert | buffers)
    return {name: np.asarray(leaf, dtype) for name, leaf in pretrained.items()} | buffers, experts


def batches(num_tasks: int, count: int, seed: int = 1) -> list[list[dict[str, np.ndarray]]]:
    """`count` batches of each task."""
    rng = np.random.default_rng(seed)
    return [
        [{"x": rng.normal(size=(BATCH, INPUTS)).astype(np.float32)} for _ in range(count)]
        for _ in range(num_tasks)
    ]


def heads(num_tasks: int, seed: int = 2) -> list[np.ndarray]:
    """The heads: that of task t has CLASSES + t % 2 outputs."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(WIDTH, CLASSES + task % 2)).astype(np.float32) for task in range(num_tasks)
    ]


def logits(params: Flat, head: np.ndarray, batch: dict[str, np.ndarray]):
    """The model; on arrays of NumPy or JAX."""
    hidden = batch["x"] @ params["dense/kernel"] + params["dense/bias"]
    hidden = hidden * params["scale"] + params["conv/kernel"].mean(axis=(0, 1, 2))
    hidden = hidden + params["mixer/kernel"].sum(axis=(0, 1))
    return (hidden * params["buffers/gate"]) @ head


def entropy_and_gradient(
    params: Flat, head: np.ndarray, batch: dict[str, np.ndarray]
) -> tuple[float, Flat]:
    """The mean entropy of a batch, and its gradient by every float leaf."""
    x, head = batch["x"].astype(np.float64), head.astype(np.float64)
    scores = logits(params, head, {"x": x})
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    entropies = -(p * np.log(p)).sum(axis=1, keepdims=True)
    # dH/dz_c = -p_c (log p_c + H)
    by_scores = -p * (np.log(p) + entropies) / len(x)
    by_hidden = (by_scores @ head.T) * params["buffers/gate"]
    before_scale = x @ params["dense/kernel"] + params["dense/bias"]
    conv = params["conv/kernel"].shape
    column = by_hidden.sum(axis=0)
    return float(entropies.mean()), {
        "conv/kernel": np.broadcast_to(column / np.prod(conv[:3]), conv),
        "dense/bias": params["scale"] * column,
        "dense/kernel": params["scale"] * (x.T @ by_hidden),
        "mixer/kernel": np.broadcast_to(column, params["mixer/kernel"].shape),
        "scale": np.sum(by_hidden * before_scale),
        "unused": np.zeros(params["unused"].shape),
    }


def agreeing(vectors: list[Flat], density: float) -> list[Flat]:
    """AdaMerging++: each task's largest entries (and ties), of those the ones with the elected sign."""
    names = sorted(vectors[0])
    flat = np.stack(
        [np.concatenate([vector[name].ravel() for name in names]) for vector in vectors]
    )
    keep = max(1, int(density * flat.shape[1]))
    for row in flat:
        row[np.abs(row) < np.sort(np.abs(row))[::-1][keep - 1]] = 0
    signs = np.sign(flat.sum(axis=0))
    majority = 1.0 if signs.sum() > 0 else -1.0
    signs[signs == 0] = majority
    flat[flat * signs <= 0] = 0
    result = []
    for row in flat:
        chosen, start = {}, 0
        for name in names:
            shape = vectors[0][name].shape
            size = int(np.prod(shape))
            chosen[name] = row[start : start + size].reshape(shape)
            start += size
        result.append(chosen)
    return result


def adamerging(
    pretrained: Flat,
    experts: list[Flat],
    task_heads: list[np.ndarray],
    task_batches: list[list[dict[str, np.ndarray]]],
    *,
    granularity: str,
    steps: int,
    batches_per_step: int,
    clamp: bool,
    learning_rate: float,
    init: float = 0.3,
    density: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
) -> tuple[Flat, Flat, np.ndarray]:
    """Coefficients by leaf, the merged model, and entropies [steps, T]; `density` makes it ++."""
    names = sorted(_SHAPES)
    start = {name: pretrained[name].astype(np.float64) for name in names}
    buffers = {name: leaf for name, leaf in pretrained.items() if name not in names}
    vectors = [{n: expert[n].astype(np.float64) - start[n] for n in names} for expert in experts]
    if density is not None:
        vectors = agreeing(vectors, density)
    entropies: list[list[float]] = []

    def applied(raw: Flat) -> Flat:
        rows = {name: raw["all"] if granularity == "task" else raw[name] for name in names}
        return {name: np.clip(row, 0, 1) if clamp else row for name, row in rows.items()}

    def merged(raw: Flat) -> Flat:
        rows = applied(raw)
        return buffers | {
            name: start[name] + sum(rows[name][t] * vectors[t][name] for t in range(len(experts)))
            for name in names
        }

    def gradient(raw: Flat) -> Flat:
        params = merged(raw)
        slopes = {name: np.zeros(len(experts)) for name in names}
        step, now = len(entropies), []
        for task, head in enumerate(task_heads):
            values = []
            for number in range(step * batches_per_step, (step + 1) * batches_per_step):
                batch = task_batches[task][number % len(task_batches[task])]
                value, by_params = entropy_and_gradient(params, head, batch)
                values.append(value)
                for name in names:
                    slopes[name] += [np.sum(by_params[name] * vector[name]) for vector in vectors]
            now.append(np.mean(values))
        entropies.append(now)
        if granularity == "task":
            slopes = {"all": sum(slopes.values())}
        if clamp:
            slopes = {n: np.where((raw[n] < 0) | (raw[n] > 1), 0, s) for n, s in slopes.items()}
        return slopes

    keys = ["all"] if granularity == "task" else names
    raw = {key: np.full(len(experts), init) for key in keys}
    raw = adam(raw, gradient, [learning_rate] * steps, b1=b1, b2=b2)
    return applied(raw), merged(raw), np.array(entropies).reshape(steps, len(experts))
