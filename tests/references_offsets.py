"""Independent float64 NumPy references of the offsets' forms, written from the definitions.

Models are flat, as in `references`. Nothing is taken from `retex_jax`.
"""

import numpy as np
import references

Flat = dict[str, np.ndarray]


def offsets_of(base: Flat, experts: list[Flat], name: str, matrices: dict) -> np.ndarray:
    """D_t of one leaf: [T, a, b], or [T, *shape] below two axes."""
    leaves = [expert[name].astype(np.float64) - base[name].astype(np.float64) for expert in experts]
    if name in matrices:
        leaves = [references.as_matrix(leaf, matrices[name]) for leaf in leaves]
    return np.stack(leaves)


def stored_offset(state: object, name: str, embedding: np.ndarray) -> np.ndarray:
    """The offset that a state stores for a leaf, [a, b] or [*shape], from its arrays."""
    form = state.offsets[name]
    form = state.offsets[form.owner] if hasattr(form, "owner") else form
    arrays = {key: np.asarray(value, np.float64) for key, value in vars(form).items()
              if key != "orientation"}  # fmt: skip
    embedding = np.asarray(embedding, np.float64)
    if "left" in arrays:
        product = sum(
            weight * (left @ right) @ arrays["shared"]
            for weight, left, right in zip(embedding, arrays["left"], arrays["right"], strict=True)
        )
    else:
        factor = sum(
            weight * part for weight, part in zip(embedding, arrays["generator"], strict=True)
        )
        if not hasattr(form, "orientation"):
            return factor * arrays["shared"]
        product = factor @ arrays["shared"]
    if form.orientation == "left":
        product = product.T
    if "scales" in arrays:
        product = product + (embedding @ arrays["scales"]) * arrays["direction"]
    return product


def check_state(state: object, recover: object, experts: list[Flat], matrices: dict) -> None:
    """What is recovered is the merged model plus what is stored, and the report measures that."""
    base = references.flat(state.merged)
    embeddings = np.asarray(state.task_embeddings)
    recovered = [references.flat(recover(state, task)) for task in range(len(experts))]
    floats = [name for name in base if references.is_float(base[name])]
    assert list(state.offsets) == sorted(floats)
    for name, leaf in base.items():
        if name not in floats:
            for model in recovered:
                np.testing.assert_array_equal(model[name], leaf)
                assert model[name].dtype == leaf.dtype
            continue
        offsets = offsets_of(base, experts, name, matrices)
        stored = np.stack([stored_offset(state, name, embedding) for embedding in embeddings])
        for task, model in enumerate(recovered):
            found = model[name].astype(np.float64) - leaf
            found = references.as_matrix(found, matrices[name]) if name in matrices else found
            np.testing.assert_allclose(found, stored[task], rtol=1e-4, atol=2e-6, err_msg=name)
            assert model[name].shape == leaf.shape
            assert model[name].dtype == leaf.dtype
        energy = np.sum(offsets**2)
        assert abs(state.report.energies[name] - energy) <= 1e-5 * energy + 1e-12, name
        error = np.sum((offsets - stored) ** 2)
        assert abs(state.report.residuals[name] - error) <= 1e-4 * error + 1e-11 * energy + 1e-12


def check_mixture(state: object, mix: object, recover: object, num_tasks: int) -> None:
    """Mixed embeddings give mixed offsets."""
    weights = np.random.default_rng(7).normal(size=num_tasks).astype(np.float32)
    base, found = references.flat(state.merged), references.flat(mix(state, weights))
    experts = [references.flat(recover(state, task)) for task in range(num_tasks)]
    for name, leaf in base.items():
        if not references.is_float(leaf):
            np.testing.assert_array_equal(found[name], leaf)
            continue
        want = leaf + sum(
            float(weight) * (expert[name].astype(np.float64) - leaf)
            for weight, expert in zip(weights, experts, strict=True)
        )
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


def never_rises(history: np.ndarray, energy: float) -> None:
    """Up to the rounding of float64 sums of this energy."""
    history = np.asarray(history)
    assert history.dtype == np.float64
    assert np.all(np.diff(history) <= 1e-12 * energy), np.diff(history).max()


