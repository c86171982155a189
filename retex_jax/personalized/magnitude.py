"""Differences from a base, of which every matrix leaf keeps its largest entries: Twin-Merging's other trim.

As in the authors' code of Twin-Merging (arXiv:2406.15479): of each leaf of two or more axes the
floor(density * size) largest magnitudes are kept as they are (nothing is rescaled); leaves below two axes are kept
whole. Of equal magnitudes the first are kept; the code leaves that to torch.topk. Where the code
stops because nothing would be kept, one entry is.

Stored: kept values in float32, in the order of the flattened leaf, and a packed bit an entry of where they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.personalized import changes, low_rank, masks
from retex_jax.typing import Array, FlatParams, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MagnitudeState:
    """A base model and the trimmed differences of T experts from it.

    Attributes:
      base: nested dict, the pretrained model's shapes and dtypes.
      values: by trimmed leaf, [T, k], float32.
      kept: by trimmed leaf, [T, ceil(size / 8)], uint8.
      whole: differences of the other float leaves, [T, *shape], float32.
    """

    base: Params
    values: FlatParams
    kept: FlatParams
    whole: FlatParams

    @property
    def num_tasks(self) -> int:
        """T."""
        return next(iter({**self.values, **self.whole}.values())).shape[0]


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    density: float = 0.1,
    base: str | None = None,
    base_options: Mapping[str, Any] | None = None,
) -> MagnitudeState:
    """Trims every expert's difference from a base.

    Args:
      experts: the experts.
      key: typed PRNG key for the base merger.
      density: fraction kept, in (0, 1]; 1 keeps all leaves whole.
      base: name of a merger; None means the pretrained model.
      base_options: keywords of that merger.

    Returns:
      The state.

    Raises:
      ValueError: if `density` is out of range, or the base is unknown.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density!r}, expected a fraction in (0, 1]")
    merged = low_rank.base_model(experts, base, base_options, key)
    flat = tree.flatten(merged)
    values, kept, whole = {}, {}, {}
    for name in experts.float_leaves:
        differences = np.empty((experts.num_tasks, *experts.leaves[name].shape), np.float32)
        for task in range(experts.num_tasks):
            differences[task] = low_rank.difference(experts, flat, name, task)
        if differences.ndim < 3 or density == 1:
            whole[name] = jnp.asarray(differences)
            continue
        rows = differences.reshape(len(differences), -1)
        count = max(1, math.floor(density * rows.shape[1] + 1e-9))
        is_kept = np.stack([_largest(row, count) for row in rows])
        values[name] = jnp.asarray(rows[is_kept].reshape(len(rows), count))
        kept[name] = masks.pack(jnp.asarray(is_kept))
    return MagnitudeState(merged, values, kept, whole)


def _largest(row: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` largest magnitudes; of equal ones the first."""
    sizes = np.abs(row)
    smallest = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    is_kept = sizes > smallest
    is_kept[np.flatnonzero(sizes == smallest)[: count - is_kept.sum()]] = True
    return is_kept


def extra_bytes(state: MagnitudeState) -> int:
    """Bytes stored beside the base, for all tasks."""
    return tree.param_bytes((state.values, state.kept, state.whole))


def _restored(
    state: MagnitudeState, name: str, shape: tuple[int, ...], task: int | jax.Array
) -> Any:
    if name in state.whole:
        return state.whole[name][task]
    is_kept = masks.unpack(jnp.asarray(state.kept[name][task]), shape).ravel()
    places = jnp.cumsum(is_kept) - 1
    return jnp.where(is_kept, jnp.asarray(state.values[name][task])[places], 0.0).reshape(shape)


def recover(state: MagnitudeState, task: int | jax.Array) -> Params:
    """The base plus one expert's trimmed difference: nested dict like `state.base`.

    Raises:
      ValueError: if `task` is out of range.
    """
    changes.check_task(task, state.num_tasks)
    return changes.add_changes(state.base, lambda name, shape: _restored(state, name, shape, task))


def mix(state: MagnitudeState, weights: Array) -> Params:
    """The base plus a weighted sum of all trimmed differences.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like `state.base`.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    return changes.add_mixture(
        state.base,
        lambda name, shape, task: _restored(state, name, shape, task),
        weights,
        state.num_tasks,
    )
