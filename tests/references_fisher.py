"""Independent float64 NumPy references of the mergers that run the experts, and a network to run.

The network has the leaves of `references.few_leaves`: z = tanh(scale (x A + b) + x B), logits = z H, where
the head H is a task's own and no leaf; token/embedding is not used. Gradients are written by hand.
Models are flat: leaf name to array. Nothing is taken from `retex_jax`.
"""

import numpy as np
from references import Flat, is_float

INPUTS, FEATURES = 12, 10


def inputs(num_tasks: int, num_examples: int = 8, seed: int = 1) -> list[np.ndarray]:
    """Inputs of every task, [N, 12], each task with directions and sizes of its own."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(num_examples, INPUTS)) * rng.uniform(0.3, 1.5, INPUTS)).astype(np.float32)
        for _ in range(num_tasks)
    ]


def heads(num_classes: list[int], seed: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(FEATURES, count)).astype(np.float32) for count in num_classes]


def _float64(leaf: np.ndarray) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def scores(model: Flat, head: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Logits of one example [12]: [C]."""
    linear = x @ _float64(model["dense/kernel"]) + _float64(model["dense/bias"])
    before = _float64(model["scale"]) * linear + x @ _float64(model["second/kernel"])
    return np.tanh(before) @ _float64(head)


def gradient(model: Flat, head: np.ndarray, x: np.ndarray, by_logits: np.ndarray) -> Flat:
    """The gradient of by_logits . logits of one example [12], by float leaf."""
    linear = x @ _float64(model["dense/kernel"]) + _float64(model["dense/bias"])
    scale = _float64(model["scale"])
    z = np.tanh(scale * linear + x @ _float64(model["second/kernel"]))
    by_sum = (_float64(head) @ by_logits) * (1 - z**2)
    result = {name: np.zeros(leaf.shape) for name, leaf in model.items() if is_float(leaf)}
    result["dense/kernel"] = np.outer(x, scale * by_sum)
    result["dense/bias"] = scale * by_sum
    result["scale"] = np.asarray(by_sum @ linear)
    result["second/kernel"] = np.outer(x, by_sum)
    return result


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def fisher_per_example(model: Flat, head: np.ndarray, examples: np.ndarray) -> Flat:
    """Mean over examples of sum_c p_c (grad log p_c)^2; of one output, of (grad f)^2."""
    total = {name: np.zeros(leaf.shape) for name, leaf in model.items() if is_float(leaf)}
    for x in examples.astype(np.float64):
        p = _probabilities(scores(model, head, x))
        for c in range(len(p)):
            by_logits = np.eye(len(p))[c] - p if len(p) > 1 else np.ones(1)
            for name, leaf in gradient(model, head, x, by_logits).items():
                total[name] = total[name] + p[c] * leaf**2 / len(examples)
    return total


def fisher_batch_sum(model: Flat, head: np.ndarray, examples: np.ndarray, batch_size: int) -> Flat:
    """The squared gradient of each batch's sum of sqrt(p_c) log p_c, over the number of examples."""
    total = {name: np.zeros(leaf.shape) for name, leaf in model.items() if is_float(leaf)}
    for start in range(0, len(examples), batch_size):
        sums = {name: np.zeros(leaf.shape) for name, leaf in model.items() if is_float(leaf)}
        for x in examples[start : start + batch_size].astype(np.float64):
            p = _probabilities(scores(model, head, x))
            root = np.sqrt(p)  # held fixed
            by_logits = root - root.sum() * p if len(p) > 1 else np.ones(1)
            for name, leaf in gradient(model, head, x, by_logits).items():
                sums[name] = sums[name] + leaf
        for name, leaf in sums.items():
            total[name] = total[name] + leaf**2 / len(examples)
    return total


def fisher_merge(
    pretrained: Flat,
    experts: list[Flat],
    fishers: list[Flat],
    variant: str,
    coefficients: list[float] | None = None,
    floor: float = 1e-6,
    normalize: bool = True,
) -> Flat:
    """sum c F theta / sum c F, with the floor and the norm of either code."""
    weights = list(coefficients or [1.0] * len(experts))
    if normalize:
        for task, fisher in enumerate(fishers):
            norm = np.sqrt(sum(np.sum(leaf**2) for leaf in fisher.values()))
            weights[task] /= norm + floor if variant == "batch_sum" else norm
    merged = {name: leaf for name, leaf in pretrained.items() if not is_float(leaf)}
    for name in fishers[0]:
        top, bottom = 0.0, 0.0
        for weight, fisher, expert in zip(weights, fishers, experts, strict=True):
            f = fisher[name] + floor if variant == "batch_sum" else np.maximum(fisher[name], floor)
            top = top + weight * f * _float64(expert[name])
            bottom = bottom + weight * f
        mean = sum(_float64(expert[name]) for expert in experts) / len(experts)
        merged[name] = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), mean)
    return merged


def linear_inputs(model: Flat, examples: np.ndarray) -> Flat:
    """What the two kernels read, [N, 12] each; the second's depends on the model."""
    x = examples.astype(np.float64)
    return {"dense/kernel": x, "second/kernel": np.tanh(_float64(model["scale"]) * x)}


def regmean(
    pretrained: Flat, experts: list[Flat], examples: list[np.ndarray], alpha: float
) -> Flat:
    """(sum G_t)^-1 sum G_t W_t for the two kernels, means for the rest."""
    merged = {}
    for name, leaf in pretrained.items():
        if not is_float(leaf):
            merged[name] = leaf
            continue
        kernels = [_float64(expert[name]) for expert in experts]
        merged[name] = np.asarray(sum(kernels) / len(kernels))
        if name in ("dense/kernel", "second/kernel"):
            total, moment = np.zeros((INPUTS, INPUTS)), np.zeros(leaf.shape)
            for expert, kernel, x in zip(experts, kernels, examples, strict=True):
                read = linear_inputs(expert, x)[name]
                gram = read.T @ read / len(read)
                gram = np.where(np.eye(INPUTS) == 1, gram, alpha * gram)
                total += gram
                moment += gram @ kernel
            merged[name] = np.linalg.inv(total) @ moment
    return merged
