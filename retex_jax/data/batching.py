"""Batches as pure functions of (seed, step), and passes over whole splits in constant shapes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from retex_jax.data.images import Images, ahead, materialize
from retex_jax.data.tasks import Task

T = TypeVar("T")
Split = Mapping[str, np.ndarray]


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Returns the examples of one training step, independent of all other steps.

    The steps read on through an endless row of permutations, one an epoch, each drawn from (seed,
    epoch). So each epoch holds every example exactly once, batches may reach over the end of an
    epoch, and a run resumed at `step` sees what an uninterrupted one would.

    Args:
      num_examples: n.
      batch_size: B; may exceed n.
      step: the step's number, from 0.
      seed: of the permutations.

    Returns:
      Indices into range(n), int64 [B].

    Raises:
      ValueError: if num_examples or batch_size is below 1, or step or seed below 0.
    """
    given = {"num_examples": num_examples, "batch_size": batch_size, "step": step, "seed": seed}
    least = {"num_examples": 1, "batch_size": 1, "step": 0, "seed": 0}
    wrong = [f"{k}={v} (expected >= {least[k]})" for k, v in given.items() if v < least[k]]
    if wrong:
        raise ValueError(", ".join(wrong))
    position = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch = position // num_examples
    indices = np.empty(batch_size, np.int64)
    for e in np.unique(epoch):
        order = np.random.default_rng([seed, int(e)]).permutation(num_examples)
        here = epoch == e
        indices[here] = order[position[here] % num_examples]
    return indices


def bucketed_indices(
    split: Split, batch_size: int, step: int, seed: int, bucket: int
) -> np.ndarray:
    """As `batch_indices`, texts of like length in one batch, so that `trim` cuts more.

    The examples of `bucket` batches are drawn together, put in order of length, cut into batches, and these are taken
    in random order.

    Args:
      split: arrays [n, ...]; texts carry "attention_mask" [n, L].
      batch_size: B; may exceed n.
      step: the step's number, from 0.
      seed: of the permutations.
      bucket: batches that are drawn together; 1 is `batch_indices`.

    Returns:
      Indices into range(n), int64 [B].

    Raises:
      ValueError: as `batch_indices`, or if bucket is below 1.
    """
    if bucket < 1:
        raise ValueError(f"bucket={bucket} (expected >= 1)")
    count = len(next(iter(split.values())))
    if bucket == 1 or "attention_mask" not in split:
        return batch_indices(count, batch_size, step, seed)
    drawn, place = divmod(step, bucket)
    members = batch_indices(count, batch_size * bucket, drawn, seed)
    batches = members[by_length({"attention_mask": split["attention_mask"][members]})]
    order = np.random.default_rng([seed, drawn, bucket]).permutation(bucket)
    return batches.reshape(bucket, batch_size)[order[place]]


