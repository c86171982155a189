"""DARE (arXiv:2311.03099): drop entries of the task vectors at random, rescale, merge.

delta_t = mask_t * tau_t / (1 - p), with mask_t ~ Bernoulli(1 - p) for each entry, so that the mean of
delta_t is tau_t. What is left is merged by Weight Averaging, Task Arithmetic or TIES.

Needs no data for a given p: the authors' code (MergeLM) searches 0.1 to 0.9, fusion_bench takes 0.5, as
this does. At p = 1 the factor is infinite; the authors' code then leaves it out and merges nothing, here
it is an error.

A mask depends on the key, the leaf's name and the expert's name only, so it is the same in any order
of tasks, for any subset of leaves, in any parts, and under any sharding. It is drawn again whenever a leaf is
read, so no mask is kept. p is rounded to a multiple of 2^-16, in the factor as well.
Computed in float32.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.mergers import average, task_arithmetic, ties
from retex_jax.typing import Array, Params

_MERGERS = {
    "weight_average": average.fit,
    "task_arithmetic": task_arithmetic.fit,
    "ties": ties.fit,
}


# What is drawn for an entry: a 16-bit integer.
_LEVELS = 1 << 16
_BLOCK = 1 << 15  # entries drawn at a time, which stay in the cache


def draw_mask(
    key: jax.Array, leaf: str, task: str, size: int, drop: float, start: int = 0
) -> np.ndarray:
    """Which entries of one leaf of one task are kept.

    The key is folded by the CRC-32 of both names into the seed of a stream of 16-bit integers, one an
    entry. They are drawn on the host, where that takes a tenth of the time of jax.random on a CPU.

    Args:
      key: typed PRNG key.
      leaf: the leaf's name.
      task: the expert's name.
      size: number of entries.
      drop: p, as `rounded` gives it.
      start: the first entry, a multiple of 4.

    Returns:
      [size], bool.
    """
    return _draw(_words(key), leaf, task, size, drop, start)


def _words(key: jax.Array) -> list[int]:
    """What a key consists of, on the host."""
    return np.asarray(jax.random.key_data(key)).ravel().tolist()


def _draw(words: list[int], leaf: str, task: str, size: int, drop: float, start: int) -> np.ndarray:
    """As `draw_mask`, for a key whose words are at hand: asking a device for them takes as long as a part's mask."""
    stream = np.random.PCG64DXSM([*words, zlib.crc32(leaf.encode()), zlib.crc32(task.encode())])
    stream.advance(start // 4)
    kept = np.empty(size, bool)
    for first in range(0, size, _BLOCK):
        block = kept[first : first + _BLOCK]
        drawn = stream.random_raw(-(-block.size // 4)).view(np.uint16)[: block.size]
        np.greater_equal(drawn, round(drop * _LEVELS), out=block)
    return kept


def rounded(drop: float) -> float:
    """`drop` to the nearest multiple of 2^-16 below 1."""
    return min(round(drop * _LEVELS), _LEVELS - 1) / _LEVELS


@jax.jit
def drop_leaf(task_vectors: jax.Array, kept: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Zeroes what is not kept, and multiplies the rest.

    Args:
      task_vectors: [T, *shape], float32.
      kept: [T, *shape], bool.
      factor: 1 / (1 - p), or 1.

    Returns:
      [T, *shape], float32.
    """
    return jnp.where(kept, factor * task_vectors, 0.0)


@dataclass(frozen=True)
class _Dropped(ExpertSet):
    """The experts with dropped and rescaled task vectors, leaf by leaf."""

    words: list[int]
    drop: float
    rescale: bool

    def task_vectors(self, name: str, part: slice | None = None) -> Array:
        whole = super().task_vectors(name, part)
        factor = 1 / (1 - self.drop) if self.rescale else 1.0
        masks = (self._mask(name, expert, part) for expert in self.names)
        if part is None:
            return drop_leaf(whole, np.stack(list(masks)).reshape(whole.shape), factor)
        for row, mask in zip(whole, masks, strict=True):
            row *= mask
        whole *= np.float32(factor)
        return whole

    def stacked(self, name: str, part: slice | None = None) -> Array:
        vectors = self.task_vectors(name, part)
        if part is None:
            return vectors + jnp.asarray(self.pretrained(name), dtype=jnp.float32)
        vectors += np.asarray(self.pretrained(name, part), np.float32)
        return vectors

    def _mask(self, name: str, expert: str, part: slice | None) -> np.ndarray:
        size = math.prod(self.leaves[name].shape)
        start, stop, step = (part or slice(None)).indices(size)
        return _draw(self.words, name, expert, stop - start, self.drop, start)[::step]

    def expert(self, name: str, task: int) -> Array:
        if not tree.is_float(self.leaves[name].dtype):
            return super().expert(name, task)
        return self.stacked(name)[task].astype(self.leaves[name].dtype)


def dropped(experts: ExpertSet, key: jax.Array, drop: float, rescale: bool = True) -> ExpertSet:
    """The same experts, with task vectors that are dropped and rescaled whenever a leaf is read.

    Args:
      experts: the experts.
      key: typed PRNG key.
      drop: p, in [0, 1), rounded to a multiple of 2^-16.
      rescale: whether what is kept is divided by 1 - p.

    Returns:
      An expert set of the same leaves and names.
    """
    options = {field.name: getattr(experts, field.name) for field in fields(ExpertSet)}
    return _Dropped(**options, words=_words(key), drop=rounded(drop), rescale=rescale)


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    drop: float = 0.5,
    rescale: bool = True,
    merge: Literal["weight_average", "task_arithmetic", "ties"] = "task_arithmetic",
    merge_options: Mapping[str, Any] | None = None,
) -> Params:
    """Drops and rescales the task vectors, then merges them.

    Args:
      experts: the experts.
      key: typed PRNG key; `jax.random.key(0)` when not given.
      drop: p, the probability that an entry is dropped, in [0, 1). 0 is the plain merger.
      rescale: whether what is kept is divided by 1 - p.
      merge: the merger under it.
      merge_options: keywords of that merger, such as `scaling` and `density`.

    Returns:
      The merged model.

    Raises:
      ValueError: if `drop` is not in [0, 1) (at 1 nothing is left), `merge` is unknown, or as the
        merger under it.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: got {drop!r}, expected a fraction in [0, 1)")
    if merge not in _MERGERS:
        suggestion = tree.did_you_mean(merge, _MERGERS)
        raise ValueError(f"merge: got {merge!r}, expected one of {sorted(_MERGERS)}{suggestion}")
    key = jax.random.key(0) if key is None else key
    remaining = dropped(experts, key, float(drop), rescale)
    return _MERGERS[merge](remaining, key=key, **(merge_options or {}))
