from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retex_jax.data.batching import (
    batch_indices,
    bucketed_indices,
    by_length,
    mixed_batches,
    padded_batches,
    take,
    trim,
)
from retex_jax.data.tasks import Task


def make(name, num, offset, width=2):
    ids = offset + np.arange(num, dtype=np.int32)
    arrays = {"input_ids": np.repeat(ids[:, None], width, 1), "label": ids}
    return Task(name, ("a",), {"test": arrays}, "", "")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
def test_each_epoch_holds_each_example_once(num, batch_size, seed):
    steps = -(-3 * num // batch_size)
    stream = np.concatenate([batch_indices(num, batch_size, s, seed) for s in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * num : (epoch + 1) * num]) == list(range(num))


def test_batches_depend_on_seed_and_step_alone():
    first = [batch_indices(50, 8, s, 4) for s in range(20)]
    again = [batch_indices(50, 8, s, 4) for s in reversed(range(20))][::-1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], batch_indices(50, 8, 0, 5))
    epochs = np.concatenate(first)[:100].reshape(2, 50)
    assert not np.array_equal(*epochs)
    assert first[0].dtype == np.int64 and first[0].shape == (8,)


def test_batch_indices_lists_bad_arguments():
    with pytest.raises(ValueError, match=r"num_examples=0.*step=-1"):
        batch_indices(0, 4, -1, 0)


def test_take_makes_contiguous_copies_of_views():
    grey = np.broadcast_to(np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), (3, 2, 2, 3))
    image = take({"image": grey}, np.array([2, 0]))["image"]
    assert image.flags.c_contiguous and image.flags.writeable
    assert image[0, 1, 1].tolist() == [11, 11, 11] and image[1, 0, 1].tolist() == [1, 1, 1]


def test_padded_batches_keep_order_and_shape():
    split = make("t", 10, 0).splits["test"]
    batches = list(padded_batches(split, 4))
    assert [valid.tolist() for _, valid in batches[:2]] == [[True] * 4] * 2
    assert batches[2][1].tolist() == [True, True, False, False]
    assert all(batch["input_ids"].shape == (4, 2) for batch, _ in batches)
    assert np.concatenate([b["label"][v] for b, v in batches]).tolist() == list(range(10))
    assert batches[2][0]["label"].tolist() == [8, 9, 8, 8]


def test_padded_batches_refuses_bad_input():
    with pytest.raises(ValueError, match="batch_size=0"):
        next(padded_batches({"label": np.zeros(3)}, 0))
    with pytest.raises(ValueError, match="one length"):
        next(padded_batches({"label": np.zeros(3), "image": np.zeros(2)}, 2))


