"""Images that are decoded when they are read, and CLIP's preprocessing.

Whole data sets do not fit in memory as pixels: 87,000 test images of 224 pixels are 13 GB. `Images` stands for the
array [n, S, S, 3] in a split and holds where each image lies; a batch is decoded by threads, because Pillow releases
the interpreter's lock while it decodes and resizes.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")
Read = Callable[[int], bytes | np.ndarray | os.PathLike]
"""The image at a position: an encoded file, pixels uint8 [h, w], [h, w, 1] or [h, w, 3], or a path."""

_MAX_LINES = 20


class Images:
    """Stands for an array of images uint8 [n, S, S, 3], each decoded when it is read.

    `images[indices]` are other images, still not decoded; `np.asarray(images)` decodes all of them.

    Attributes:
      shape: (n, S, S, 3).
      dtype: uint8.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, read: Read, indices: np.ndarray, image_size: int, name: str):
        """Prepares n images without reading any.

        Args:
          read: of the source.
          indices: positions in the source, integers [n].
          image_size: S.
          name: of the source, for errors.
        """
        self._parts = [(read, np.asarray(indices, np.int64), name)]
        self._part = np.zeros(len(indices), np.int64)
        self._row = np.arange(len(indices), dtype=np.int64)
        self._size = image_size

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

        def one(i: int) -> str:
            try:
                out[i] = clip_preprocess(self._open(i), self._size)
            except Exception as error:  # Pillow raises whatever a broken file makes it raise
                return f"{self._where(i)}: {type(error).__name__}: {error}"
            return ""

        raise_all("images", _pool().map(one, range(len(self))), "that cannot be decoded")
        return out

    def check(self) -> list[str]:
        """Decodes each image as coarsely as its format allows; returns a line for each that fails."""

        def one(i: int) -> str:
            try:
                image = self._open(i)
                image.draft(None, (1, 1))  # of a JPEG an eighth of the pixels, but every byte
                image.load()
            except Exception as error:
                return f"{self._where(i)}: {type(error).__name__}: {error}"
            return ""

        return [line for line in _pool().map(one, range(len(self))) if line]

    @classmethod
    def concatenate(cls, parts: Sequence["Images"]) -> "Images":
        """Images of one size, one after the other.

        Raises:
          ValueError: if there are none, or their sizes differ.
        """
        sizes = {images._size for images in parts}
        if len(sizes) != 1:
            raise ValueError(f"parts: expected images of one size, got {sorted(sizes)}")
        starts = np.cumsum([0, *(len(images._parts) for images in parts)])
        return parts[0]._with(
            np.concatenate(
                [images._part + start for images, start in zip(parts, starts, strict=False)]
            ),
            np.concatenate([images._row for images in parts]),
            [part for images in parts for part in images._parts],
        )

    def _with(self, part: np.ndarray, row: np.ndarray, parts: list) -> "Images":
        made = object.__new__(Images)
        made._part, made._row, made._parts, made._size = part, row, parts, self._size
        return made

    def _open(self, i: int) -> Image.Image:
        read, indices, _ = self._parts[self._part[i]]
        content = read(int(indices[self._row[i]]))
        if isinstance(content, np.ndarray):
            return Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        return Image.open(io.BytesIO(data))

    def _where(self, i: int) -> str:
        read, indices, name = self._parts[self._part[i]]
        position = int(indices[self._row[i]])
        content = read(position)
        return os.fspath(content) if isinstance(content, os.PathLike) else f"{name}[{position}]"


def clip_preprocess(image: Image.Image, image_size: int) -> np.ndarray:
    """Resizes the shorter side by Pillow's bicubic filter, and crops the centre.

    As transformers' CLIPImageProcessor on Pillow, with its default settings, up to normalisation, which
    the model does.

    Args:
      image: of any mode and size.
      image_size: S, of the shorter side and of the crop.

    Returns:
      uint8 [S, S, 3].
    """
    image = image.convert("RGB")
    short, long = sorted(image.size)
    if short != image_size:
        other = int(image_size * long / short)
        wide = image.size[0] >= image.size[1]
        size = (other, image_size) if wide else (image_size, other)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


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
def _pool() -> ThreadPoolExecutor:
    """The threads that decode."""
    return ThreadPoolExecutor(os.cpu_count(), "decode")
