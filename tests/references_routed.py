"""Float64 NumPy references of the methods that mix experts by input, and a small model to try them on.

The model: x [B, N, 6] -> h = x @ embed (width 4); h = h + mlp(h), mlp = fc2(relu(fc1(h))), in each of two blocks;
features = mean over tokens of tanh(h * scale) . Heads are linear. Nothing is taken from `retex_jax`.
"""

import numpy as np

Flat = dict[str, np.ndarray]

WIDTH, HIDDEN, INPUT, TOKENS = 4, 5, 6, 3
MLPS = ("blocks_0/mlp", "blocks_1/mlp")
_SHAPES = {
    "embed/kernel": (INPUT, WIDTH),
    "scale": (WIDTH,),
    **{
        f"{path}/{name}": shape
        for path in MLPS
        for name, shape in {
            "fc1/kernel": (WIDTH, HIDDEN),
            "fc1/bias": (HIDDEN,),
            "fc2/kernel": (HIDDEN, WIDTH),
            "fc2/bias": (WIDTH,),
        }.items()
    },
}


def models(num_tasks: int, seed: int = 0, spread: float = 0.15) -> tuple[Flat, list[Flat]]:
    """A pretrained model and its experts; leaves of one and two axes and an integer buffer."""
    rng = np.random.default_rng(seed)
    pretrained = {name: 0.4 * rng.normal(size=shape) for name, shape in _SHAPES.items()}
    experts = [
        {name: leaf + spread * rng.normal(size=leaf.shape) for name, leaf in pretrained.items()}
        for _ in range(num_tasks)
    ]
    buffer = {"steps": np.array(7, np.int32)}
    return (
        {name: leaf.astype(np.float32) for name, leaf in pretrained.items()} | buffer,
        [{name: leaf.astype(np.float32) for name, leaf in e.items()} | buffer for e in experts],
    )


def heads(num_tasks: int, seed: int = 1) -> list[np.ndarray]:
    """One linear head [4, C_t] a task, C_t = 2, 3, 2, ..."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(WIDTH, 2 + task % 2)).astype(np.float32) for task in range(num_tasks)]


def inputs(num_tasks: int, count: int = 12, seed: int = 2) -> list[np.ndarray]:
    """Inputs of each task, [count, N, 6], around a centre of the task's own."""
    rng = np.random.default_rng(seed)
    centers = 2 * rng.normal(size=(num_tasks, INPUT))
    noise = 0.3 * rng.normal(size=(num_tasks, count, TOKENS, INPUT))
    return list((centers[:, None, None] + noise).astype(np.float32))


def _double(model: Flat) -> Flat:
    return {name: leaf.astype(np.float64) for name, leaf in model.items() if name != "steps"}


def mixture(base: Flat, differences: list[Flat], weights: np.ndarray) -> Flat:
    """base + sum_t w_t d_t of every float leaf."""
    mixed = _double(base)
    for weight, difference in zip(weights, differences, strict=True):
        for name in mixed:
            mixed[name] = mixed[name] + weight * difference[name]
    return mixed


def differences(base: Flat, experts: list[Flat]) -> list[Flat]:
    start = _double(base)
    return [{name: _double(expert)[name] - start[name] for name in start} for expert in experts]


def _mlp(params: Flat, path: str, h: np.ndarray) -> np.ndarray:
    hidden = h @ params[f"{path}/fc1/kernel"] + params[f"{path}/fc1/bias"]
    return np.maximum(hidden, 0) @ params[f"{path}/fc2/kernel"] + params[f"{path}/fc2/bias"]