def test_mixed_batches_cover_all_tasks_once_and_mix_them():
    tasks = [make("a", 37, 1000), make("b", 11, 2000), make("c", 25, 3000)]
    batches = list(mixed_batches(tasks, "test", 16, seed=0))
    assert len(batches) == 5
    seen = []
    for batch, valid in batches:
        assert batch["input_ids"].shape == (16, 2) and batch["task"].dtype == np.int32
        assert valid.shape == (16,)
        assert np.array_equal(batch["label"] // 1000 - 1, batch["task"])
        assert np.array_equal(batch["input_ids"][:, 1], batch["label"])
        seen += batch["label"][valid].tolist()
    expected = np.concatenate([task.splits["test"]["label"] for task in tasks])
    assert sorted(seen) == sorted(expected.tolist())
    assert all(len(set(batch["task"].tolist())) > 1 for batch, _ in batches[:4])
    again = list(mixed_batches(tasks, "test", 16, seed=0))
    other = list(mixed_batches(tasks, "test", 16, seed=1))
    assert np.array_equal(batches[0][0]["label"], again[0][0]["label"])
    assert not np.array_equal(batches[0][0]["label"], other[0][0]["label"])


def test_mixed_batches_lists_misfits():
    tasks = [make("a", 3, 0), make("b", 3, 0, width=3), make("c", 3, 0, width=4)]
    with pytest.raises(ValueError, match=r"b:.*c:"):
        next(mixed_batches(tasks, "test", 2, 0))
    with pytest.raises(ValueError, match="at least one"):
        next(mixed_batches([], "test", 2, 0))


def test_trim_cuts_the_padding_that_all_texts_share():
    mask = np.zeros((3, 64), np.int32)
    for row, length in enumerate((5, 17, 9)):
        mask[row, :length] = 1
    batch = {
        "input_ids": np.arange(192).reshape(3, 64),
        "attention_mask": mask,
        "label": np.ones(3),
    }
    found = trim(batch)
    assert found["input_ids"].shape == found["attention_mask"].shape == (3, 32)  # 17 rounded up
    np.testing.assert_array_equal(found["input_ids"], batch["input_ids"][:, :32])
    np.testing.assert_array_equal(found["label"], batch["label"])
    assert trim(batch, multiple=64)["input_ids"].shape == (3, 64)
    assert trim({**batch, "attention_mask": np.ones_like(mask)})["input_ids"].shape == (3, 64)


def test_trim_keeps_every_token_wherever_the_padding_is():
    mask = np.zeros((2, 64), np.int32)
    mask[0, 20:40] = 1  # padded on both sides
    mask[1, [3, 30]] = 1  # with holes
    found = trim({"attention_mask": mask})["attention_mask"]
    np.testing.assert_array_equal(found, mask[:, :48])
    assert trim({"attention_mask": mask[:, ::-1]})["attention_mask"].shape == (2, 64)
    assert trim({"attention_mask": 0 * mask})["attention_mask"].shape == (2, 16)


def test_trim_leaves_images_alone():
    batch = {"image": np.zeros((2, 4, 4, 3), np.uint8), "label": np.zeros(2)}
    assert trim(batch).keys() == batch.keys()
    assert trim(batch)["image"] is batch["image"]


def test_by_length_puts_short_texts_first_and_leaves_images_alone():
    mask = np.arange(6) < np.array([[4], [1], [4], [2]])
    assert by_length({"attention_mask": mask, "input_ids": mask}).tolist() == [1, 3, 0, 2]
    assert by_length({"image": np.zeros((3, 2, 2, 3))}).tolist() == [0, 1, 2]


def texts(num, seed=0):
    """A split of texts of random lengths."""
    lengths = np.random.default_rng(seed).integers(1, 100, num)
    return {"attention_mask": (np.arange(100) < lengths[:, None]).astype(np.int32)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_buckets_hold_what_is_drawn_together(num, batch_size, bucket, seed):
    for drawn in range(3):
        steps = range(drawn * bucket, (drawn + 1) * bucket)
        found = [bucketed_indices(texts(num), batch_size, s, seed, bucket) for s in steps]
        want = batch_indices(num, batch_size * bucket, drawn, seed)
        assert sorted(np.concatenate(found)) == sorted(want)
        assert {len(indices) for indices in found} == {batch_size}


def test_buckets_are_of_like_lengths_in_random_order():
    split = texts(640)
    lengths = split["attention_mask"].sum(axis=1)
    batches = [lengths[bucketed_indices(split, 16, step, 3, 20)] for step in range(40)]
    for first in (0, 20):
        ordered = sorted(batches[first : first + 20], key=lambda batch: (batch.min(), batch.max()))
        assert all(a.max() <= b.min() for a, b in pairwise(ordered))
        assert not all(a is b for a, b in zip(ordered, batches[first : first + 20], strict=True))
    random = [lengths[batch_indices(640, 16, step, 3)].max() for step in range(40)]
    assert np.mean([batch.max() for batch in batches]) < 0.7 * np.mean(random)


def test_no_buckets_are_batch_indices():
    images = {"image": np.zeros((50, 2))}
    for split, bucket in ((texts(50), 1), (images, 4)):
        found = bucketed_indices(split, 8, 5, 7, bucket)
        assert np.array_equal(found, batch_indices(50, 8, 5, 7))
    with pytest.raises(ValueError, match=r"bucket=0 \(expected >= 1\)"):
        bucketed_indices(images, 8, 5, 7, 0)
