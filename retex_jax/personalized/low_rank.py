"""What the low-rank methods share: the base, truncated SVDs, ranks and byte budgets, and recovery.

Numerics: differences in float64; singular vectors from the eigenvectors of the smaller Gram matrix, in float64,
which on two cores takes 1.6 to 2.7 times less time than float64 SVDs of 768x768 and 3072x768 (0.21 against
0.33 s, 0.50 against 1.36 s) and is right to 1e-16 (sigma_1 / sigma)^2.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.buffers import aligned_empty, give_back_freed
from retex_jax.experts import ExpertSet
from retex_jax.mergers import MERGERS
from retex_jax.mergers.leafwise import merge_leaves
from retex_jax.offsets.state import LeafPlan
from retex_jax.typing import FlatParams, Params, ProgressFn

# Up to this fraction of the largest one, a singular value is 0: its vectors would be rounding.
_NO_ENERGY = 1e-6
# Up to this fraction of the largest one, an entry of singular vectors is 0.
_ZERO_ENTRY = 1e-9


class Decomposition(NamedTuple):
    """Of G matrices: U^T [G, k, a], Sigma [G, k] and V^T [G, k, b]."""

    left: Any
    values: Any
    right: Any


@jax.jit(static_argnames="rank")
def truncated_svd(matrices: jax.Array, rank: int) -> Decomposition:
    """The `rank` largest singular values of matrices, and their vectors.

    A pair (u, v) is as good as (-u, -v): of the two, the one is taken in which u's largest entry is
    positive (of entries within 0.1% of the largest magnitude, the first). A singular value of at most
    1e-6 of the largest is 0, and so are its vectors; an entry of at most 1e-9 of the largest is 0.

    Args:
      matrices: [G, a, b]; float64 for what the module says of precision.
      rank: k, from 1 to min(a, b).

    Returns:
      The decomposition, in descending order.
    """
    is_tall = matrices.shape[-2] >= matrices.shape[-1]
    # Products that name their axes take matrices as they lie, without a transposed copy.
    first, second = ("gij", "gik") if is_tall else ("gji", "gki")
    with jax.default_matmul_precision("highest"):
        _, vectors = jnp.linalg.eigh(jnp.einsum(f"{first},{second}->gjk", matrices, matrices))
        vectors = vectors[..., ::-1][..., :rank]
        images = jnp.einsum(f"{first},gjr->gir", matrices, vectors)
    values = jnp.linalg.norm(images, axis=-2)
    is_kept = jnp.cumprod(values > _NO_ENERGY * values[..., :1], axis=-1).astype(bool)
    images = images / jnp.where(is_kept, values, 1)[..., None, :]
    pair = (images, vectors) if is_tall else (vectors, images)
    left, right = (
        _without_rounding(jnp.where(is_kept[..., None], jnp.swapaxes(side, -1, -2), 0))
        for side in pair
    )
    sizes = jnp.abs(left)
    first = jnp.argmax(sizes >= 0.999 * sizes.max(axis=-1, keepdims=True), axis=-1)
    leading = jnp.take_along_axis(left, first[..., None], axis=-1)
    signs = jnp.where(leading < 0, -1, 1).astype(left.dtype)
    return Decomposition(left * signs, jnp.where(is_kept, values, 0), right * signs)


def _without_rounding(vectors: jax.Array) -> jax.Array:
    sizes = jnp.abs(vectors)
    return jnp.where(sizes > _ZERO_ENTRY * sizes.max(axis=(-1, -2), keepdims=True), vectors, 0)


def base_model(
    experts: ExpertSet,
    base: str | None,
    base_options: Mapping[str, Any] | None,
    key: jax.Array | None,
) -> Params:
    """The model that differences are taken from.

    Args:
      experts: the experts.
      base: name of a merger, or None for the pretrained model.
      base_options: keywords of that merger.
      key: typed PRNG key for that merger, `jax.random.key(0)` when not given.

    Returns:
      Nested dict with the pretrained model's shapes and dtypes.

    Raises:
      ValueError: if `base` is unknown, or options are given without a merger.
    """
    if base is None:
        if base_options:
            raise ValueError(f"base_options: got {dict(base_options)!r}, expected none: no base")
        return merge_leaves(experts, lambda name: jnp.asarray(experts.pretrained(name), "float32"))
    if base not in MERGERS:
        suggestion = tree.did_you_mean(base, MERGERS)
        raise ValueError(f"base: got {base!r}, expected one of {sorted(MERGERS)}{suggestion}")
    key = jax.random.key(0) if key is None else key
    return MERGERS[base](experts, key=key, **base_options or {})


def difference(experts: ExpertSet, base: FlatParams, name: str, task: int) -> np.ndarray:
    """theta_t - theta_base of one leaf of one expert: [*shape], float64, on the host."""
    own, start = np.asarray(experts.expert(name, task)), np.asarray(base[name])
    return np.subtract(own, start, dtype=np.float64, casting="unsafe")


def decompose(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    group_bytes: int,
    progress: ProgressFn | None,
) -> Iterator[tuple[str, Decomposition]]:
    """Decomposes the differences of every planned leaf, leaves of equal shape at a time.

    Args:
      experts: the experts.
      base: leaf name to leaf.
      plans: of the matrix leaves.
      group_bytes: the most float64 bytes of one batch of matrices; one leaf of one expert at least.
      progress: called with (matrices done, matrices), where each expert's leaf is a matrix.

    Yields:
      Leaf name and decomposition of one expert's leaf (without the axis G), float64, on the host; each
      leaf's experts come in task order.
    """
    keys = {name: (plan.shape, plan.rank) for name, plan in plans.items()}
    done = 0
    for group in tree.groups(keys, lambda key: max(1, group_bytes // (8 * math.prod(key[0])))):
        for task in range(experts.num_tasks):
            with jax.enable_x64(True):
                # Not kept under a name: they may be large, and are done with once they are decomposed.
                result = jax.device_get(
                    truncated_svd(
                        _differences(experts, base, plans, group, task), plans[group[0]].rank
                    )
                )
            give_back_freed()
            for index, name in enumerate(group):
                yield name, Decomposition(*(array[index] for array in result))
            done += len(group)
            if progress:
                progress(done, len(plans) * experts.num_tasks)


def _differences(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    group: Sequence[str],
    task: int,
) -> np.ndarray:
    """One expert's leaves of one shape as matrices: [G, a, b], float64."""
    matrices = aligned_empty((len(group), *plans[group[0]].shape), np.float64)
    for matrix, name in zip(matrices, group, strict=True):
        own, start = (
            tree.to_matrix(np.asarray(leaf), plans[name].view)
            for leaf in (experts.expert(name, task), base[name])
        )
        np.subtract(own, start, out=matrix, dtype=np.float64, casting="unsafe")
    return matrices


