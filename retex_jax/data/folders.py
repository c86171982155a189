"""Folders of images: FOLDER/SPLIT/CLASS/IMAGE, or FOLDER/CLASS/IMAGE, as archives come unpacked.

Classes may lie deeper (SUN397's a/apartment_building/outdoor), and folders that hold one folder only are passed
through. Without folders of splits, text files such as resisc45-train.txt or Testing_01.txt, in FOLDER or in
FOLDER/labels, one image a line, may say what is trained and tested on; the name of the file decides.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retex_jax.data.decoding import Open, Read

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}


_Row = tuple[Path, tuple[str, ...]]
"""An image below the folder, and the folders that name its class."""


class Part(NamedTuple):
    """Examples of one split, or of a whole data set; nothing is read before it is asked for.

    Attributes:
      labels: returns positions in the classes, int64 [n].
      images: returns what opens the images, in other processes too; they have positions from 0 to n - 1.
    """

    labels: Callable[[], np.ndarray]
    images: Callable[[], Open]


class Source(NamedTuple):
    """A data set as it lies somewhere.

    Attributes:
      classes: the source's own names.
      parts: "train" and "test"; or "all", where nothing says what is which.
      where: for errors.
      is_checked: whether its images were checked when it was made; loose files were not.
    """

    classes: tuple[str, ...]
    parts: dict[str, Part]
    where: str
    is_checked: bool


def holds_images(folder: Path) -> bool:
    """Whether there is an image somewhere below."""
    return any(
        os.path.splitext(name)[1].lower() in _SUFFIXES
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def read_folder(folder: str | os.PathLike) -> Source:
    """Lists a folder of images; none is opened.

    The validation images belong to the training part where there is a test part, and are the test
    part where there is none (as the task-vectors code arranges SUN397, EuroSAT and DTD).

    Args:
      folder: see the module's docstring.

    Returns:
      The source; its classes in alphabetical order.

    Raises:
      ValueError: listing images outside of class folders, classes that a split lacks, and images
        of the lists that are not there.
    """
    root = Path(folder)
    found = sorted(
        Path(base, name).relative_to(root)
        for base, _, names in os.walk(root, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in _SUFFIXES
    )
    if not found:
        raise ValueError(f"{root}: expected images, got none")
    rows = _without_common([(path, path.parts[:-1]) for path in found])
    tops = {split_of(folders[0]) for _, folders in rows if folders}
    problems: list[str] = []
    if "train" in tops and tops & {"val", "test"}:
        chosen = {
            split: _without_common(
                [(path, above[1:]) for path, above in rows if above and split_of(above[0]) == split]
            )
            for split in tops
            if split
        }
    else:
        chosen = _listed(root, rows, problems)
    stray = [str(root / path) for rows in chosen.values() for path, above in rows if not above]
    if stray:
        problems.append(f"{len(stray)} images outside of class folders, such as {stray[0]}")
    rest = chosen.pop("val", [])
    if rest:
        joined = "train" if "test" in chosen else "test"
        chosen[joined] = [*chosen.get(joined, []), *rest]
    classes = sorted({above for rows in chosen.values() for _, above in rows if above})
    for split, rows in chosen.items():
        lacking = [
            "/".join(above) for above in classes if above not in {above for _, above in rows}
        ]
        if lacking:
            problems.append(f"{split} lacks {', '.join(lacking)}")
    if problems:
        raise ValueError("\n".join(f"{root}: {problem}" for problem in problems))
    index = {above: i for i, above in enumerate(classes)}

    def part(rows: Sequence[_Row]) -> Part:
        names = [str(path) for path, _ in rows]
        labels = np.array([index[above] for _, above in rows], np.int64)
        return Part(lambda: labels, lambda: partial(_open_paths, root, names))

    parts = {split: part(rows) for split, rows in chosen.items()}
    return Source(tuple("/".join(above) for above in classes), parts, str(root), is_checked=False)


def split_of(name: str) -> str:
    """The split that the name of a folder or file speaks of: "train", "val", "test", or ""."""
    tokens = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, words in _WORDS.items() if tokens & words), "")


def _open_paths(root: Path, names: Sequence[str]) -> Read:
    return lambda i: root / names[i]


def _without_common(rows: Sequence[_Row]) -> list[_Row]:
    """Cuts the folders that all images have in common, but for the last, which may be the only class."""
    first = rows[0][1]
    depth = 0
    while depth < len(first) - 1 and all(
        above[: depth + 1] == first[: depth + 1] for _, above in rows
    ):
        depth += 1
    return [(path, above[depth:]) for path, above in rows]


def _listed(root: Path, rows: Sequence[_Row], problems: list[str]) -> dict[str, list[_Row]]:
    """The images by the split that the lists name; all of them as "all" where there are none."""
    lists = {
        split: path
        for path in sorted([*root.glob("*.txt"), *root.glob("labels/*.txt")], reverse=True)
        if (split := split_of(path.stem))
    }
    if not {"train", "test"} <= set(lists):
        return {"all": list(rows)}
    by_tail = {tail: row for row in rows for tail in (row[0].name, "/".join(row[0].parts[-2:]))}
    chosen = {}
    for split, path in lists.items():
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        tails = ["/".join(line.strip("/").split("/")[-2:]) for line in lines]
        missing = [tail for tail in tails if tail not in by_tail]
        if missing:
            problems.append(f"{len(missing)} images of {path} missing, such as {missing[0]}")
        chosen[split] = [by_tail[tail] for tail in tails if tail in by_tail]
    return chosen
