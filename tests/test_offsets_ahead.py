import threading
import time

import pytest

from retex_jax.offsets import ahead


def test_results_are_in_order_and_large_items_are_alone():
    running, seen, lock = [], {}, threading.Lock()

    def work(item):
        with lock:
            running.append(item)
            seen[item] = set(running)
        time.sleep(0.05 if item in (0, 5) else 0.01)  # later ones are done first
        with lock:
            seen[item] |= set(running)
            running.remove(item)
        return item * item

    items = list(range(9))
    results = ahead.in_order(work, items, lambda item: item not in (3, 4))
    assert list(results) == [(item, item * item) for item in items]
    assert seen[3] == {3}
    assert seen[4] == {4}
    assert max(map(len, seen.values())) <= 3  # two, and one that took the place of the first


@pytest.mark.parametrize("at_once", [2, 3])
def test_small_items_are_computed_at_the_same_time(at_once):
    meeting = threading.Barrier(at_once, timeout=60)
    results = ahead.in_order(lambda _: meeting.wait(), range(6), lambda _: True, at_once)
    assert len(list(results)) == 6


def test_no_more_items_are_begun_than_may_wait():
    begun = []
    for item, _ in ahead.in_order(lambda item: begun.append(item), range(6), lambda _: True):
        time.sleep(0.02)
        assert len(begun) <= item + 2


def test_an_error_is_raised_in_its_turn():
    def work(item):
        if item == 2:
            raise ValueError("item 2")
        return item

    results = ahead.in_order(work, range(5), lambda _: True)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="item 2"):
        next(results)


def test_what_is_begun_has_ended_when_the_consumer_stops():
    ended = []

    def work(item):
        time.sleep(0.05)
        ended.append(item)

    results = ahead.in_order(work, range(6), lambda _: True)
    next(results)
    results.close()
    count = len(ended)
    time.sleep(0.15)
    assert len(ended) == count <= 2