def features(params: Flat, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """[B, N, 6] to [B, 4]."""
    rows = []
    for index, example in enumerate(x.astype(np.float64)):
        h = example @ params["embed/kernel"]
        for path in MLPS:
            h = h + _mlp(params, path, h)
        rows.append(_pool(params, h, None if mask is None else mask[index]))
    return np.stack(rows)


def _pool(params: Flat, h: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    outputs = np.tanh(h * params["scale"])
    return outputs.mean(axis=0) if mask is None else outputs[mask != 0].mean(axis=0)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def entropy(logits: np.ndarray) -> np.ndarray:
    p = softmax(logits)
    return -np.sum(p * np.log(p), axis=-1)


def task_arithmetic(pretrained: Flat, experts: list[Flat], scaling: float) -> Flat:
    vectors = differences(pretrained, experts)
    return mixture(pretrained, vectors, np.full(len(experts), scaling))


def trimmed_svd(difference: Flat, density: float) -> Flat:
    """Keeps floor(density * min(a, b)) singular values, at least one, of leaves of two axes."""
    result = {}
    for name, leaf in difference.items():
        if leaf.ndim == 2:
            left, values, right = np.linalg.svd(leaf, full_matrices=False)
            rank = max(1, int(density * len(values) + 1e-9))
            leaf = (left[:, :rank] * values[:rank]) @ right[:rank]
        result[name] = leaf
    return result


def trimmed_magnitude(difference: Flat, density: float) -> Flat:
    """Keeps the floor(density * size) largest entries, at least one, of leaves of two axes or more."""
    result = {}
    for name, leaf in difference.items():
        if leaf.ndim >= 2:
            count = max(1, int(density * leaf.size + 1e-9))
            order = sorted(range(leaf.size), key=lambda i, leaf=leaf: (-abs(leaf.flat[i]), i))
            trimmed = np.zeros(leaf.size)
            trimmed[order[:count]] = leaf.ravel()[order[:count]]
            leaf = trimmed.reshape(leaf.shape)
        result[name] = leaf
    return result


def mlp_router(variables: dict, x: np.ndarray, batch_norm: bool) -> np.ndarray:
    """Two hidden layers with batch norm by running statistics and LeakyReLU, and the last layer."""
    for index in range(2):
        layer = variables["params"][f"hidden_{index}"]
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        if batch_norm:
            norm = variables["params"][f"norm_{index}"]
            stats = variables["batch_stats"][f"norm_{index}"]
            x = (x - np.float64(stats["mean"])) / np.sqrt(np.float64(stats["var"]) + 1e-5)
            x = x * np.float64(norm["scale"]) + np.float64(norm["bias"])
        x = np.where(x > 0, x, 0.01 * x)
    last = variables["params"]["out"]
    return x @ np.float64(last["kernel"]) + np.float64(last["bias"])


def linear_router(variables: dict, x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    last = variables["params"]["out"]
    return x @ np.float64(last["kernel"]) + np.float64(last["bias"])


def wemoe_features(
    base: Flat,
    vectors: list[Flat],
    gates: dict,
    x: np.ndarray,
    mask: np.ndarray | None = None,
    batch_gate: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features [B, 4], and the gates [B, T] of every MLP.

    The two-layer ReLU gate at every token, the mean over (real) tokens, and with `batch_gate` the mean over the
    batch; the MLP then runs with base + sum_t g_t tau_t.
    """
    base = _double(base)
    h = x.astype(np.float64) @ base["embed/kernel"]
    values = {}
    for path in MLPS:
        gate = {name: np.float64(leaf) for name, leaf in gates[path].items()}
        rows = []
        for index, tokens in enumerate(h):
            hidden = np.maximum(tokens @ gate["hidden_kernel"] + gate["hidden_bias"], 0)
            outputs = hidden @ gate["kernel"] + gate["bias"]
            rows.append(
                outputs.mean(axis=0) if mask is None else outputs[mask[index] != 0].mean(axis=0)
            )
        values[path] = np.stack(rows)
        if batch_gate:
            values[path] = np.broadcast_to(values[path].mean(axis=0), values[path].shape)
        after = []
        for weights, tokens in zip(values[path], h, strict=True):
            params = {
                name: leaf + sum(w * v[name] for w, v in zip(weights, vectors, strict=True))
                for name, leaf in base.items()
                if name.startswith(path)
            }
            after.append(tokens + _mlp(params, path, tokens))
        h = np.stack(after)
    pooled = [
        _pool(base, tokens, None if mask is None else mask[index]) for index, tokens in enumerate(h)
    ]
    return np.stack(pooled), values
