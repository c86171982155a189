"""T-Switch (arXiv:2412.00054): task vectors as a mask, a sign and a scale for each tensor.

In each tensor of each task vector the smallest fraction of the positive entries is dropped, and of the
negative entries separately. What is left becomes its sign times one number, the root mean square of the
kept entries (||kept||_2 / sqrt(count), which keeps the norm). Expert t is theta_0 plus that. Needs no data.

Exactly, and as the authors' code does it:
- Of n positive entries floor(n (1 - drop)) are kept, with everything that ties with the smallest kept
  one; if that is none, all n are kept. Zeros are of neither sign. The floor is of the exact decimal
  fraction; the code multiplies floats, where 5 * (1 - 0.8) falls short of 1 and all five are kept.
- A leaf of one axis is treated like any other. One of no axes has one entry, which is kept, and is its own
  root mean square: exact, as in the code, which leaves such leaves alone.
- A tensor without a nonzero entry has scale 0.
- `variant`: the paper has one scalar and the code one a tensor ("code", the default); the DTS paper's
  account of T-Switch has one for the positive and one for the negative entries ("paper").
- drop is 0.6 for ViTs and 0.7 for RoBERTa.

Stored: two bits an entry and task, in two planes, and the scales; the papers' accounting is 2/32 of a 32-bit
model. (The code compresses further by marking empty groups of entries; that is not counted anywhere.)
Auto-Switch mixes by weights that come from an identifier: see `mix`. On difference vectors (DTS, appendix:
tables 15 to 18) make the expert set with a merged model in place of the pretrained one.

Thresholds come from np.partition on the host and the root mean square is float64; the rest is float32.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.personalized import changes, masks
from retex_jax.typing import FlatParams, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TSwitchState:
    """The pretrained model, and what is stored beside it.

    Attributes:
      pretrained: nested dict, theta_0.
      masks: which entries are kept, by float leaf: [T, ceil(size / 8)], uint8.
      signs: which entries are positive, by float leaf: [T, ceil(size / 8)], uint8.
      scales: by float leaf: [T, 1], or [T, 2] for positive and negative entries; float32.
    """

    pretrained: Params
    masks: FlatParams
    signs: FlatParams
    scales: FlatParams

    @property
    def num_tasks(self) -> int:
        """T."""
        return next(iter(self.masks.values())).shape[0]


def keep_largest(values: np.ndarray, kept_fraction: Fraction) -> np.ndarray:
    """Which positive values are among the largest; ties are kept, and all if the count is 0.

    Args:
      values: [n], float32.
      kept_fraction: of the positive values.

    Returns:
      [n], bool.
    """
    positive = values[values > 0]
    if not positive.size:
        return np.zeros(values.shape, bool)
    keep = math.floor(positive.size * kept_fraction) or positive.size
    return values >= np.partition(positive, positive.size - keep)[positive.size - keep]


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(np.square(values, dtype=np.float64).mean()) if values.size else 0.0


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    drop: float = 0.6,
    variant: Literal["code", "paper"] = "code",
) -> TSwitchState:
    """Sparsifies and binarises the task vectors.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      drop: fraction of the positive and of the negative entries of a tensor that is dropped, in [0, 1).
      variant: "code" has one scale a tensor, "paper" one for each sign.

    Returns:
      The state.

    Raises:
      ValueError: if `drop` is not in [0, 1) or `variant` is unknown.
    """
    del key
    if not 0 <= drop < 1:
        raise ValueError(f"drop: got {drop!r}, expected a fraction in [0, 1)")
    if variant not in ("code", "paper"):
        raise ValueError(f"variant: got {variant!r}, expected 'code' or 'paper'")
    kept_fraction = 1 - Fraction(str(drop))
    packed, signs, scales = {}, {}, {}
    for name in experts.float_leaves:
        vectors = np.asarray(experts.task_vectors(name)).reshape(experts.num_tasks, -1)
        kept = np.zeros(vectors.shape, bool)
        scale = []
        for task, vector in enumerate(vectors):
            positive = keep_largest(vector, kept_fraction)
            negative = keep_largest(-vector, kept_fraction)
            kept[task] = positive | negative
            groups = [kept[task]] if variant == "code" else [positive, negative]
            scale.append([_root_mean_square(vector[group]) for group in groups])
        packed[name] = masks.pack(jnp.asarray(kept))
        signs[name] = masks.pack(jnp.asarray(kept & (vectors > 0)))
        scales[name] = jnp.asarray(scale, jnp.float32)
    return TSwitchState(changes.stored_pretrained(experts), packed, signs, scales)


@partial(jax.jit, static_argnames="shape")
def _change(
    packed: jax.Array,
    signs: jax.Array,
    scales: jax.Array,
    task: int | jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    kept = masks.unpack(packed[task], shape)
    positive = masks.unpack(signs[task], shape)
    scale = scales[task]
    return jnp.where(kept, jnp.where(positive, scale[0], -scale[-1]), 0.0)


@partial(jax.jit, static_argnames="shape")
def _mixed_change(
    packed: jax.Array,
    signs: jax.Array,
    scales: jax.Array,
    weights: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    def add(task: jax.Array, total: jax.Array) -> jax.Array:
        return total + weights[task] * _change(packed, signs, scales, task, shape)

    return jax.lax.fori_loop(0, len(weights), add, jnp.zeros(shape, jnp.float32))


def recover(state: TSwitchState, task: int | jax.Array) -> Params:
    """theta_0 plus the task's binarised vector.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `task` is out of range.
    """
    changes.check_task(task, state.num_tasks)

    def change(name: str, shape: tuple[int, ...]) -> jax.Array:
        planes = (state.masks[name], state.signs[name], state.scales[name])
        return _change(*planes, task, shape)

    return changes.add_changes(state.pretrained, change)


def mix(state: TSwitchState, weights: jax.Array) -> Params:
    """theta_0 plus the weighted sum of the binarised vectors (Auto-Switch).

    The authors' ViT code takes the mean over a batch of k-nearest-neighbour probabilities as weights, its
    RoBERTa code their argmax. Both batches hold one data set only, which gives the task away.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `weights` is not [T].
    """
    weights = changes.check_weights(weights, state.num_tasks)

    def change(name: str, shape: tuple[int, ...]) -> jax.Array:
        planes = (state.masks[name], state.signs[name], state.scales[name])
        return _mixed_change(*planes, weights, shape)

    return changes.add_changes(state.pretrained, change)


def extra_bytes(state: TSwitchState) -> int:
    """Bytes beside the pretrained model, for all tasks: two planes of bits, and the scales."""
    return tree.param_bytes((state.masks, state.signs, state.scales))


def paper_amr(state: TSwitchState) -> float:
    """The papers' additional memory a task, of a 32-bit model: 2/32, whatever T is."""
    del state
    return 2 / 32
