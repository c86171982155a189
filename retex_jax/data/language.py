"""The papers' language tasks by name: GLUE (see `glue`) and question answering (see `questions`), from local files.

The published test set is the test split, and "val" a tenth of the published training set (of MMLU, whose training set
is of other sources, its validation set), at most 5000. A source with one split is divided into a fifth for "train", a
tenth for "val" and the rest, near copies kept together. Nothing is dropped as a copy: the figures are to be comparable.
Every split is in random order, by the seed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from retex_jax.data import glue, questions
from retex_jax.data.prepared import data_root
from retex_jax.data.published import draw
from retex_jax.data.tables import Table
from retex_jax.data.tasks import SPLITS, Task
from retex_jax.data.tokenizer import Encoder

LANGUAGE_TASKS = (*glue.GLUE, *questions.QUESTIONS)
"""The names."""

WITHOUT_CLASSES = (
    *(name for name, task in glue.GLUE.items() if not task.classes),
    *questions.QUESTIONS,
)
"""Of them those whose labels are numbers, and the questions."""

_CHUNK = 4096  # texts that are tokenised at once
_SHARES = (0.2, 0.1, 0.7)  # of a source with one split: train, val, test


def problems(name: str, root: str | os.PathLike = "") -> list[str]:
    """What keeps a language task from being read, with how to get it; nothing is downloaded or tokenised.

    Args:
      name: one of `LANGUAGE_TASKS`.
      root: see `prepared.data_root`.

    Returns:
      One line a problem.
    """
    read = glue.read if name in glue.GLUE else questions.read
    try:
        read(name, root)
    except (ImportError, OSError, ValueError) as error:
        return [f"tasks: {line.strip()}" for line in str(error).splitlines()]
    return []


def load_language_task(
    name: str,
    root: str | os.PathLike = "",
    *,
    encode: Encoder,
    seed: int = 0,
    max_train: int | None = None,
    max_val: int | None = 256,
    max_test: int | None = None,
    shots: int = 5,
    max_answer: int = 64,
    metric: str = "",
) -> Task:
    """Loads a language task into memory.

    Args:
      name: one of `LANGUAGE_TASKS`.
      root: see `prepared.data_root`.
      encode: from `load_tokenizer`.
      seed: of what is held out, and of the order.
      max_train: the most training examples; None: all.
      max_val: the most validation examples; None: all.
      max_test: the most test examples; None: all.
      shots: solved questions before each question of MMLU, at most.
      max_answer: the most tokens of an answer to a question.
      metric: a name in `metrics.METRICS`; "": the task's own.

    Returns:
      The task.

    Raises:
      FileNotFoundError: if files are missing, with the command that gets them.
      ImportError: if what reads them is not installed.
      ValueError: if a file is damaged, a split is empty, or an argument is out of range.
    """
    limits = dict(zip(SPLITS, (max_train, max_val, max_test), strict=True))
    wrong = [f"max_{k}={v!r}" for k, v in limits.items() if v is not None and int(v) < 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: expected None or an integer >= 1")
    parts: Mapping[str, Any]
    if name in glue.GLUE:
        spec, licence = glue.GLUE[name], glue.LICENCE
        classes, own_metric, parts = spec.classes, spec.metric, glue.read(name, root)

        def encoded(part: str, rows: np.ndarray) -> Mapping[str, np.ndarray]:
            return _encode_rows(name, spec, parts[part], rows, encode)
    else:
        licence, parts = questions.QUESTIONS[name].licence, questions.read(name, root, shots)
        classes, own_metric = (), "accuracy"

        def encoded(part: str, rows: np.ndarray) -> Mapping[str, np.ndarray]:
            return questions.encode([parts[part][row] for row in rows], encode, max_answer)

    splits = {
        split: _in_chunks(partial(encoded, part), rows[: limits[split]])
        for split, (part, rows) in _draw(name, parts, seed).items()
    }
    return Task(name, classes, splits, str(data_root(root)), licence, metric=metric or own_metric)


def _encode_rows(
    name: str, spec: glue.GlueTask, table: Table, rows: np.ndarray, encode: Encoder
) -> dict[str, np.ndarray]:
    *texts, values = table.take(rows, (*spec.columns, "label"))
    labels = np.asarray(values, np.int32 if spec.classes else np.float32)
    if spec.classes and not (0 <= labels.min() <= labels.max() < len(spec.classes)):
        raise ValueError(
            f"{name}: labels {labels.min()} to {labels.max()}, expected 0 to {len(spec.classes) - 1}"
        )
    encoded = encode(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
    return {**encoded, "label": labels}


def _draw(name: str, parts: Mapping[str, Any], seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """The splits of a source: part, and positions in it."""
    try:
        if "all" not in parts:
            return draw({part: np.zeros(len(rows)) for part, rows in parts.items()}, (0, 0), seed)
        rows = draw_groups([question.group for question in parts["all"]], seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {split: ("all", chosen) for split, chosen in rows.items()}


def draw_groups(groups: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Divides the examples of a source with one split at random; those of a group stay together.

    Args:
      groups: the name of each example's group.
      seed: of the order.

    Returns:
      "train", "val", "test" to positions, in random order.

    Raises:
      ValueError: if a split would be empty.
    """
    rng = np.random.default_rng(seed)
    names, group_of = np.unique(groups, return_inverse=True)
    place = rng.permutation(len(names))[group_of]
    before = np.searchsorted(np.sort(place), place)
    part = np.searchsorted(np.round(np.cumsum(_SHARES)[:-1] * len(groups)), before, side="right")
    if empty := [split for k, split in enumerate(SPLITS) if not (part == k).any()]:
        raise ValueError(f"{len(groups)} examples leave {', '.join(empty)} empty")
    return {split: rng.permutation(np.flatnonzero(part == k)) for k, split in enumerate(SPLITS)}


def _in_chunks(
    encode: Callable[[np.ndarray], Mapping[str, np.ndarray]], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Encodes some rows at a time, and joins what comes out."""
    parts = [encode(rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)]
    return {key: joined([part[key] for part in parts]) for key in parts[0]}


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates arrays along the first axis; all others are filled up with zeros to the largest.

    Args:
      arrays: of one rank and dtype.
    """
    sizes = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
    filled = [
        np.pad(array, [(0, 0), *((0, size) for size in sizes - array.shape[1:])])
        for array in arrays
    ]
    return np.concatenate(filled)