def tail(matrix: np.ndarray, rank: int) -> float:
    """Squared singular values past the first `rank`."""
    return float(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def leading_rows(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(matrix, full_matrices=False)[2][:rank]


def factorized(offsets: np.ndarray, rank: int, task_rank: int, sweeps: int) -> list[float]:
    """ReTeX-E by alternating, from the better of two starts: the squared error after each half sweep."""

    def fit_tasks(shared: np.ndarray) -> tuple[np.ndarray, float]:
        factors = np.stack([truncated(offset @ shared.T, task_rank) for offset in offsets])
        return factors, float(np.sum((offsets - factors @ shared) ** 2))

    columns = offsets.shape[-1]
    single = np.stack([truncated(offset, task_rank) for offset in offsets])
    starts = [leading_rows(part.reshape(-1, columns), rank) for part in (offsets, single)]
    shared = min(starts, key=lambda start: fit_tasks(start)[1])
    factors, error = fit_tasks(shared)
    history = [error]
    for _ in range(sweeps):
        stack = factors.reshape(-1, rank)
        solved = np.linalg.lstsq(stack, offsets.reshape(-1, columns), rcond=1e-7)[0]
        history.append(float(np.sum((offsets - factors @ solved) ** 2)))
        shared = np.linalg.qr(solved.T)[0].T
        factors, error = fit_tasks(shared)
        history.append(error)
    return history


def affine(
    offsets: np.ndarray, direction: np.ndarray, rank: int, sweeps: int
) -> tuple[list[float], np.ndarray]:
    """Eq. 13 by alternating from gamma = 1: squared errors, and gamma after each sweep [1 + n, T]."""
    num_tasks, rows, columns = offsets.shape
    gammas = [np.ones(num_tasks)]
    shared = leading_rows(offsets.reshape(-1, columns), rank)
    history = [tail(offsets.reshape(-1, columns), rank)]
    for _ in range(sweeps):
        # One unknown for gamma - 1, a r unknowns for G: column (i, k) of the design has row k of S in row i.
        design = np.zeros((rows, columns, 1 + rows * rank))
        design[:, :, 0] = direction
        for row in range(rows):
            design[row, :, 1 + row * rank : 1 + (row + 1) * rank] = shared.T
        design = design.reshape(rows * columns, -1)
        solved = [np.linalg.lstsq(design, offset.ravel(), rcond=None)[0] for offset in offsets]
        errors = [
            np.sum((design @ x - offset.ravel()) ** 2)
            for x, offset in zip(solved, offsets, strict=True)
        ]
        history.append(float(np.sum(errors)))
        scales = np.array([x[0] for x in solved])
        gammas.append(1 + scales)
        left = (offsets - scales[:, None, None] * direction).reshape(-1, columns)
        shared = leading_rows(left, rank)
        history.append(tail(left, rank))
    return history, np.stack(gammas)


def shape_shared(stacks: list[np.ndarray], rank: int | None) -> tuple[np.ndarray, float]:
    """The best offset [T, ...] that leaves share, and its squared error; free below two axes (None)."""
    mean = sum(stacks) / len(stacks)
    if rank is not None:
        mean, _ = references.low_rank(mean, rank)
    return mean, float(sum(np.sum((stack - mean) ** 2) for stack in stacks))


def embeddings_basis(gram: np.ndarray, d_emb: int, bias: bool) -> np.ndarray:
    """The orthonormal columns, the constant among them with a bias, that hold most of a Gram matrix."""
    num_tasks = len(gram)
    if not bias:
        return np.linalg.svd(gram)[0][:, :d_emb]
    ones = np.ones((num_tasks, 1)) / np.sqrt(num_tasks)
    across = np.linalg.svd(ones.T)[2][1:].T  # orthogonal to the constant
    return np.hstack([across @ np.linalg.svd(across.T @ gram @ across)[0][:, :d_emb], ones])


def tucker(
    stacks: dict[str, np.ndarray], ranks: dict[str, int], d_emb: int, bias: bool, sweeps: int
) -> list[float]:
    """HOOI over all leaves ([T, a, b] with a rank, [T, ...] without): errors after each half sweep."""

    def gram(parts: dict[str, np.ndarray]) -> np.ndarray:
        flat = np.hstack([part.reshape(len(part), -1) for part in parts.values()])
        return flat @ flat.T

    def error(basis: np.ndarray, rows: dict[str, np.ndarray]) -> float:
        total = 0.0
        for name, stack in stacks.items():
            found = np.tensordot(basis @ basis.T, stack, 1)
            if name in rows:
                found = found @ rows[name].T @ rows[name]
            total += np.sum((stack - found) ** 2)
        return float(total)

    basis, history = embeddings_basis(gram(stacks), d_emb, bias), []
    for _ in range(sweeps):
        rows = {
            name: leading_rows(
                np.tensordot(basis.T, stacks[name], 1).reshape(-1, stacks[name].shape[-1]), rank
            )
            for name, rank in ranks.items()
        }
        history.append(error(basis, rows))
        projected = {
            name: stack @ rows[name].T if name in rows else stack for name, stack in stacks.items()
        }
        basis = embeddings_basis(gram(projected), d_emb, bias)
        history.append(error(basis, rows))
    return history


def objective(
    found: list[Flat], experts: list[Flat], pretrained: Flat, loss: str, l2_weight: float = 1.0
) -> float:
    """Eq. 5, Eq. 15, or Eq. 15 + lambda Eq. 5, of recovered models (float64) and experts."""
    floats = [name for name in pretrained if references.is_float(pretrained[name])]

    def vector(model: Flat, start: Flat) -> np.ndarray:
        return np.concatenate(
            [(model[name].astype(np.float64) - start[name]).ravel() for name in floats]
        )

    l2 = cosine = 0.0
    for model, expert in zip(found, experts, strict=True):
        l2 += np.sum(vector(model, expert) ** 2)
        one, two = vector(model, pretrained), vector(expert, pretrained)
        cosine += 1 - (one @ two) / (np.linalg.norm(one) * np.linalg.norm(two))
    return {"l2": l2, "cosine": cosine, "cosine_l2": cosine + l2_weight * l2}[loss]
