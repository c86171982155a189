"""Tasks: a data set as de-duplicated, stratified train, validation and test splits of arrays.

Copies are removed before splitting, so that no test example was seen in training; the same
(examples, seed) gives the same test split whatever the sizes of the other splits are.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Task:
    """A task in memory: inputs to classify, to give a number to, or to choose an answer to.

    Attributes:
      name: the task's name.
      classes: the name of each class; label i means classes[i]. () where there are no classes.
      splits: "train", "val" and "test" -> arrays with the example as leading axis: "image" uint8
        [n, H, W, 3] (or `images.Images`, decoded when they are read), or "input_ids" and
        "attention_mask" int32 [n, L]; and "label" int32 [n]. A regression has "label" float32 [n].
        Questions have their answers besides, "choice_ids" and "choice_mask" int32 [n, C, T], as
        `models.score_choices` reads them; their label is the right one.
      source: where the data come from.
      licence: the licence under which they come.
      templates: prompts with "{}" for a class, for zero-shot heads; () if it has none of its own.
      metric: what measures it, a name in `metrics.METRICS`.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, dict[str, np.ndarray]]
    source: str
    licence: str
    templates: tuple[str, ...] = ()
    metric: str = "accuracy"

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def num_outputs(self) -> int:
        """The outputs of its head: one a class; 1 for a regression; 0 for questions, which need no head."""
        if self.classes:
            return self.num_classes
        return int(all("choice_ids" not in split for split in self.splits.values()))


class Examples(NamedTuple):
    """A data set as its loader returns it, before splitting.

    Attributes:
      contents: images uint8 [n, h, w] or [n, h, w, 3], or a list of n encoded image files (bytes),
        or of n texts.
      labels: class indices, integers [n].
      classes: the name of each class.
      groups: integers [n], or None. Examples of one group (one block of a scene, one style of a
        font) never come into different splits.
    """

    contents: np.ndarray | list[bytes] | list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None


@dataclass(frozen=True)
class TaskSpec:
    """How to load a task.

    Attributes:
      loader: returns the Examples; called with the cache folder of the wheels (None: the default
        one).
      wheels: the names in `wheels.WHEELS` of the files that the loader reads.
      source: where the data come from.
      licence: the licence under which they come.
      problems: what the loader lacks beside wheels, one line each; called like the loader.
    """

    loader: Callable[[str | os.PathLike | None], Examples]
    wheels: tuple[str, ...]
    source: str
    licence: str
    problems: Callable[[str | os.PathLike | None], list[str]] = lambda _: []


def content_key(content: np.ndarray | bytes | str) -> Hashable:
    """Returns what copies share: pixels, bytes, or the text up to case and white space."""
    if isinstance(content, str):
        return " ".join(content.casefold().split())
    return bytes(content) if isinstance(content, bytes) else content.tobytes()


def unique_indices(contents: Sequence | np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Picks one example of each content, and none where copies disagree on the label.

    Args:
      contents: n images, encoded image files or texts, compared by `content_key`.
      labels: class indices [n].

    Returns:
      Increasing indices, int64 [m]: the first example of each content, m <= n.
    """
    first: dict[Hashable, int] = {}
    mixed: set[int] = set()
    for i, content in enumerate(contents):
        j = first.setdefault(content_key(content), i)
        if labels[j] != labels[i]:
            mixed.add(j)
    return np.array([i for i in first.values() if i not in mixed], dtype=np.int64)


def stratified_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Orders examples at random such that each prefix holds every class in proportion.

    A prefix of length k holds k times each class's share, up to rounding.

    Args:
      labels: class indices [n].
      rng: the source of randomness.

    Returns:
      A permutation of range(n), int64 [n].
    """
    labels = np.asarray(labels)
    position = np.zeros(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(position, kind="stable")


def split_indices(
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    seed: int = 0,
    max_train: int | None = None,
    max_val: int | None = 256,
    max_test: int | None = None,
) -> dict[str, np.ndarray]:
    """Splits n examples into disjoint stratified train, val and test sets.

    Test holds a fifth of the examples, at least 500 but no more than a third; val a tenth of all,
    at most `max_val`; train the rest. With groups these are targets, met as closely as whole
    groups allow. Which examples are test examples depends on (labels, groups, seed) alone;
    `max_test` takes a stratified part of them.

    Args:
      labels: class indices [n].
      groups: integers [n]: examples of one group come into one split; None: each is its own group.
      seed: of the random order.
      max_train: the most training examples; None: no limit.
      max_val: the most validation examples; None: no limit.
      max_test: the most test examples; None: no limit.

    Returns:
      "train", "val", "test" -> indices, int64, in an order whose prefixes are stratified.

    Raises:
      ValueError: if a limit is not None or a positive integer, if groups and labels differ in
        length, or if n is so small that a split is empty.
    """
    labels = np.asarray(labels)
    limits = {"train": max_train, "val": max_val, "test": max_test}
    wrong = [f"max_{k}={v!r}" for k, v in limits.items() if v is not None and int(v) < 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: expected None or an integer >= 1")
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"groups: expected {len(labels)} entries as labels has, got {len(groups)}")
    num = len(labels)
    num_test = max(round(num / 5), min(500, num // 3))
    num_val = num // 10
    rng = np.random.default_rng(seed)
    if groups is None:
        order = stratified_order(labels, rng)
        end_val = num_test + (num_val if max_val is None else min(num_val, max_val))
        parts = {
            "train": order[end_val:],
            "val": order[num_test:end_val],
            "test": order[:num_test],
        }
    else:
        shares = np.array([num - num_test - num_val, num_val, num_test]) / max(num, 1)
        part = _assign_groups(labels, np.asarray(groups), shares, rng)
        parts = {}
        for k, name in enumerate(SPLITS):
            members = np.flatnonzero(part == k)
            parts[name] = members[stratified_order(labels[members], rng)]
    parts = {name: indices[: limits[name]] for name, indices in parts.items()}
    empty = [name for name, indices in parts.items() if not len(indices)]
    if empty:
        raise ValueError(f"labels: {num} examples leave {', '.join(empty)} empty")
    return parts


def _assign_groups(
    labels: np.ndarray, groups: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Gives each group to the split that lacks its classes most; returns the splits [n]."""
    names, group_index = np.unique(groups, return_inverse=True)
    classes, class_index = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (group_index, class_index), 1)
    target = np.outer(shares, counts.sum(0))
    have = np.zeros_like(target)
    part = np.zeros(len(names), dtype=np.int64)
    order = rng.permutation(len(names))
    for g in order[np.argsort(-counts[order].sum(1), kind="stable")]:
        lack = (target - have) / np.maximum(target, 1e-9)
        part[g] = int(np.argmax(lack @ counts[g]))
        have[part[g]] += counts[g]
    return part[group_index]
