"""One image: from what a source holds to pixels, by CLIP's preprocessing."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Content = bytes | np.ndarray | os.PathLike
Read = Callable[[int], Content]
"""The image at a position: an encoded file, pixels uint8 [h, w], [h, w, 1] or [h, w, 3], or a path."""

Open = Callable[[], Read]
"""Opens a source. One that can be opened in another process too is a function of a module, with plain arguments."""


def decode(read: Read, position: int, name: str, out: np.ndarray | None) -> str:
    """Reads one image, decodes and preprocesses it.

    Args:
      read: of the source.
      position: in the source.
      name: of the source, for errors.
      out: receives the pixels, uint8 [S, S, 3]; None: the image is only checked, and decoded as coarsely as its
        format allows.

    Returns:
      "", or where the image lies and what is wrong with it.
    """
    content = None
    try:
        content = read(position)
        image = _opened(content)
        if out is None:
            image.draft(None, (1, 1))  # of a JPEG an eighth of the pixels, but every byte
            image.load()
        else:
            out[...] = clip_preprocess(image, len(out))
    except Exception as error:  # Pillow raises whatever a broken file makes it raise
        is_path = isinstance(content, os.PathLike)
        where = os.fspath(content) if is_path else f"{name}[{position}]"
        return f"{where}: {type(error).__name__}: {error}"
    return ""


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


def _opened(content: Content) -> Image.Image:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)
    return Image.open(
        io.BytesIO(content if isinstance(content, bytes) else Path(content).read_bytes())
    )
