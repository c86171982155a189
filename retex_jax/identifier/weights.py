"""Weights over seen tasks for inputs of an unseen one: of embeddings, and so of offsets.

ReTeX version 2 (arXiv:2606.26902v2) interpolates seen experts for unseen tasks. What is interpolated is
linear in the weights: `offsets.mix(state, w)` has the embedding sum_t w_t e_t and so the offset
sum_t w_t (theta_t - theta_merge). Weights are an input's own, [B, T], from an identifier's scores; `of_task` makes
one set for a task of its unlabelled inputs. DTS (section 3.3) takes the similarity of class names instead, and no
input. Float32.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.identifier.out_of_distribution import check_temperature
from retex_jax.personalized import unseen as dts
from retex_jax.typing import Array


@jax.jit
def hard(scores: Array) -> jax.Array:
    """All weight on the task of the largest score, the first of equal ones: [B, T] to [B, T]."""
    scores = jnp.asarray(scores)
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=jnp.float32)


@partial(jax.jit, static_argnames="temperature")
def soft(scores: Array, temperature: float = 1.0) -> jax.Array:
    """softmax(scores / temperature).

    Args:
      scores: [B, T], float32.
      temperature: > 0; towards 0 the weights are `hard`, towards infinity `uniform`.

    Returns:
      [B, T], float32, rows of sum 1.

    Raises:
      ValueError: if the temperature is not a finite number above 0.
    """
    check_temperature(temperature)
    return jax.nn.softmax(jnp.asarray(scores, jnp.float32) / temperature, axis=-1)


@jax.jit
def uniform(scores: Array) -> jax.Array:
    """The same weight for every task, 1 / T: [B, T] to [B, T]."""
    return jnp.full(jnp.shape(scores), 1 / jnp.shape(scores)[-1], jnp.float32)


@jax.jit
def of_task(weights: Array) -> jax.Array:
    """One set of weights for all inputs of a task, their mean: [B, T] to [T], float32."""
    return jnp.mean(jnp.asarray(weights, jnp.float32), axis=0)


def similarity(unseen: Array, seen: Sequence[Array]) -> np.ndarray:
    """Weights of seen tasks by the texts of their classes (DTS, section 3.3, Eq. 8).

    A task's embedding is the mean of its class names'; the weights are cosines over their sum. The paper does not
    mention negative ones; they are taken as 0.

    Args:
      unseen: text embeddings of the unseen task's class names (or one of its description), [c, d].
      seen: of the seen tasks', T arrays [c_t, d].

    Returns:
      [T], float32, of sum 1.

    Raises:
      ValueError: if an array is not [c, d] with c > 0 and one d, a mean is 0 or not finite, or no cosine is positive.
    """
    arrays = [np.asarray(texts, np.float64) for texts in (unseen, *seen)]
    problems = [
        f"{'unseen' if not place else f'seen[{place - 1}]'}: got shape {array.shape}, "
        "expected [c, d] with one d"
        for place, array in enumerate(arrays)
        if array.ndim != 2 or not array.size or array.shape[1:] != arrays[0].shape[1:]
    ]
    if not seen:
        problems.append("seen: got no task")
    if problems:
        raise ValueError("\n".join(problems))
    own, *others = (texts.mean(axis=0) for texts in arrays)
    return dts.similarity_weights(own, np.stack(others))
