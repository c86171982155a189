"""The papers' vision data sets as tasks: found in local folders, with their own splits, decoded when they are read.

Unlike the packaged tasks their copies are not dropped: the figures are on the published test splits.
"""

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from retex_jax.data import archives, folders, prepared
from retex_jax.data.folders import Source
from retex_jax.data.images import AUTOMATIC, Images, raise_all
from retex_jax.data.prepared import data_root
from retex_jax.data.registry import DATA_SETS, DataSet
from retex_jax.data.tasks import Task, stratified_order

_MOST_VALIDATION = 5000


def load_published(
    name: str,
    root: str | os.PathLike = "",
    *,
    image_size: int,
    seed: int = 0,
    max_train: int | None = None,
    max_val: int | None = 256,
    max_test: int | None = None,
    workers: int = AUTOMATIC,
) -> Task:
    """Finds a data set, splits it and prepares its images, which are decoded in batches as they are read.

    The validation part is a tenth of the training part, at most 5000 (as the task-vectors code), drawn by
    `seed` in proportion to the classes; `DataSet.shares` hold where nothing is published. The splits are in
    an order whose beginnings hold the classes in proportion.

    Args:
      name: a key of `registry.DATA_SETS`.
      root: see `data_root`.
      image_size: S.
      seed: of what is drawn.
      max_train: the most training examples, of the order's beginning; None: all.
      max_val: the same for validation examples.
      max_test: the same for test examples.
      workers: processes that decode the images, see `Images`.

    Returns:
      The task, "image" `Images` [n, S, S, 3] and "label" int32 [n].

    Raises:
      ValueError: if the data are nowhere (with how to get them), do not have the data set's classes,
        or images of a folder cannot be decoded (all are named).
      ImportError: if a library is missing that reads them.
    """
    spec = DATA_SETS[name]
    source = _open(spec, root)
    classes, position = name_classes(spec, source)
    labels = {part: _labels(source, part, position) for part in source.parts}
    opens = {part: source.parts[part].images() for part in source.parts}
    read = {part: open_part() for part, open_part in opens.items()}
    limits = {"train": max_train, "val": max_val, "test": max_test}
    splits, broken = {}, []
    for split, (part, rows) in draw(labels, spec.shares, seed).items():
        rows = rows[: limits[split]]
        images = Images(
            read[part],
            rows,
            image_size,
            f"{source.where}:{part}",
            open_source=opens[part],
            workers=workers,
        )
        if not source.is_checked:
            broken += images.check()
        splits[split] = {"image": images, "label": labels[part][rows].astype(np.int32)}
    raise_all(f"{name}: {source.where}", broken, "images that cannot be decoded")
    return Task(name, classes, splits, source.where, spec.licence, spec.templates)


def problems(name: str, root: str | os.PathLike = "") -> list[str]:
    """What keeps a data set from being read, with how to get it; nothing is downloaded or decoded.

    Args:
      name: a key of `registry.DATA_SETS`.
      root: see `data_root`.

    Returns:
      One line a problem.
    """
    spec = DATA_SETS[name]
    try:
        name_classes(spec, _open(spec, root))
    except (ImportError, OSError, ValueError) as error:
        return [f"tasks: {line.strip()}" for line in str(error).splitlines()]
    return []


