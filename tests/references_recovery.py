"""A small network of mixed tasks in NumPy, float64, one input at a time."""

import numpy as np


def draw(num_tasks, width=6, vocabulary=11, rank=3, seed=0):
    """Merged leaves, and each task's own, of a table, a kernel with bias, and two bare vectors.

    The table's offset is S^T G_t^T (shared factor on the left), the kernel's G_t S in the paper's (out, in).
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    merged = {
        "table/embedding": normal(vocabulary, width),
        "dense/kernel": normal(width, width + 1),
        "dense/bias": normal(width + 1),
        "start": normal(width),
        "gain": normal(),
    }
    factors = {
        "table/embedding": (normal(num_tasks, width, rank), normal(rank, vocabulary)),
        "dense/kernel": (normal(num_tasks, width + 1, rank), normal(rank, width)),
        "dense/bias": (normal(num_tasks, width + 1), np.float32(0.5)),
        "start": (normal(num_tasks, width), np.float32(-1.5)),
        "gain": (normal(num_tasks), np.float32(2)),
    }
    return merged, factors


def expert(merged, factors, task):
    """theta_merge + G_t S, leaf by leaf."""
    base = {name: np.asarray(leaf, np.float64) for name, leaf in merged.items()}
    own = {name: np.asarray(pair[0], np.float64)[task] for name, pair in factors.items()}
    shared = {name: np.asarray(pair[1], np.float64) for name, pair in factors.items()}
    return {
        "table/embedding": base["table/embedding"]
        + shared["table/embedding"].T @ own["table/embedding"].T,
        "dense/kernel": base["dense/kernel"] + (own["dense/kernel"] @ shared["dense/kernel"]).T,
        **{name: base[name] + own[name] * shared[name] for name in ("dense/bias", "start", "gain")},
    }


def forward(params, tokens):
    """[L] tokens to [width + 1]."""
    x = np.concatenate([params["start"][None], params["table/embedding"][tokens]])
    y = np.tanh(x @ params["dense/kernel"] + params["dense/bias"])
    return params["gain"] * y.sum(axis=0)


def mixed(merged, factors, tokens, task_ids):
    """[n, L] tokens through the experts of their tasks, [n, width + 1]."""
    return np.stack(
        [
            forward(expert(merged, factors, task), row)
            for row, task in zip(tokens, task_ids, strict=True)
        ]
    )
