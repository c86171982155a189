"""Tokenising with the `tokenizers` library, from the bytes of a tokenizer.json."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

_PADS = ("[PAD]", "<pad>", "<|endoftext|>")

Text = str | tuple[str, str]
"""A text, or two that belong together."""


def load_tokenizer(data: bytes, max_length: int) -> "Encoder":
    """Makes what turns texts into token ids of one length.

    Args:
      data: the content of a tokenizer.json.
      max_length: L, the length that texts are truncated or padded to, special tokens included.

    Returns:
      The encoder.

    Raises:
      ImportError: if `tokenizers` is not installed.
      ValueError: if max_length is below 1 or leaves no room beside the special tokens, `data` is
        not a tokenizer, or it has no padding token.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text tasks need tokenizers: pip install 'retex_jax[demo]'") from error
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"data: expected the content of a tokenizer.json: {error}") from error
    _check_room(tokenizer, max_length, is_pair=False)
    given = tokenizer.padding or {}
    found = [
        p for p in (given.get("pad_token"), *_PADS) if p and tokenizer.token_to_id(p) is not None
    ]
    if not found:
        raise ValueError(f"data: the tokenizer has none of the padding tokens {_PADS}")
    return Encoder(tokenizer, found[0], max_length)


class Encoder:
    """Turns texts into token ids.

    Attributes:
      max_length: the most tokens of a text.
      pad_id: the padding token.
    """

    def __init__(self, tokenizer: Any, pad_token: str, max_length: int):
        self.max_length = max_length
        self.pad_id: int = tokenizer.token_to_id(pad_token)
        self._tokenizer = tokenizer
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length, pad_id=self.pad_id, pad_token=pad_token)

    def __call__(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        """Encodes texts or pairs of texts, with the special tokens that the tokenizer sets.

        A pair that is too long loses tokens of its longer text, one by one. Which of the two a token is of is not
        told: RoBERTa and the decoders have no token types, and BERT takes all of them as the first.

        Args:
          texts: n texts, or n pairs.

        Returns:
          "input_ids" and "attention_mask" (1 for tokens, 0 for padding), both int32 [n, max_length].

        Raises:
          ValueError: if max_length leaves no room beside the special tokens of a pair.
        """
        if any(isinstance(text, tuple) for text in texts):
            _check_room(self._tokenizer, self.max_length, is_pair=True)
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        shape = (-1, self.max_length)
        ids = np.array([e.ids for e in encodings], np.int32).reshape(shape)
        mask = np.array([e.attention_mask for e in encodings], np.int32).reshape(shape)
        return {"input_ids": ids, "attention_mask": mask}

    def prefixes(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that something follows, of any length: special tokens at the start, none at the end."""
        encodings = self._whole.encode_batch(list(texts))
        return [
            ids[: 1 + max((i for i, s in enumerate(special) if not s), default=-1)]
            for ids, special in ((e.ids, e.special_tokens_mask) for e in encodings)
        ]

    def continuations(self, texts: Sequence[str], after: str) -> list[list[int]]:
        """Token ids of texts that follow others, of any length, without special tokens.

        Some tokenizers begin every text with a blank; so the texts are encoded behind the end of what they follow.

        Args:
          texts: n texts.
          after: the last characters of what they follow.

        Raises:
          ValueError: if a token of a text reaches into `after`.
        """
        given = [after, *(after + text for text in texts)]
        first, *rest = self._whole.encode_batch(given, add_special_tokens=False)
        count = len(first.ids)
        if joined := [e for e in rest if e.ids[:count] != first.ids]:
            raise ValueError(f"texts: a token of {joined[0].tokens} reaches into {after!r}")
        return [encoding.ids[count:] for encoding in rest]

    @cached_property
    def _whole(self) -> Any:
        """The tokenizer without truncation and padding: one of its own, as threads may share the other."""
        whole = type(self._tokenizer).from_str(self._tokenizer.to_str())
        whole.no_truncation()
        whole.no_padding()
        return whole


def _check_room(tokenizer: Any, max_length: int, *, is_pair: bool) -> None:
    special = tokenizer.num_special_tokens_to_add(is_pair)
    if max_length <= special:
        raise ValueError(f"max_length={max_length}: expected > {special}, the special tokens")