def name_classes(spec: DataSet, source: Source) -> tuple[tuple[str, ...], np.ndarray]:
    """Names a source's classes in words.

    Classes that the source declares without using them (EMNIST's letters are 1 to 26 of 37) are left out.

    Args:
      spec: with the words.
      source: with labels of its own.

    Returns:
      The names, and the position in them of each of the source's classes, int64, -1 for what is left out.

    Raises:
      ValueError: if their number is not the data set's, a label is a mere number without words, or two
        have one name.
    """
    words = {_key(label): name for label, name in spec.readable.items()}
    kept = list(range(len(source.classes)))
    if spec.num_classes and len(kept) != spec.num_classes:
        with_words = [i for i in kept if _key(source.classes[i]) in words]
        kept = with_words if len(with_words) == spec.num_classes else kept
    names = tuple(words.get(_key(source.classes[i])) or in_words(source.classes[i]) for i in kept)
    found = []
    if spec.num_classes and len(names) != spec.num_classes:
        found.append(f"expected {spec.num_classes} classes, got {len(names)}: {_some(names)}")
    numbers = [name for name in names if re.fullmatch(r"[\d\s]*", name)]
    if numbers:
        found.append(f"classes without a name: {_some(numbers)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        found.append(f"several classes are called {_some(twice)}")
    if found:
        raise ValueError("\n".join(f"{spec.name}: {source.where}: {line}" for line in found))
    position = np.full(len(source.classes), -1)
    position[kept] = np.arange(len(kept))
    return names, position


def draw(
    labels: Mapping[str, np.ndarray],
    shares: tuple[float, float],
    seed: int,
) -> dict[str, tuple[str, np.ndarray]]:
    """Draws the splits of a source.

    Args:
      labels: "train" and "test", or "all" -> [n].
      shares: validation's and test's of "all".
      seed: of the order.

    Returns:
      "train", "val", "test" -> part, and positions in it: disjoint, every beginning in proportion to the
      classes.

    Raises:
      ValueError: if a split would be empty.
    """
    rng = np.random.default_rng(seed)
    first = "all" if "all" in labels else "train"
    order = stratified_order(labels[first], rng)
    num = len(order)
    if first == "all":
        val, test = (round(num * share) for share in shares)
        drawn = {
            "train": (first, order[val + test :]),
            "val": (first, order[test : val + test]),
            "test": (first, order[:test]),
        }
    else:
        val = num_held_out(num)
        drawn = {
            "train": (first, order[val:]),
            "val": (first, order[:val]),
            "test": ("test", stratified_order(labels["test"], rng)),
        }
    empty = [split for split, (_, rows) in drawn.items() if not len(rows)]
    if empty:
        raise ValueError(f"{num} examples leave {', '.join(empty)} empty")
    return drawn


def num_held_out(num: int) -> int:
    """Validation examples of a published training set: a tenth, at most 5000."""
    return min(num // 10, _MOST_VALIDATION)


def in_words(label: str) -> str:
    """A source's label as words: "/a/airplane_cabin" is "airplane cabin", "AnnualCrop" is "annual crop"."""
    parts = [part for part in label.split("/") if len(part) > 1] or [label]
    text = re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", " ".join(parts))).strip()
    return " ".join(
        word if word.isupper() and len(word) > 1 else word.lower() for word in text.split()
    )


def how_to_get(spec: DataSet, root: str | os.PathLike = "") -> str:
    """The commands that bring a data set, and where its images may be put instead."""
    folder = data_root(root) / spec.name
    ways = []
    if spec.tfds:
        ways.append(prepared.tfds_command(spec.tfds, root))
    if spec.hub:
        repository, _, configuration = spec.hub.partition(":")
        revision = "refs/convert/parquet"
        ways.append(prepared.hub_command(repository, folder, configuration, revision))
    if spec.archives:
        ways.append(archives.command(spec.archives, data_root(root)))
    ways.append(f"images of {spec.where} as {folder}/SPLIT/CLASS/* or {folder}/CLASS/*")
    return "; or ".join(ways)


def _open(spec: DataSet, root: str | os.PathLike) -> Source:
    """A data set from wherever it lies: its own folder, or prepared by tensorflow-datasets."""
    folder = data_root(root) / spec.name
    if folder.is_dir():
        if prepared.find_parquet(folder):
            configuration = spec.hub.partition(":")[2]
            return prepared.read_parquet(folder, configuration, *spec.splits("hub"))
        if folders.holds_images(folder):
            return folders.read_folder(folder)
    found = prepared.find_tfds(spec.tfds, root) if spec.tfds else None
    if found:
        return prepared.read_tfds(found, *spec.splits("tfds"))
    raise ValueError(f"{spec.name}: no data in {folder}; get it with: {how_to_get(spec, root)}")


def _labels(source: Source, part: str, position: np.ndarray) -> np.ndarray:
    """Positions in the names of the classes, [n]."""
    given = source.parts[part].labels()
    inside = (given >= 0) & (given < len(position))
    labels = np.where(inside, position[np.where(inside, given, 0)], -1)
    if (labels < 0).any():
        wrong = np.unique(given[labels < 0])[:5].tolist()
        raise ValueError(f"{source.where}: {part} has labels of no class, such as {wrong}")
    return labels


def _key(label: str) -> str:
    """What labels have in common that are written in several ways: "00014" is "14"."""
    return str(int(label)) if label.isdigit() else label.lower()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:6], *(["..."] if len(names) > 6 else [])])
