"""Questions with answers to choose from, and what else a task's outputs are made of."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from retex_jax import data, models, sharding
from retex_jax.typing import Batch, Params

CHOICES = ("choice_ids", "choice_mask")
"""The arrays that questions have besides what a model reads; see `models.score_choices`."""

_PROMPT = ("input_ids", "attention_mask")
_STEP = 8  # answers are cut to a multiple of so many tokens, so that few shapes occur
_NO_ANSWER = -1e9


def has_choices(examples: Mapping[str, np.ndarray]) -> bool:
    """Whether examples are questions, which need no head."""
    return CHOICES[0] in examples


def choice_logits(model: Any, params: Params, batch: Batch) -> jax.Array:
    """Scores the answers to questions: the log-likelihood of each. Pure; `model` is static under `jax.jit`.

    Args:
      model: a causal language model with its head.
      params: its parameters.
      batch: as for `models.score_choices`.

    Returns:
      [B, C], float32; -1e9 where there is no answer, so that its softmax is 0 and has a gradient of 0.
    """
    scores = models.score_choices(model, params, batch).log_likelihood
    return jax.numpy.maximum(scores, _NO_ANSWER)


_choice_logits = jax.jit(choice_logits, static_argnums=0)


def run_choices(
    model: Any, params: Params, examples: Mapping[str, np.ndarray], batch_size: int
) -> np.ndarray:
    """`choice_logits` of examples in batches of few shapes, prompts of like length side by side.

    On a mesh as `recovery.run`.

    Args:
      model: a causal language model with its head.
      params: its parameters.
      examples: arrays [n, ...].
      batch_size: B.

    Returns:
      [n, C], float32, in the order of the examples.
    """
    inputs = {name: examples[name] for name in (*_PROMPT, *CHOICES)}
    order = data.by_length(inputs)
    outputs = []
    mesh = sharding.mesh_of(params)
    for batch, valid in data.padded_batches(data.take(inputs, order), batch_size):
        prompts = data.trim({name: batch[name] for name in _PROMPT})
        longest = int(batch["choice_mask"].sum(axis=2).max())
        length = -(-max(longest, 1) // _STEP) * _STEP
        choices = {name: batch[name][:, :, :length] for name in CHOICES}
        placed = sharding.place({**prompts, **choices}, mesh, sharding.BATCH_RULES)
        outputs.append(np.asarray(_choice_logits(model, params, placed))[valid])
    return np.concatenate(outputs)[np.argsort(order)]


def run_choices_grouped(
    model: Any,
    recover: Callable[[int], Params],
    examples: Mapping[str, np.ndarray],
    task_ids: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """`run_choices` of each example with the expert of its task id, one recovery a task that occurs.

    Args:
      model: a causal language model with its head.
      recover: task id -> parameters.
      examples: arrays [n, ...].
      task_ids: [n], integers.
      batch_size: B.

    Returns:
      [n, C], float32, in the order of the examples.
    """
    outputs = np.empty(examples[CHOICES[0]].shape[:2], np.float32)
    for task in np.unique(task_ids):
        rows = np.flatnonzero(task_ids == task)
        run = partial(run_choices, model, recover(int(task)), batch_size=batch_size)
        outputs[rows] = run(data.take(examples, rows))
    return outputs
