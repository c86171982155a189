"""Independent float64 NumPy references of the methods that mask task vectors, from the definitions.

Models are flat: leaf name to array. Nothing is taken from `retex_jax`.
"""

import numpy as np
from references import Flat, few_leaves, flax_model, grid_model, is_float

MODELS = {
    "2 tasks, all leaves": flax_model(2),
    "1 task": few_leaves(1),
    "8 tasks": few_leaves(8),
    "1 task, ties": grid_model(1),
    "2 tasks, ties": grid_model(2),
    "8 tasks, ties": grid_model(8),
}


def assert_close(found: Flat, want: Flat, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert set(found) == set(want)
    for name in want:
        one, two = np.asarray(found[name]), np.asarray(want[name])
        assert one.shape == two.shape, name
        one, two = one.astype(np.float64), two.astype(np.float64)
        np.testing.assert_allclose(one, two, rtol=rtol, atol=atol, err_msg=name)


def assert_like(found: Flat, pretrained: Flat) -> None:
    """The pretrained model's leaves, shapes and dtypes, and its buffers."""
    assert set(found) == set(pretrained)
    for name, leaf in pretrained.items():
        assert found[name].shape == leaf.shape, name
        assert found[name].dtype == leaf.dtype, name
        if not is_float(leaf):
            np.testing.assert_array_equal(found[name], leaf)


def other_buffers(experts: list[Flat]) -> list[Flat]:
    """The experts, with buffers that differ from the pretrained model's."""
    return [
        {
            name: leaf if is_float(leaf) else (leaf + 1).astype(leaf.dtype)
            for name, leaf in expert.items()
        }
        for expert in experts
    ]


def model_for_8_devices() -> tuple[Flat, list[Flat]]:
    """A pretrained model whose kernels eight devices divide, and two experts."""
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b/kernel": (3, 3, 4, 16), "c": ()}
    pretrained = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    experts = [
        {
            name: leaf + np.float32(0.1 * rng.normal(size=leaf.shape))
            for name, leaf in pretrained.items()
        }
        for _ in range(2)
    ]
    return pretrained, experts


def task_vectors(pretrained: Flat, experts: list[Flat]) -> dict[str, np.ndarray]:
    """theta_t - theta_0 by float leaf, [T, *shape]."""
    return {
        name: np.stack(
            [expert[name].astype(np.float64) - leaf.astype(np.float64) for expert in experts]
        )
        for name, leaf in pretrained.items()
        if is_float(leaf)
    }


def plus(pretrained: Flat, changes: Flat) -> Flat:
    """theta_0 plus a change of each float leaf."""
    return {
        name: leaf.astype(np.float64) + changes[name] if is_float(leaf) else leaf
        for name, leaf in pretrained.items()
    }


def dare(
    pretrained: Flat,
    experts: list[Flat],
    kept: list[Flat],
    drop: float,
    rescale: bool = True,
) -> list[Flat]:
    """Experts whose task vectors have lost what is not kept, and have grown by 1 / (1 - drop)."""
    factor = 1 / (1 - drop) if rescale else 1.0
    vectors = task_vectors(pretrained, experts)
    return [
        plus(
            pretrained,
            {name: factor * vectors[name][task] * kept[task][name] for name in vectors},
        )
        for task in range(len(experts))
    ]


def tall_mask(
    pretrained: Flat, experts: list[Flat], lambdas: list[float], coefficient: float = 1.0
) -> tuple[Flat, list[Flat]]:
    """The multi-task vector, and each task's mask."""
    vectors = task_vectors(pretrained, experts)
    multi = {name: coefficient * sum(leaf) for name, leaf in vectors.items()}
    keeps = []
    for task, lambda_t in enumerate(lambdas):
        keep = {}
        for name, leaf in vectors.items():
            nearer = np.abs(leaf[task]) - lambda_t * np.abs(multi[name] - leaf[task])
            keep[name] = np.asarray(nearer > 0)
        keeps.append(keep)
    return multi, keeps


def consensus(
    pretrained: Flat, experts: list[Flat], lambdas: list[float], k: int, alpha: float
) -> Flat:
    """theta_0 + alpha * the multi-task vector where k masks or more keep it."""
    multi, keeps = tall_mask(pretrained, experts, lambdas)
    changes = {}
    for name in multi:
        votes = sum(keep[name].astype(int) for keep in keeps)
        changes[name] = alpha * np.where(votes >= k, multi[name], 0)
    return plus(pretrained, changes)


def emr(
    pretrained: Flat, experts: list[Flat], variant: str
) -> tuple[Flat, list[Flat], np.ndarray, list[Flat]]:
    """The unified vector, the masks, the rescalers and the recovered experts; entry by entry."""
    vectors = task_vectors(pretrained, experts)
    num_tasks = len(experts)
    unified, keeps = {}, [{} for _ in experts]
    own, shared = np.zeros(num_tasks), np.zeros(num_tasks)
    for name, leaf in vectors.items():
        columns = leaf.reshape(num_tasks, -1)
        elected = np.zeros(columns.shape[1])
        kept = np.zeros(columns.shape, bool)
        for entry in range(columns.shape[1]):
            positive = columns[:, entry].sum() > 0
            for task in range(num_tasks):
                value = columns[task, entry]
                if (value > 0) if positive else (value < 0):
                    kept[task, entry] = True
                    if abs(value) > abs(elected[entry]):
                        elected[entry] = value
        weight = 1 / columns.shape[1] if variant == "code" else 1
        for task in range(num_tasks):
            own[task] += weight * np.abs(columns[task]).sum()
            shared[task] += weight * np.abs(elected[kept[task]]).sum()
            keeps[task][name] = kept[task].reshape(leaf.shape[1:])
        unified[name] = elected.reshape(leaf.shape[1:])
    rescalers = np.array([a / b if b else 0.0 for a, b in zip(own, shared, strict=True)])
    recovered = [
        plus(
            pretrained,
            {name: rescalers[task] * unified[name] * keeps[task][name] for name in unified},
        )
        for task in range(num_tasks)
    ]
    return unified, keeps, rescalers, recovered


def t_switch(
    pretrained: Flat, experts: list[Flat], dropped_tenths: int, variant: str
) -> list[Flat]:
    """The change of each expert, by float leaf."""
    changes = []
    for task in range(len(experts)):
        change = {}
        for name, leaf in task_vectors(pretrained, experts).items():
            values = leaf[task].ravel().tolist()
            groups = []
            for sign in (1, -1):
                ranked = sorted((sign * v for v in values if sign * v > 0), reverse=True)
                count = len(ranked) * (10 - dropped_tenths) // 10 or len(ranked)
                least = ranked[count - 1] if ranked else np.inf
                groups.append([i for i, v in enumerate(values) if sign * v >= least])
            size = [np.sqrt(np.mean([values[i] ** 2 for i in g])) if g else 0.0 for g in groups]
            if variant == "code" and any(groups):
                size = [np.sqrt(np.mean([values[i] ** 2 for g in groups for i in g]))] * 2
            new = np.zeros(len(values))
            new[groups[0]] = size[0]
            new[groups[1]] = -size[1]
            change[name] = new.reshape(leaf.shape[1:])
        changes.append(change)
    return changes