def take(split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Gathers examples: arrays [n, ...] at `indices` [B] become new contiguous arrays [B, ...].

    `Images` stay such, not decoded: see `materialize`.
    """
    return {
        name: array[indices] if isinstance(array, Images) else np.ascontiguousarray(array[indices])
        for name, array in split.items()
    }


def trim(batch: Split, multiple: int = 16) -> dict[str, np.ndarray]:
    """Cuts the padding that all texts of a batch end with; other batches stay as they are.

    Args:
      batch: with "attention_mask" [B, L] if it holds texts; only columns after the last token of all are cut.
      multiple: lengths are rounded up to it, so that few shapes occur; at most L.

    Returns:
      The batch, its arrays [B, L, ...] cut to [B, l, ...].
    """
    if "attention_mask" not in batch:
        return dict(batch)
    full = batch["attention_mask"].shape[1]
    used = np.flatnonzero(batch["attention_mask"].any(axis=0))
    longest = 1 + int(used.max(initial=0))
    length = min(full, -(-longest // multiple) * multiple)
    return {
        name: array[:, :length] if array.shape[1:2] == (full,) else array
        for name, array in batch.items()
    }


def by_length(split: Split) -> np.ndarray:
    """The order that puts texts of like length side by side, so that `trim` cuts the most.

    Args:
      split: arrays [n, ...]; texts carry "attention_mask" [n, L].

    Returns:
      Indices [n], int64, shortest text first, stable; 0, 1, ... where there are no texts.
    """
    if "attention_mask" in split:
        return np.argsort(np.count_nonzero(split["attention_mask"], axis=1), kind="stable")
    return np.arange(len(next(iter(split.values()))))


def padded_batches(
    split: Split, batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Passes over a split in order, in batches of one shape.

    Images are decoded, one batch while the one before is in use.

    Args:
      split: arrays [n, ...] of one length.
      batch_size: B.

    Yields:
      (batch, valid): arrays [B, ...], and bool [B], False for rows that only fill the last batch
      (copies of its first example).

    Raises:
      ValueError: if batch_size is below 1, or the arrays differ in length.
    """
    num = _length(split, batch_size)

    def batch(start: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        position = start + np.arange(batch_size)
        valid = position < num
        return materialize(take(split, np.where(valid, position, start))), valid

    yield from overlapped(split, batch, range(0, num, batch_size))


def overlapped(split: Split, make: Callable[[T], Any], items: Iterable[T]) -> Iterator[Any]:
    """Maps a function that reads a split, ahead (see `ahead`) where it has images to decode.

    Args:
      split: arrays [n, ...].
      make: called with one item after the other, in order.
      items: such as the beginnings of batches.

    Yields:
      The results, in order.
    """
    is_lazy = any(isinstance(array, Images) for array in split.values())
    yield from ahead(make, items) if is_lazy else map(make, items)


def mixed(tasks: Sequence[Task], split: str, seed: int) -> dict[str, np.ndarray]:
    """A split of all tasks, shuffled across tasks in the order of `mixed_batches`.

    Args:
      tasks: as for `mixed_batches`.
      split: "train", "val" or "test".
      seed: of the order.

    Returns:
      Arrays [n, ...] with "task" int32 [n]; images that are decoded when they are read stay such.

    Raises:
      ValueError: as `mixed_batches`.
    """
    size = sum(len(task.splits[split]["label"]) for task in tasks)
    order = np.random.default_rng(seed).permutation(size)
    lazy = {
        name: Images.concatenate([task.splits[split][name] for task in tasks])[order]
        for name in (tasks[0].splits[split] if tasks else ())
        if all(isinstance(task.splits[split].get(name), Images) for task in tasks)
    }
    rest = [
        replace(
            task, splits={split: {k: v for k, v in task.splits[split].items() if k not in lazy}}
        )
        for task in tasks
    ]
    batch, _ = next(mixed_batches(rest, split, size, seed))
    return {**batch, **lazy}


def mixed_batches(
    tasks: Sequence[Task], split: str, batch_size: int, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Passes once over a split of all tasks, shuffled across tasks, in batches of one shape.

    Args:
      tasks: the tasks; their arrays must have the same names, dtypes and shapes but for the number
        of examples.
      split: "train", "val" or "test".
      batch_size: B.
      seed: of the order.

    Yields:
      (batch, valid): arrays [B, ...] with "task" int32 [B], the task's position in `tasks`, and
      valid bool [B], False for rows that only fill the last batch (copies of its first example).

    Raises:
      ValueError: if there is no task, the tasks' arrays do not fit together (all misfits are
        listed), or batch_size is below 1.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one task")
    splits = [task.splits[split] for task in tasks]
    lengths = [_length(arrays, batch_size) for arrays in splits]
    forms = [{k: (v.dtype, v.shape[1:]) for k, v in arrays.items()} for arrays in splits]
    misfits = [
        f"{task.name}: {form}" for task, form in zip(tasks, forms, strict=True) if form != forms[0]
    ]
    if misfits:
        raise ValueError(
            f"tasks: expected arrays like those of {tasks[0].name}, {forms[0]}; got "
            + "; ".join(misfits)
        )
    task_of = np.repeat(np.arange(len(tasks), dtype=np.int32), lengths)
    row_of = np.concatenate([np.arange(length) for length in lengths])
    order = np.random.default_rng(seed).permutation(len(task_of))
    for start in range(0, len(order), batch_size):
        position = start + np.arange(batch_size)
        valid = position < len(order)
        chosen = order[np.where(valid, position, start)]
        batch = {k: np.empty((batch_size, *shape), dtype) for k, (dtype, shape) in forms[0].items()}
        batch["task"] = task_of[chosen]
        for t in np.unique(batch["task"]):
            here = batch["task"] == t
            for name, array in splits[t].items():
                batch[name][here] = array[row_of[chosen[here]]]
        yield batch, valid


def _length(split: Split, batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected >= 1")
    lengths = {name: len(array) for name, array in split.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"split: expected arrays of one length, got {lengths}")
    return next(iter(lengths.values()))
