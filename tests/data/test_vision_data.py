import gzip
import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from retex_jax.data import vision
from retex_jax.data.pines import pines_patches


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_resize_grey_array_and_png_agree():
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 9), dtype=np.uint8)
    out = vision.resize(images, np.array([4, 1]), 14)
    assert out.shape == (2, 14, 14, 3) and out.dtype == np.uint8
    assert np.array_equal(out[..., 0], out[..., 2])
    files = [png(image) for image in images]
    assert np.array_equal(out, vision.resize(files, np.array([4, 1]), 14))
    assert np.array_equal(vision.resize(images, [3], None)[0, ..., 1], images[3])


def test_resize_is_bilinear():
    image = np.array([[[0, 100], [0, 100]]], np.uint8)
    assert vision.resize(image, [0], 4)[0, 0, :, 0].tolist() == [0, 25, 75, 100]


def test_resize_keeps_colour_and_orientation():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[0, 0, :, 0] = 200
    out = vision.resize(image, [0], 8)
    assert out[0, 0, 0].tolist() == [200, 0, 0] and out[0, 7, 0].tolist() == [0, 0, 0]


def test_resize_refuses_size_and_allows_none():
    with pytest.raises(ValueError, match="image_size=0"):
        vision.resize(np.zeros((1, 2, 2), np.uint8), [0], 0)
    assert vision.resize(np.zeros((1, 2, 2), np.uint8), [], 6).shape == (0, 6, 6, 3)


def test_pickled_bytes_are_found_without_unpickling():
    body = bytes(range(256)) * 2
    data = pickle.dumps({"x": body}, protocol=4)
    assert vision._pickled_bytes(data, 512) == body
    with pytest.raises(ValueError, match="511"):
        vision._pickled_bytes(data, 511)
    with pytest.raises(ValueError, match="got"):
        vision._pickled_bytes(data[: data.index(body) + 100], 512)


def write_idx(path, array, packed):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)


def test_fashion_mnist_reads_idx_files(tmp_path):
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images[:3], True)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[3:], False)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([7, 8, 9], np.uint8), True)
    with pytest.raises(RuntimeError, match=r"t10k-labels.*apt-get install dataset-fashion-mnist"):
        vision.fashion_mnist(root=tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([1, 2], np.uint8), False)
    loaded = vision.fashion_mnist(root=tmp_path)
    assert np.array_equal(loaded.contents, images) and loaded.labels.tolist() == [7, 8, 9, 1, 2]
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x09ab")
    with pytest.raises(ValueError, match="expected 9 bytes"):
        vision.fashion_mnist(root=tmp_path)


def test_optdigits_are_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = vision.optdigits()
    want = sklearn.load_digits()
    np.testing.assert_array_equal(digits.contents, np.rint(want.images * 255 / 16).astype(np.uint8))
    np.testing.assert_array_equal(digits.labels, want.target)
    assert digits.contents.shape == (1797, 8, 8) and digits.contents.max() == 255
    assert np.bincount(digits.labels).min() > 170


def test_pines_patches_stay_in_their_block():
    rng = np.random.default_rng(0)
    cube = rng.normal(size=(26, 25, 6))
    truth = rng.integers(0, 3, (26, 25))
    truth[0, :4] = 3
    found = pines_patches(cube, truth, ("a", "b", "rare"), block=12, radius=5, min_pixels=20)
    assert found.classes == ("a", "b")
    assert len(found.labels) == np.isin(truth, (1, 2)).sum()
    assert found.contents.shape[1:] == (11, 11, 3) and len(set(found.groups.tolist())) == 4
    rows, columns = np.nonzero(np.isin(truth, (1, 2)))
    assert np.array_equal(found.labels, truth[rows, columns] - 1)
    centre = {
        (r, c): p[5, 5].tobytes() for r, c, p in zip(rows, columns, found.contents, strict=True)
    }
    for row, column, patch in zip(rows, columns, found.contents, strict=True):
        if (row, column + 1) in centre:
            same_block = (column < 13) == (column + 1 < 13)
            assert (patch[5, 6].tobytes() == centre[row, column + 1]) == same_block
    blocks = [set(), set(), set(), set()]
    for group, patch in zip(
        np.unique(found.groups, return_inverse=True)[1], found.contents, strict=True
    ):
        blocks[group] |= {pixel.tobytes() for pixel in patch.reshape(-1, 3)}
    assert sum(map(len, blocks)) <= 26 * 25
    shared = sum(map(len, blocks)) - len(set.union(*blocks))
    assert shared <= 5  # equal colours by chance
