"""Generators that are learned, and the objectives that they are learned by (ReTeX, arXiv:2606.26902).

Each leaf has one linear layer from the task embedding e_t to the task factor G_t, and a shared factor S,
initialised at zero (4.1, B.1). ReTeX-E has two layers, for A_t and B_t with G_t = A_t B_t (5.5); the affine rule
one more, for gamma_t (A.2; the paper names no initialiser: here that of any other layer, so that gamma_t has to
converge to 1 as in Fig. 7). Objectives: the L2 loss (Eq. 5); sum_t (1 - cos(tau_hat_t, tau_t)) over the whole
flattened task vectors tau_t = theta_t - theta_0 (Eq. 15); and that plus lambda times the L2 loss (C.3). All in
float32; leaves of one shape are one stack of G.
"""

from functools import partial
from typing import Any, Literal, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

LearnedForm = Literal["product", "factorized", "shape_shared", "affine"]
Loss = Literal["l2", "cosine", "cosine_l2"]

# Squared norms below this are no direction: the cosine with them is 0.
_NO_DIRECTION = 1e-24


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
      loss: "l2" (Eq. 5), "cosine" (Eq. 15), or "cosine_l2": cosine plus `l2_weight` times L2.
      l2_weight: lambda.
    """

    loss: Loss = "l2"
    l2_weight: float = 1.0


class Problem(NamedTuple):
    """What a form is fitted to; o_t are its offsets, D_t the experts', M = theta_merge - theta_0.

    Attributes:
      targets: D_t by group of leaves, [G, T, a, b] or, below two axes, [G, T, *shape]; where a shape's leaves
        share their offset the mean of theirs, G = 1.
      directions: M by group, [G, a, b] or [G, *shape], like `targets`; empty where nothing needs it.
      counts: how many leaves share an offset, by group, [].
      energies: ||D_t||^2 over all leaves, [T].
      alignments: <M, D_t> over all leaves, [T].
      direction_energy: ||M||^2 over all leaves, [].
    """

    targets: dict[int, jax.Array]
    directions: dict[int, jax.Array]
    counts: dict[int, jax.Array]
    energies: jax.Array
    alignments: jax.Array
    direction_energy: jax.Array


def init_params(
    key: jax.Array,
    names: list[list[str]],
    targets: dict[int, jax.Array],
    ranks: dict[int, int | None],
    d_emb: int,
    *,
    form: LearnedForm = "product",
    task_rank: int | None = None,
) -> dict[str, Any]:
    """Draws the initial parameters.

    Args:
      key: typed PRNG key, folded by leaf name, so that a leaf's draw does not depend on the others.
      names: of the leaves of each group, of which the first G are drawn for.
      targets: offsets by group of leaves, [G, T, a, b] or, below two axes, [G, T, *shape].
      ranks: by group; None below two axes.
      d_emb: size of the embeddings.
      form: "factorized" and "affine" have more layers.
      task_rank: r_g of "factorized"; leaves of a rank up to it keep one layer.

    Returns:
      {"embeddings": [T, d_emb], "groups": {group: {"weight": [G, d_emb, a, r] or [G, d_emb, *shape],
      "bias": without d_emb, "shared": zeros [G, r, b] or [G]}}}, float32. "factorized" has "weight" for A_t,
      [G, d_emb, a, r_g], and "inner_weight", "inner_bias" for B_t, [G, d_emb, r_g, r]; "affine" has
      "gamma_weight" [G, d_emb] and "gamma_bias" [G]: both in groups of matrices.
    """
    num_tasks = targets[0].shape[1]
    embedding_key, key = jax.random.split(key)
    groups = {}
    for index, target in targets.items():
        size, _, *shape = target.shape
        rank = ranks[index]
        factor: tuple[int, ...] = (*shape,) if rank is None else (shape[0], rank)
        more: dict[str, tuple[int, ...]] = {}
        if rank is not None and form == "affine":
            more["gamma"] = ()
        if rank is not None and task_rank is not None and has_inner(form, rank, task_rank):
            factor, more["inner"] = (shape[0], task_rank), (task_rank, rank)
        shared = (size,) if rank is None else (size, rank, shape[1])
        hashes = np.array([crc32(name.encode()) for name in names[index][:size]], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
        # Weight and bias in one draw: PyTorch takes both from the same interval.
        bound = d_emb**-0.5
        draw = partial(jax.random.uniform, minval=-bound, maxval=bound)
        linear = jax.vmap(partial(draw, shape=(d_emb + 1, *factor)))(keys)
        groups[index] = {
            "weight": linear[:, :-1],
            "bias": linear[:, -1],
            "shared": jnp.zeros(shared),
        }
        for layer, part in more.items():
            own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, crc32(layer.encode()))
            linear = jax.vmap(partial(draw, shape=(d_emb + 1, *part)))(own_keys)
            groups[index] |= {f"{layer}_weight": linear[:, :-1], f"{layer}_bias": linear[:, -1]}
    return {"embeddings": jax.random.normal(embedding_key, (num_tasks, d_emb)), "groups": groups}


def task_factors(params: dict[str, Any], index: int, embeddings: jax.Array) -> jax.Array:
    """Generates G_t of one group of leaves for a batch of embeddings [t, d_emb].

    Returns:
      [G, t, a, r] or, below two axes, [G, t, *shape].
    """
    group = params["groups"][index]
    factor = linear_layer(group, "", embeddings)
    if "inner_weight" not in group:
        return factor
    return jnp.matmul(factor, linear_layer(group, "inner_", embeddings), precision="highest")


def gammas(params: dict[str, Any], index: int, embeddings: jax.Array) -> jax.Array:
    """Generates gamma_t of one group of matrices for a batch of embeddings: [G, t]."""
    return linear_layer(params["groups"][index], "gamma_", embeddings)


def linear_layer(group: dict[str, jax.Array], prefix: str, embeddings: jax.Array) -> jax.Array:
    """One linear layer of a group of leaves: [t, d_emb] to [G, t, *outputs]."""
    weight, bias = group[prefix + "weight"], group[prefix + "bias"]
    return jnp.einsum("td,gd...->gt...", embeddings, weight, precision="highest") + bias[:, None]


def predict(
    params: dict[str, Any],
    index: int,
    embeddings: jax.Array,
    direction: jax.Array | None = None,
) -> jax.Array:
    """Generates the offsets of one group of leaves (Eq. 3, or 13) for a batch of embeddings [t, d_emb].

    Args:
      params: of `init_params`.
      index: of the group.
      embeddings: [t, d_emb].
      direction: M, [G, a, b], which the affine rule needs.

    Returns:
      [G, t, a, b] or, below two axes, [G, t, *shape].
    """
    factor = task_factors(params, index, embeddings)
    shared = params["groups"][index]["shared"]
    if shared.ndim == 1:
        return factor * shared.reshape(-1, *[1] * (factor.ndim - 1))
    offsets = jnp.einsum("gtar,grb->gtab", factor, shared, precision="highest")
    if direction is None or "gamma_weight" not in params["groups"][index]:
        return offsets
    scales = gammas(params, index, embeddings) - 1
    return offsets + scales[:, :, None, None] * direction[:, None]


def loss_fn(
    params: dict[str, Any],
    targets: dict[int, jax.Array],
    tasks: jax.Array | None = None,
    is_split: bool = False,
) -> jax.Array:
    """Eq. 5 over the given tasks [t] (None: all): the sum of squared errors of all their leaves.

    A matrix leaf's square is multiplied out, ||D||^2 - 2 <D S^T, G> + <G^T G, S S^T>, so that no product
    G S is formed: a step then takes two large matrix products instead of three, and no array as large as
    the offsets. The value is right to float32 rounding of ||D||^2. Where devices split the rows, they are not stacked.
    """
    embeddings = params["embeddings"] if tasks is None else params["embeddings"][tasks]
    squares = []
    for index, target in targets.items():
        offsets = target if tasks is None else target[:, tasks]
        shared = params["groups"][index]["shared"]
        if shared.ndim == 1:
            squares.append(jnp.sum((predict(params, index, embeddings) - offsets) ** 2))
            continue
        factor = task_factors(params, index, embeddings)
        if not is_split:
            # Stacked vertically: contracting one axis (T a) is much faster on CPUs than two.
            offsets, factor = _stacked(offsets), _stacked(factor)
        squares.append(_squared_error("ta" if is_split else "n", factor, shared, offsets))
    return jnp.stack(squares).sum()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _squared_error(
    rows: str, factor: jax.Array, shared: jax.Array, offsets: jax.Array
) -> jax.Array:
    """||D - G S||^2 of a group of leaves, without G S; its gradient takes no product twice.

    Args:
      rows: the axes of the rows, "n" or "ta".
      factor: G, [G, *rows, r].
      shared: S, [G, r, b].
      offsets: D, [G, *rows, b]; no gradient is taken by it.
    """
    return _with_residuals(rows, factor, shared, offsets)[0]


def _with_residuals(
    rows: str, factor: jax.Array, shared: jax.Array, offsets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    projected = jnp.einsum(f"g{rows}b,grb->g{rows}r", offsets, shared)
    shared_gram = jnp.einsum("grb,gsb->grs", shared, shared)
    error = jnp.einsum(f"g{rows}r,grs->g{rows}s", factor, shared_gram) - projected
    value = jnp.sum(offsets**2) + jnp.sum((error - projected) * factor)
    return value, (factor, shared, offsets, error)


def _gradient(
    rows: str, residuals: tuple[jax.Array, ...], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """2 (G S - D) S^T and 2 G^T (G S - D)."""
    factor, shared, offsets, error = residuals
    factor_gram = jnp.einsum(f"g{rows}r,g{rows}s->grs", factor, factor)
    back = jnp.einsum("grs,gsb->grb", factor_gram, shared)
    back -= jnp.einsum(f"g{rows}r,g{rows}b->grb", factor, offsets)
    return 2 * scale * error, 2 * scale * back, None


_squared_error.defvjp(_with_residuals, _gradient)


def _stacked(matrices: jax.Array) -> jax.Array:
    """[G, t, a, b] to [G, t a, b]."""
    return matrices.reshape(len(matrices), -1, matrices.shape[-1])


def objective_fn(
    params: dict[str, Any],
    problem: Problem,
    tasks: jax.Array | None = None,
    *,
    objective: Objective,
    form: LearnedForm,
    is_split: bool = False,
) -> jax.Array:
    """The objective over the given tasks [t] (None: all), without forming G S.

    With <o_t, D_t>, <o_t, M> and ||o_t||^2 summed over leaves, the L2 loss is sum_t ||D_t||^2 - 2 <o_t, D_t> +
    ||o_t||^2, and the cosine that of M + o_t with M + D_t.
    """
    if objective.loss == "l2" and form in ("product", "factorized"):
        return loss_fn(params, problem.targets, tasks, is_split)
    embeddings = params["embeddings"] if tasks is None else params["embeddings"][tasks]
    energies, alignments = problem.energies, problem.alignments
    if tasks is not None:
        energies, alignments = energies[tasks], alignments[tasks]
    with_targets, with_directions, squares = jnp.zeros((3, len(embeddings)))
    for index, target in problem.targets.items():
        offsets = target if tasks is None else target[:, tasks]
        direction, count = problem.directions.get(index), problem.counts[index]
        parts = _moments(params, index, embeddings, offsets, direction, is_split)
        with_targets += count * parts[0]
        with_directions += count * parts[1]
        squares += count * parts[2]
    l2 = jnp.sum(energies - 2 * with_targets + squares)
    if objective.loss == "l2":
        return l2
    size = problem.direction_energy
    products = size + alignments + with_directions + with_targets
    found = jnp.maximum(size + 2 * with_directions + squares, _NO_DIRECTION)
    wanted = jnp.maximum(size + 2 * alignments + energies, _NO_DIRECTION)
    cosine = jnp.sum(1 - products / jnp.sqrt(found) / jnp.sqrt(wanted))
    return cosine if objective.loss == "cosine" else cosine + objective.l2_weight * l2


def _moments(
    params: dict[str, Any],
    index: int,
    embeddings: jax.Array,
    targets: jax.Array,
    direction: jax.Array | None,
    is_split: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """<o_t, D_t>, <o_t, M> and ||o_t||^2 of one group of leaves, each [t]; M counts as 0 where it is None."""
    group, num_tasks = params["groups"][index], len(embeddings)
    shared = group["shared"]
    if shared.ndim == 1:
        offsets = predict(params, index, embeddings)
        line = jnp.zeros(()) if direction is None else direction[:, None]
        parts = (offsets * targets, offsets * line, offsets**2)
        one, two, three = (jnp.sum(part, axis=(0, *range(2, part.ndim))) for part in parts)
        return one, two, three
    factor = task_factors(params, index, embeddings)
    stack = targets if is_split else _stacked(targets)
    projected = jnp.einsum("g...b,grb->g...r", stack, shared).reshape(factor.shape)
    with_targets = jnp.sum(projected * factor, axis=(2, 3))  # [G, t]
    factor_grams = jnp.einsum("gtar,gtas->gtrs", factor, factor)
    shared_grams = jnp.einsum("grb,gsb->grs", shared, shared)
    squares = jnp.sum(factor_grams * shared_grams[:, None], axis=(2, 3))
    if direction is None:
        return with_targets.sum(0), jnp.zeros(num_tasks), squares.sum(0)
    line = jnp.einsum("gab,grb->gar", direction, shared)
    with_direction = jnp.sum(line[:, None] * factor, axis=(2, 3))
    if "gamma_weight" in group:
        scales = gammas(params, index, embeddings) - 1
        size = jnp.sum(direction**2, axis=(1, 2))[:, None]
        with_targets += scales * jnp.einsum("gab,gtab->gt", direction, targets)
        squares += 2 * scales * with_direction + scales**2 * size
        with_direction += scales * size
    return with_targets.sum(0), with_direction.sum(0), squares.sum(0)


def has_inner(form: LearnedForm, rank: int | None, task_rank: int | None) -> bool:
    """Whether the task factors of leaves of this rank are products."""
    return form == "factorized" and rank is not None and task_rank is not None and rank > task_rank
