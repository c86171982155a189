"""What the causal language models share: tokens, masks, the key-value cache and the entry points.

A model (`Gpt2`, `Decoder`) gives two methods, `states` (hidden states of new tokens, after those of
a cache if there is one) and `logits` (of hidden states). `CausalLM` turns them into the four entry
points that each model has: features, the logits of whole sequences, and the two halves of scoring
with a cache.

The position of a token is the number of real tokens before it, so padding takes no position.
Numerics: logits, means and returned features in float32 whatever the dtype of the activations is;
the cache has that of the activations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax.models import layers, stacking
from retex_jax.models.features import Features


class Tokens(NamedTuple):
    """Tokens that a model is about to read.

    Attributes:
      input_ids: int [B, T].
      real: bool [B, T], False where a token is padding.
      positions: int [B, T], the position of each token in its sequence.
      mask: bool, True where a query may attend to a key. Without a cache [B, 1, 1, T], and causal
        order is added to it; after a cache of S tokens [B, 1, T, S + T], and it says everything.
    """

    input_ids: jax.Array
    real: jax.Array
    positions: jax.Array
    mask: jax.Array


class Cache(NamedTuple):
    """Keys and values of the tokens that a model has read.

    Attributes:
      keys: [num_layers, B, S, num_kv_heads, head_dim], already rotated where the model rotates.
      values: the same shape.
      real: bool [B, S], False where a token is padding.
    """

    keys: jax.Array
    values: jax.Array
    real: jax.Array


def read_batch(batch: dict[str, jax.Array], max_length: int) -> Tokens:
    """Reads the tokens of a batch of whole sequences.

    Args:
      batch: "input_ids" int [B, L] (tokens beyond the vocabulary are not noticed: XLA clamps them);
        "attention_mask" [B, L], non-zero where a token is real. Other entries are ignored.
      max_length: longest sequence.

    Returns:
      The tokens, without a cache.

    Raises:
      ValueError: if `input_ids` is not an integer array [B, L] with 1 <= L <= max_length, or the
        shape of `attention_mask` differs from it.
    """
    input_ids, real = layers.check_tokens(batch, max_length)
    return Tokens(input_ids, real, count_before(real), real[:, None, None, :])


def count_before(real: jax.Array) -> jax.Array:
    """Returns the number of real tokens before each token.

    Args:
      real: bool [..., T].

    Returns:
      int32 [..., T]; what it says of padding is of no use, but it is less than T.
    """
    return jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=-1) - 1, 0)


def last_real(x: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the entry of the last real token of each row.

    Args:
      x: [B, T, ...].
      real: bool [B, T].

    Returns:
      [B, ...]; the first entry of a row without real tokens.
    """
    index = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    past: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Attends to the tokens of a cache and to the new ones.

    Args:
      query: [B, T, num_heads, head_dim].
      key: [B, T, num_kv_heads, head_dim]; consecutive query heads share one of these.
      value: the same shape.
      mask: as in `Tokens`.
      past: keys and values of the cache, [B, S, num_kv_heads, head_dim] each, or None.

    Returns:
      [B, T, num_heads * head_dim].
    """
    if past is not None:
        key, value = (
            jnp.concatenate([old.astype(new.dtype), new], axis=1)
            for old, new in zip(past, (key, value), strict=True)
        )
    y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=past is None)
    return y.reshape(*y.shape[:2], -1)


def run_blocks(
    make: Callable[[str], nn.Module],
    step: Callable[[nn.Module, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    tokens: Tokens,
    cache: Cache | None,
    *,
    config: Any,
    depth: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Runs the first blocks of a model; to be called from a compact method.

    Args:
      make: name -> a new block of that name.
      step: (block, x, its past) -> (next x, the key and the value of the new tokens).
      x: the embedded tokens, [B, T, d].
      tokens: what `x` embeds.
      cache: of the tokens before, or None.
      config: gives num_layers and scan.
      depth: how many blocks run.

    Returns:
      The last hidden state [B, T, d], the mean over real tokens after each block [depth, B, d] in
      float32 (zero for a row without real tokens), and the keys and values of the new tokens,
      [depth, B, T, num_kv_heads, head_dim] each.
    """
    weight = layers.mean_weights(tokens.real)

    def body(block: nn.Module, x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        x, present = step(block, x, past)
        return x, (jnp.sum(x.astype(jnp.float32) * weight[:, :, None], axis=1), present)

    past = None if cache is None else (cache.keys, cache.values)
    x, (means, present) = stacking.run_blocks(
        make, body, x, past, num_layers=config.num_layers, depth=depth, scan=config.scan
    )
    return x, means, present


float32_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
"""A matrix product with float32 results, for Dense layers that give logits."""


class TokenEmbedding(nn.Embed):
    """A table [V, d] that may also be the head."""

    def attend(self, query: jax.Array) -> jax.Array:
        """Returns the products of hidden states [..., d] with all rows: float32 [..., V]."""
        embedding = self.embedding.astype(query.dtype)
        return jnp.einsum("...d,vd->...v", query, embedding, preferred_element_type=jnp.float32)


class CausalLM(nn.Module):
    """The entry points of a causal language model.

    A model that derives from it has a field `config` and gives `states(tokens, cache=None, depth=None)`,
    which returns what `run_blocks` does with the hidden state after the final norm, and
    `logits(hidden)`.
    """

    def example_batch(self) -> dict[str, jax.Array]:
        """Returns a batch of one token, for `init` and `jax.eval_shape`."""
        token = jnp.zeros((1, 1), jnp.int32)
        return {"input_ids": token, "attention_mask": token + 1}

    def __call__(self, batch: dict[str, jax.Array], num_layers: int | None = None) -> Features:
        """Computes the features of a batch of token sequences.

        Args:
          batch: as for `read_batch`, right-padded.
          num_layers: stop after this many blocks; None runs all. Parameters can only be initialised
            with None.

        Returns:
          Features: `pooled` [B, d], the hidden state of the last real token after the final norm (None
          when the pass stopped early); `layers` [number of blocks run, B, d], the mean over real tokens
          after each block. Both float32; zero for a row without real tokens.

        Raises:
          ValueError: as `read_batch`, or if `num_layers` is not in 1..config.num_layers.
        """
        depth = layers.check_num_layers(num_layers, self.config.num_layers)
        tokens = read_batch(batch, self.config.max_length)
        hidden, means, _ = self.states(tokens, depth=depth)
        if depth < self.config.num_layers:
            return Features(None, means)
        pooled = last_real(hidden, tokens.real).astype(jnp.float32)
        return Features(jnp.where(jnp.any(tokens.real, axis=1, keepdims=True), pooled, 0), means)

    def lm_logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Computes the next-token logits of whole sequences.

        Args:
          batch: as for `read_batch`, right-padded.

        Returns:
          [B, L, vocab_size], float32; of no use where a token is padding.

        Raises:
          ValueError: as `read_batch`, or if the model has no head.
        """
        tokens = read_batch(batch, self.config.max_length)
        return self.logits(self.states(tokens)[0])

    def prefill(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, Cache]:
        """Reads prompts into a cache.

        Args:
          batch: as for `read_batch`, right-padded.

        Returns:
          The logits after the last real token of each prompt, [B, vocab_size] in float32 (of no use for
          a row without real tokens), and the cache.

        Raises:
          ValueError: as `lm_logits`.
        """
        tokens = read_batch(batch, self.config.max_length)
        hidden, _, (keys, values) = self.states(tokens)
        return self.logits(last_real(hidden, tokens.real)), Cache(keys, values, tokens.real)

    def extend(self, cache: Cache, tokens: Tokens) -> jax.Array:
        """Computes the next-token logits of tokens that follow those of a cache.

        Args:
          cache: of `prefill`.
          tokens: the new tokens; their mask is [B, 1, T, S + T] and their positions are less than
            config.max_length (not checked).

        Returns:
          [B, T, vocab_size], float32.

        Raises:
          ValueError: if the shape of the mask does not fit.
        """
        batch, new = tokens.input_ids.shape
        expected = (batch, 1, new, cache.real.shape[1] + new)
        if tokens.mask.shape != expected:
            raise ValueError(f"mask: shape {tokens.mask.shape}, expected {expected}")
        return self.logits(self.states(tokens, cache)[0])
