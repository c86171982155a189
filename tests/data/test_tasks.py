import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retex_jax.data.tasks import split_indices, stratified_order, unique_indices


def joined(parts):
    return np.concatenate([parts[name] for name in ("train", "val", "test")])


def test_unique_keeps_first_and_drops_contradictions():
    texts = ["a b", "A  b ", "c", "d", "d", "e"]
    labels = np.array([0, 0, 1, 0, 1, 1])
    assert unique_indices(texts, labels).tolist() == [0, 2, 5]


def test_unique_images_and_bytes():
    images = np.zeros((4, 2, 2), np.uint8)
    images[2, 0, 1] = 1
    assert unique_indices(images, np.zeros(4)).tolist() == [0, 2]
    assert unique_indices([b"x", b"y", b"x"], np.zeros(3)).tolist() == [0, 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(0, 9))
def test_stratified_order_is_a_balanced_permutation(labels, seed):
    labels = np.array(labels)
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    half = labels[order[: len(labels) // 2]]
    for label in range(4):
        share = np.mean(labels == label)
        assert abs(np.sum(half == label) - len(half) * share) <= 1 + 4 * share


def test_splits_are_disjoint_stratified_and_sized():
    labels = np.repeat([0, 1, 2], [2000, 1000, 1000])
    parts = split_indices(labels, seed=3)
    assert len(np.unique(joined(parts))) == 4000
    assert [len(parts[k]) for k in ("test", "val", "train")] == [800, 256, 2944]
    for part in parts.values():
        assert np.abs(np.bincount(labels[part]) / len(part) - [0.5, 0.25, 0.25]).max() < 0.01


def test_small_sets_keep_500_test_examples_or_a_third():
    assert len(split_indices(np.zeros(1600, int))["test"]) == 500
    assert len(split_indices(np.zeros(300, int))["test"]) == 100


def test_limits_take_prefixes_and_leave_test_alone():
    labels = np.arange(3000) % 5
    full = split_indices(labels, seed=1)
    some = split_indices(labels, seed=1, max_train=50, max_test=30)
    assert np.array_equal(some["train"], full["train"][:50])
    assert np.array_equal(some["test"], full["test"][:30])
    assert np.array_equal(split_indices(labels, seed=1, max_val=7)["test"], full["test"])
    assert np.bincount(labels[some["train"]]).tolist() == [10] * 5
    assert not np.array_equal(split_indices(labels, seed=2)["test"], full["test"])


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 3000)
    labels = (groups + rng.integers(0, 2, 3000)) % 4
    parts = split_indices(labels, groups, max_val=None)
    owners = [set(groups[part]) for part in parts.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 60
    assert len(np.unique(joined(parts))) == 3000
    assert abs(len(parts["test"]) - 600) < 120 and abs(len(parts["val"]) - 300) < 120
    for part in parts.values():
        assert np.bincount(labels[part], minlength=4).min() > 0.1 * len(part)
    few = split_indices(np.sort(labels), np.arange(3000), max_train=40)["train"]
    assert np.abs(np.bincount(np.sort(labels)[few]) / 40 - np.bincount(labels) / 3000).max() < 0.06


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"max_train=0.*max_test=-1"):
        split_indices(np.zeros(99, int), max_train=0, max_test=-1)
    with pytest.raises(ValueError, match="groups"):
        split_indices(np.zeros(99, int), np.zeros(98, int))
    with pytest.raises(ValueError, match="empty"):
        split_indices(np.zeros(3, int))
