"""Any identifier on several layers at once: one state a layer and the mean of their scores, or one state of all.

A joint state reads the layers' features one after the other as one vector: it knows how layers vary together, and
takes more bytes where it holds a covariance.

Otherwise scores of different layers have different units. Only differences between tasks decide, so that a layer's
scores are divided by their spread: the root mean square, over calibration inputs, of an input's scores about their
mean over tasks; each task counts the same. An identifier of the experts' features is not calibrated on other tasks'
inputs; its scores are added as they are, squared distances in units of each Gaussian's own spread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layered:
    """One state a layer.

    Attributes:
      states: L states of one identifier.
      spreads: of their scores, [L], float32, > 0.
    """

    states: tuple[Any, ...]
    spreads: jax.Array

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.states[0].num_tasks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joint:
    """One state of the features of L layers, one after the other.

    Attributes:
      state: of an identifier of L d features.
      num_layers: L.
    """

    state: Any
    num_layers: int = field(metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.state.num_tasks


def has_layers(features_per_task: Sequence[Array]) -> bool:
    """Whether features are [n_t, L, d] rather than [n_t, d].

    Raises:
      ValueError: if they are [n_t, L, d] for some tasks only, or L is 0 or not the same for all.
    """
    shapes = [np.shape(task) for task in features_per_task]
    if not any(len(shape) == 3 for shape in shapes):
        return False
    if any(len(shape) != 3 or not shape[1] for shape in shapes) or len({s[1] for s in shapes}) > 1:
        raise ValueError(f"features_per_task: got shapes {shapes}, expected [n, L, d] with one L")
    return True


def fit(
    fit_one: Callable[[Sequence[np.ndarray], int], Any],
    scores: Callable[[Any, Array], jax.Array],
    features_per_task: Sequence[Array],
    *,
    standardize: bool = True,
) -> Layered:
    """Fits one state a layer, and the spread of its scores.

    Args:
      fit_one: (features of one layer, T arrays [n_t, d]; place of the layer) -> state.
      scores: (state, [B, d]) -> [B, T].
      features_per_task: T arrays [n_t, L, d].
      standardize: whether to divide scores by their spread.

    Returns:
      The states. A layer whose scores do not differ between tasks has spread 1.
    """
    arrays = [np.asarray(task) for task in features_per_task]
    states, spreads = [], []
    for layer in range(arrays[0].shape[1]):
        features = [array[:, layer] for array in arrays]
        states.append(fit_one(features, layer))
        spreads.append(spread_of(scores, states[-1], features) if standardize else 1.0)
    return Layered(tuple(states), jnp.asarray(spreads, jnp.float32))


def spread_of(
    scores: Callable[[Any, Array], jax.Array], state: Any, features: Sequence[np.ndarray]
) -> float:
    """The spread of a state's scores of calibration features, T arrays [n_t, d]; 1 where they do not differ."""
    squares = []
    for own in features:
        found = np.asarray(scores(state, own), np.float64)
        squares.append(np.mean((found - found.mean(axis=1, keepdims=True)) ** 2))
    return float(np.sqrt(np.mean(squares))) or 1.0


def combine(
    scores: Callable[[Any, Array], jax.Array], state: Layered, features: Array
) -> jax.Array:
    """Mean over layers of scores in units of their spread.

    Args:
      scores: (state, [..., B, d]) -> [B, T].
      state: from `fit`.
      features: [..., B, L, d], float32.

    Returns:
      [B, T], float32; larger is likelier.

    Raises:
      ValueError: if the features have another number of layers than the state.
    """
    features, size = jnp.asarray(features), len(state.states)
    if features.ndim < 3 or features.shape[-2] != size:
        raise ValueError(f"features: got shape {features.shape}, expected [B, {size}, d]")
    each = [scores(one, features[..., layer, :]) for layer, one in enumerate(state.states)]
    return mean_scores(jnp.stack(each), state.spreads)


def mean_scores(each: Array, spreads: Array) -> jax.Array:
    """Mean over layers of scores [L, B, T] in units of their spreads [L]: [B, T]."""
    return jnp.mean(jnp.asarray(each) / jnp.asarray(spreads)[:, None, None], axis=0)


def flattened(features: Array, num_layers: int) -> Array:
    """Features of several layers as one vector.

    Args:
      features: [..., L, d].
      num_layers: L.

    Returns:
      [..., L d].

    Raises:
      ValueError: if the features have another number of layers.
    """
    shape = np.shape(features)
    if len(shape) < 3 or shape[-2] != num_layers:
        raise ValueError(f"features: got shape {shape}, expected [n, {num_layers}, d]")
    return features.reshape(*shape[:-2], num_layers * shape[-1])
