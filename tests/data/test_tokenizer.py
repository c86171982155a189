import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

from retex_jax.data.tokenizer import load_tokenizer  # noqa: E402


def tiny(pad="[PAD]"):
    vocabulary = {pad: 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "green": 5, "blue": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str().encode()


def test_pads_truncates_and_masks():
    encoded = load_tokenizer(tiny(), 5)(["red blue", "red green blue red", "mauve", ""])
    ids = [[2, 4, 6, 3, 0], [2, 4, 5, 6, 3], [2, 1, 3, 0, 0], [2, 3, 0, 0, 0]]
    assert encoded["input_ids"].tolist() == ids
    assert encoded["attention_mask"].tolist() == (np.array(ids) != 0).astype(int).tolist()
    assert encoded["input_ids"].dtype == encoded["attention_mask"].dtype == np.int32


def test_no_texts():
    assert load_tokenizer(tiny(), 5)([])["input_ids"].shape == (0, 5)


def test_bad_input():
    with pytest.raises(ValueError, match="max_length=2"):
        load_tokenizer(tiny(), 2)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(b"{}", 8)
    with pytest.raises(ValueError, match="padding"):
        load_tokenizer(tiny(pad="[NOTHING]"), 8)
