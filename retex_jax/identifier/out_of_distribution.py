"""Inputs of no known task, told by an identifier's scores.

Two measures, larger is further outside: the entropy of the softmax of the scores (ReTeX, arXiv:2606.26902,
appendix D.1, of the router), and the residual, minus the largest score, which also tells an input that is far from
all tasks and nearest to one by far. An input is taken as outside if its measure is *above* a threshold, which is
chosen on validation inputs. Measures float32; thresholds float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.mergers import adamerging
from retex_jax.typing import Array


@partial(jax.jit, static_argnames="temperature")
def entropy(scores: Array, temperature: float = 1.0) -> jax.Array:
    """Entropy of softmax(scores / temperature), in nats.

    Args:
      scores: [B, T], float32.
      temperature: > 0; scores that are distances need one of their own size.

    Returns:
      [B], float32, from 0 to log T.

    Raises:
      ValueError: if the temperature is not a finite number above 0.
    """
    check_temperature(temperature)
    return adamerging.entropy(jnp.asarray(scores, jnp.float32) / temperature)


@jax.jit
def residual(scores: Array) -> jax.Array:
    """Minus the largest score: [B, T] to [B], float32."""
    return -jnp.max(jnp.asarray(scores, jnp.float32), axis=1)


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless a temperature is a finite number above 0."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number above 0")


def fit_temperature(scores: Array, task_ids: Array) -> float:
    """The temperature at which the softmax of scores is most right about inputs of known tasks.

    Args:
      scores: of validation inputs, [n, T].
      task_ids: theirs, integers [n].

    Returns:
      Of the root mean square of scores about their mean over tasks, times powers of sqrt(2) from 2^-6 to 2^6, the
      one of the least mean cross-entropy, the smallest of equal ones; 1 where scores do not differ.

    Raises:
      ValueError: if the scores are not finite, [n, T] with n > 0, or there is not one task for each.
    """
    values, tasks = np.asarray(scores, np.float64), np.asarray(task_ids)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores: got shape {values.shape}, expected finite scores [n, T], n > 0")
    if tasks.shape != values.shape[:1] or not ((tasks >= 0) & (tasks < values.shape[1])).all():
        raise ValueError(
            f"task_ids: got shape {tasks.shape}, expected {len(values)} of 0 to {values.shape[1]} - 1"
        )
    centered = values - values.mean(axis=1, keepdims=True)
    spread = float(np.sqrt(np.mean(centered**2)))
    if not spread:
        return 1.0
    tried = spread * 2.0 ** np.arange(-6, 6.5, 0.5)

    def loss(temperature: float) -> float:
        logits = centered / temperature
        own = np.take_along_axis(logits, tasks[:, None], axis=1)[:, 0]
        return float(np.mean(np.logaddexp.reduce(logits, axis=1) - own))

    return float(min(tried, key=loss))


def threshold(seen: Array, unseen: Array | None = None, *, target: float = 0.95) -> float:
    """The threshold above which an input is taken as outside, from measures of validation inputs.

    Args:
      seen: of inputs of known tasks, [n].
      unseen: of inputs of none, [m]. With them the threshold is Youden's: the largest true positive rate minus
        false positive rate, halfway between two neighbouring measures; of equal ones, that which takes the
        fewest inputs as outside.
      target: without `unseen`, the fraction of `seen` that must not be taken as outside; the threshold is the
        smallest of their measures that does it.

    Returns:
      The threshold.

    Raises:
      ValueError: if `seen` or `unseen` is empty, not of one axis or not finite, or `target` is not in (0, 1];
        all problems are listed.
    """
    arrays = {"seen": seen} if unseen is None else {"seen": seen, "unseen": unseen}
    values = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    problems = [
        f"{name}: got shape {array.shape}, expected [n] of finite measures, n > 0"
        for name, array in values.items()
        if array.ndim != 1 or not array.size or not np.isfinite(array).all()
    ]
    if not 0 < target <= 1:
        problems.append(f"target: got {target!r}, expected a fraction in (0, 1]")
    if problems:
        raise ValueError("\n".join(problems))
    inside = np.sort(values["seen"])
    if unseen is None:
        kept = int(np.ceil(target * len(inside) * (1 - 1e-12)))
        return float(inside[max(kept, 1) - 1])
    return _youden(inside, np.sort(values["unseen"]))


def _youden(inside: np.ndarray, outside: np.ndarray) -> float:
    cuts = np.unique(np.concatenate([inside, outside]))
    above = [
        1 - np.searchsorted(part, cuts, side="right") / len(part) for part in (inside, outside)
    ]
    gains = above[1] - above[0]
    best = int(np.flatnonzero(gains >= gains.max() - 1e-12)[-1])
    if best == len(cuts) - 1:
        return float(cuts[best])
    return float(cuts[best] + (cuts[best + 1] - cuts[best]) / 2)
