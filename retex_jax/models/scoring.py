"""Multiple-choice answers by log-likelihood, the way language models are commonly evaluated.

Each prompt runs once, into a cache; the answers of a question then run side by side after it. An
answer attends to the prompt and to itself alone, so the cache is not repeated for each of them.

Numerics: log-probabilities in float32 from float32 logits.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import causal
from retex_jax.typing import Params


class ChoiceScores(NamedTuple):
    """How likely each answer is.

    Attributes:
      log_likelihood: [B, C], float32: the sum of the log-probabilities of the answer's tokens, in
        nats. -inf for an answer without tokens, such as the padding of a question with fewer; NaN
        for a question whose prompt has none.
      num_tokens: [B, C], int32: `log_likelihood / num_tokens` is the mean.
    """

    log_likelihood: jax.Array
    num_tokens: jax.Array


def score_choices(model: nn.Module, params: Params, batch: dict[str, jax.Array]) -> ChoiceScores:
    """Scores every answer to every question. Pure; `model` is static under `jax.jit`.

    Args:
      model: a `Gpt2` or `Decoder`.
      params: its parameters.
      batch: "input_ids" and "attention_mask" [B, L], the prompts; "choice_ids" int [B, C, T] and
        "choice_mask" [B, C, T], the answers. Both are right-padded: masks are non-zero where a token
        is real, and no real token follows a padded one (not checked). Other entries are ignored.

    Returns:
      The scores. Padding, other questions and other answers do not change them, but for rounding.

    Raises:
      ValueError: if the shapes of the answers do not fit, `choice_ids` is not integer, L + T - 1 is
        more than config.max_length, as `causal.read_batch`, or if the model has no head.
    """
    ids = jnp.asarray(batch["choice_ids"])
    real = jnp.asarray(batch["choice_mask"]) != 0
    variables = {"params": params}
    after_prompt, cache = model.apply(variables, batch, method="prefill")
    _check_choices(ids, real, cache.real.shape, model.config.max_length)
    log_probs = _log_probs(after_prompt, ids[:, :, 0])[:, :, None]
    if ids.shape[2] > 1:
        # The last token of an answer predicts nothing that is asked for, so it does not run.
        tokens = _side_by_side(ids[:, :, :-1], real[:, :, :-1], cache.real)
        logits = model.apply(variables, cache, tokens, method="extend")
        rest = ids[:, :, 1:]
        rest = _log_probs(logits, rest.reshape(*tokens.input_ids.shape, 1)).reshape(rest.shape)
        log_probs = jnp.concatenate([log_probs, rest], axis=2)
    total = jnp.sum(jnp.where(real, log_probs, 0), axis=2)
    num_tokens = jnp.sum(real, axis=2, dtype=jnp.int32)
    total = jnp.where(num_tokens > 0, total, -jnp.inf)
    return ChoiceScores(
        jnp.where(jnp.any(cache.real, axis=1, keepdims=True), total, jnp.nan), num_tokens
    )


def _side_by_side(ids, real, prompt):
    """Lays the answers [B, C, T] of each question out as one row of C * T tokens after its prompt."""
    batch, choices, length = ids.shape
    total = choices * length
    positions = jnp.sum(prompt, axis=1)[:, None, None] + causal.count_before(real)
    choice, place = jnp.divmod(jnp.arange(total), length)
    own = (choice[:, None] == choice) & (place[:, None] >= place)
    flat = real.reshape(batch, total)
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(prompt[:, None, :], (batch, total, prompt.shape[1])),
            own & flat[:, None, :],
        ],
        axis=2,
    )
    return causal.Tokens(
        ids.reshape(batch, total), flat, positions.reshape(batch, total), mask[:, None]
    )


def _log_probs(logits, ids):
    """Log-probabilities [..., N] of the tokens ids [..., N] by logits [..., V]."""
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _check_choices(ids, real, prompt, max_length):
    problems = []
    if ids.ndim != 3 or not ids.shape[1] or not ids.shape[2] or ids.shape[:1] != prompt[:1]:
        problems.append(
            f"choice_ids: shape {ids.shape}, expected [B, C, T] with B = {prompt[0]}, C, T >= 1"
        )
    elif prompt[1] + ids.shape[2] - 1 > max_length:
        problems.append(
            f"input_ids and choice_ids: {prompt[1]} + {ids.shape[2]} tokens, "
            f"expected at most {max_length} + 1"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        problems.append(f"choice_ids: dtype {ids.dtype}, expected an integer dtype")
    if real.shape != ids.shape:
        problems.append(f"choice_mask: shape {real.shape}, expected that of choice_ids {ids.shape}")
    if problems:
        raise ValueError("; ".join(problems))