def matrix_plans(experts: ExpertSet, rank: Callable[[tuple[int, int]], int]) -> dict[str, LeafPlan]:
    """Plans every float leaf of two or more axes; `rank` takes (a, b)."""
    plans = {}
    for name in experts.float_leaves:
        view = tree.matrix_view(name, experts.leaves[name].shape, experts.layout)
        if view is not None:
            shape = tree.matrix_shape(experts.leaves[name].shape, view)
            plans[name] = LeafPlan(view, shape, rank(shape))
    return plans


def leaf_rank(shape: tuple[int, int], rank_ratio: float) -> int:
    """floor(rank_ratio * min(a, b)), at least 1; 0.29 * 100 is 29, whatever its rounding."""
    return max(1, math.floor(rank_ratio * min(shape) + 1e-9))


def largest_ratio(
    shapes: Iterable[tuple[int, int]],
    matrix_bytes: Callable[[tuple[int, int], int], int],
    budget: float,
) -> float:
    """The largest rank ratio whose matrices fit a budget.

    Args:
      shapes: (a, b) of every matrix leaf.
      matrix_bytes: (shape, rank) -> bytes stored for one task.
      budget: bytes for all matrix leaves of one task.

    Returns:
      A ratio in (0, 1].

    Raises:
      ValueError: if even rank 1 does not fit.
    """
    counts = Counter(shapes)

    def total(ratio: float) -> int:
        return sum(
            count * matrix_bytes(shape, leaf_rank(shape, ratio)) for shape, count in counts.items()
        )

    # Every ratio at which a rank changes; bytes need not grow with rank where a leaf is kept whole.
    ratios = {rank / min(shape) for shape in counts for rank in range(1, min(shape) + 1)}
    for ratio in sorted(ratios | {1.0}, reverse=True):
        if total(ratio) <= budget:
            return ratio
    raise ValueError(
        f"bytes_per_task, amr: leave {math.floor(budget)} bytes for matrices, "
        f"expected at least the {total(min(ratios))} of rank 1"
    )


def check_sizes(**sizes: float | None) -> None:
    """Checks the ways to say how much is kept, of which at most one may be given.

    Raises:
      ValueError: if more than one is given, or one is out of range; all problems are listed.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    problems = []
    if len(given) > 1:
        problems.append(f"{', '.join(given)}: got {len(given)} of {sorted(sizes)}, expected one")
    for name, value in given.items():
        if name == "rank":
            is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not is_integer or value < 1:
                problems.append(f"rank: got {value!r}, expected an integer of 1 or more")
        elif name == "rank_ratio":
            if not 0 < value <= 1:
                problems.append(f"rank_ratio: got {value!r}, expected a fraction in (0, 1]")
        elif not 0 < value < math.inf:
            problems.append(f"{name}: got {value!r}, expected a finite number above 0")
    if problems:
        raise ValueError("\n".join(problems))


def byte_budget(
    experts: ExpertSet, bytes_per_task: float | None, amr: float | None
) -> float | None:
    """Bytes a task: as given, or AMR * bytes of one model (all leaves, in their own dtypes)."""
    if amr is None:
        return bytes_per_task
    return amr * tree.param_bytes(dict(experts.leaves))
