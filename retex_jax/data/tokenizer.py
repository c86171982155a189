"""Tokenising with the `tokenizers` library, from the bytes of a tokenizer.json."""

from collections.abc import Callable, Sequence

import numpy as np

_PADS = ("[PAD]", "<pad>", "<|endoftext|>")


def load_tokenizer(
    data: bytes, max_length: int
) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """Makes a function that turns texts into token ids of one length.

    Args:
      data: the content of a tokenizer.json.
      max_length: L, the length that texts are truncated or padded to, special tokens included.

    Returns:
      A function of n texts that returns "input_ids" and "attention_mask" (1 for tokens, 0 for
      padding), both int32 [n, L].

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
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_length <= special:
        raise ValueError(f"max_length={max_length}: expected > {special}, the special tokens")
    given = tokenizer.padding or {}
    found = [
        p for p in (given.get("pad_token"), *_PADS) if p and tokenizer.token_to_id(p) is not None
    ]
    if not found:
        raise ValueError(f"data: the tokenizer has none of the padding tokens {_PADS}")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(
        length=max_length, pad_id=tokenizer.token_to_id(found[0]), pad_token=found[0]
    )

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        encodings = tokenizer.encode_batch_fast(list(texts))
        ids = np.array([e.ids for e in encodings], np.int32).reshape(-1, max_length)
        mask = np.array([e.attention_mask for e in encodings], np.int32).reshape(-1, max_length)
        return {"input_ids": ids, "attention_mask": mask}

    return encode
