"""Images that are decoded when they are read.

Whole data sets do not fit in memory as pixels: 87,000 test images of 224 pixels are 13 GB. `Images` stands for the
array [n, S, S, 3] in a split and holds where each image lies; a batch is decoded by processes
(`retex_jax.data.workers`) or by threads of this one.
"""

import atexit
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from retex_jax.data.decoding import Open, Read, decode
from retex_jax.data.workers import Workers

T = TypeVar("T")

AUTOMATIC = -1
"""As many processes as there are cores, where there are images enough to make up for their start."""

_WORTH_PROCESSES = 2000  # images; threads decode them in the time in which processes start
_MOST_PROCESSES = 64
_MAX_LINES = 20
_numbers = itertools.count()


class _Part(NamedTuple):
    """A source, and where its images lie in it; `open_source` is None where other processes cannot open it."""

    number: int
    read: Read
    indices: np.ndarray
    name: str
    open_source: Open | None


class Images:
    """Stands for an array of images uint8 [n, S, S, 3], each decoded when it is read.

    `images[indices]` are other images, still not decoded; `np.asarray(images)` decodes all of them.

    Attributes:
      shape: (n, S, S, 3).
      dtype: uint8.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        read: Read,
        indices: np.ndarray,
        image_size: int,
        name: str,
        *,
        open_source: Open | None = None,
        workers: int = AUTOMATIC,
    ):
        """Prepares n images without reading any.

        Args:
          read: of the source.
          indices: positions in the source, integers [n].
          image_size: S.
          name: of the source, for errors.
          open_source: gives `read` in other processes, see `decoding.Open`; None: threads decode.
          workers: how many processes decode; 0: threads of this one; `AUTOMATIC`.

        Raises:
          ValueError: if workers is below -1.
        """
        if workers < AUTOMATIC:
            raise ValueError(f"workers={workers}: expected -1 (automatic), 0 (threads) or more")
        indices = np.asarray(indices, np.int64)
        self._parts = [_Part(next(_numbers), read, indices, name, open_source)]
        self._part = np.zeros(len(indices), np.int64)
        self._row = np.arange(len(indices), dtype=np.int64)
        self._size = image_size
        if workers == AUTOMATIC:
            cores = _num_cores() if len(indices) >= _WORTH_PROCESSES else 1
            workers = min(cores, _MOST_PROCESSES) if cores > 1 else 0
        self._workers = workers if open_source else 0

    @property
    def workers(self) -> int:
        """How many processes decode them; 0: threads of this one."""
        return self._workers

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, S, S, 3)."""
        return (len(self), self._size, self._size, 3)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, indices: np.ndarray | slice) -> "Images":
        return self._with(self._part[indices], self._row[indices], self._parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("images have no array before they are decoded")
        return self.decode().astype(dtype or np.uint8, copy=False)

    def decode(self) -> np.ndarray:
        """Decodes and preprocesses all images: uint8 [n, S, S, 3].

        Raises:
          ValueError: naming every image that cannot be decoded.
        """
        out = np.empty(self.shape, np.uint8)
        raise_all("images", self._run(out), "that cannot be decoded")
        return out

    def check(self) -> list[str]:
        """Decodes each image as coarsely as its format allows; returns a line for each that fails."""
        return [line for line in self._run(None) if line]

    def _run(self, out: np.ndarray | None) -> Iterable[str]:
        """A line for each image, see `decoding.decode`."""
        places = [(self._parts[k], int(row)) for k, row in zip(self._part, self._row, strict=True)]
        if self._workers and len(self):
            sources = {part.number: (part.open_source, part.name) for part in self._parts}
            rows = [(part.number, int(part.indices[row])) for part, row in places]
            return _processes(self._workers).run(sources, rows, out)

        def one(i: int) -> str:
            part, row = places[i]
            into = None if out is None else out[i]
            return decode(part.read, int(part.indices[row]), part.name, into)

        return _threads().map(one, range(len(places)))

    @classmethod
    def concatenate(cls, parts: Sequence["Images"]) -> "Images":
        """Images of one size, one after the other; processes decode them if they decode each part.

        Raises:
          ValueError: if there are none, or their sizes differ.
        """
        sizes = {images._size for images in parts}
        if len(sizes) != 1:
            raise ValueError(f"parts: expected images of one size, got {sorted(sizes)}")
        starts = np.cumsum([0, *(len(images._parts) for images in parts)])
        made = parts[0]._with(
            np.concatenate(
                [images._part + start for images, start in zip(parts, starts, strict=False)]
            ),
            np.concatenate([images._row for images in parts]),
            [part for images in parts for part in images._parts],
        )
        every = [images._workers for images in parts]
        made._workers = max(every) if all(every) else 0
        return made

    def _with(self, part: np.ndarray, row: np.ndarray, parts: list[_Part]) -> "Images":
        made = object.__new__(Images)
        made._part, made._row, made._parts = part, row, parts
        made._size, made._workers = self._size, self._workers
        return made


def as_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as NumPy arrays; `Images` stay such, not decoded."""
    return {
        name: array if isinstance(array, Images) else np.asarray(array)
        for name, array in batch.items()
    }


def materialize(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The batch with its images decoded; what is an array stays as it is."""
    return {
        name: array.decode() if isinstance(array, Images) else array
        for name, array in batch.items()
    }


def ahead(make: Callable[[T], Any], items: Iterable[T], depth: int = 2) -> Iterator[Any]:
    """Maps a function over items in a thread, up to `depth` results before they are asked for.

    So the next batch is decoded while the model works on this one.

    Args:
      make: called with one item after the other, in order.
      items: drawn in the caller's thread.
      depth: results that wait at most.

    Yields:
      The results, in order; what `make` raises is raised here.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting = []
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def raise_all(what: str, lines: Iterable[str], kind: str) -> None:
    """Raises a ValueError that lists all lines that are not empty, the first of very many."""
    found = [line for line in lines if line]
    if found:
        more = [f"and {len(found) - _MAX_LINES} more"] if len(found) > _MAX_LINES else []
        shown = "\n  ".join([*found[:_MAX_LINES], *more])
        raise ValueError(f"{what}: {len(found)} {kind}:\n  {shown}")


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """The threads that decode."""
    return ThreadPoolExecutor(os.cpu_count(), "decode")


@cache
def _processes(count: int) -> Workers:
    """The processes that decode; they end with this one."""
    workers = Workers(count)
    atexit.register(workers.close)
    return workers


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
