"""Lazy images, and CLIP's preprocessing against transformers' own."""

import threading
import time

import numpy as np
import pytest
import stand_ins
from PIL import Image

from retex_jax import data, models
from retex_jax.data.decoding import clip_preprocess
from retex_jax.data.images import Images

SIZES = [(1, 1), (7, 300), (224, 224), (225, 224), (223, 501), (640, 481), (31, 30), (500, 375)]


def lazy(count=9, image_size=8, seed=0):
    """Images and what they decode to, computed one by one."""
    files = [stand_ins.encoded(stand_ins.pixels(seed, i, 9 + i, 12)) for i in range(count)]
    images = Images(files.__getitem__, np.arange(count), image_size, "files")
    want = [stand_ins.pixels(seed, i, 9 + i, 12) for i in range(count)]
    return images, np.stack([clip_preprocess(Image.fromarray(p), image_size) for p in want])


@pytest.mark.torch
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocessing_is_clips(size, mode):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    rng = np.random.default_rng(size)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).convert(mode)
    processor = module.CLIPImageProcessorPil()
    want = processor(images=image, return_tensors="np", do_normalize=False)["pixel_values"][0]
    found = clip_preprocess(image, 224)
    assert found.shape == (224, 224, 3) and found.dtype == np.uint8
    np.testing.assert_allclose(found / 255, want.transpose(1, 2, 0), atol=1 / 255)
    normalized = processor(images=image, return_tensors="np")["pixel_values"][0]
    ours = models.vit.normalize_images(found[None], models.CLIP_B32)[0]
    np.testing.assert_allclose(
        ours, normalized.transpose(1, 2, 0), atol=1 / 255 / min(models.CLIP_B32.image_std)
    )


def test_preprocessing_of_a_ramp():
    """A horizontal ramp: bicubic keeps it, and the middle is cut out."""
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (40, 120, 3))
    found = clip_preprocess(Image.fromarray(ramp), 20)
    want = 2 * (2 * (20 + np.arange(20)) + 0.5)
    np.testing.assert_allclose(found, np.broadcast_to(want[None, :, None], (20, 20, 3)), atol=1)


def test_images_are_as_an_array():
    images, want = lazy()
    assert images.shape == want.shape and images.dtype == want.dtype and len(images) == 9
    np.testing.assert_array_equal(np.asarray(images), want)
    order = np.array([3, 3, 0, 8])
    np.testing.assert_array_equal(images[order][np.array([1, 2])].decode(), want[[3, 0]])
    np.testing.assert_array_equal(images[2:5].decode(), want[2:5])
    other, also = lazy(3, seed=5)
    joined = Images.concatenate([images[order], other, images])
    np.testing.assert_array_equal(joined.decode(), np.concatenate([want[order], also, want]))
    with pytest.raises(ValueError, match=r"one size, got \[8, 9\]"):
        Images.concatenate([images, lazy(2, 9)[0]])


def test_grey_and_colour_arrays_are_images():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    contents = [grey, grey[..., None], np.repeat(grey[..., None], 3, axis=2)]
    images = Images(contents.__getitem__, np.arange(3), 8, "arrays")
    np.testing.assert_array_equal(images.decode(), np.stack([contents[2]] * 3))


def test_nothing_is_read_before_it_is_asked_for():
    read = []
    content = stand_ins.encoded(stand_ins.pixels(0, 0))
    images = Images(lambda i: read.append(i) or content, np.arange(50), 8, "counted")
    split = {"image": images, "label": np.arange(50)}
    some = data.take(split, np.arange(10, 20))
    assert isinstance(some["image"], Images) and not read
    assert len(data.take(some, np.arange(3))["image"]) == 3 and not read
    assert data.materialize(some)["image"].shape == (10, 8, 8, 3)
    assert sorted(read) == list(range(10, 20))


def test_broken_images_are_all_named(tmp_path):
    contents = [stand_ins.encoded(stand_ins.pixels(0, 0)), b"none", b""]
    whole = stand_ins.encoded(stand_ins.pixels(0, 1, 200, 300), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    contents += [tmp_path / "cut.jpg", whole]
    images = Images(contents.__getitem__, np.arange(5), 8, "source")
    with pytest.raises(ValueError, match="3 that cannot be decoded") as caught:
        images.decode()
    for where in ("source[1]", "source[2]", str(tmp_path / "cut.jpg")):
        assert where in str(caught.value)
    assert "source[0]" not in str(caught.value) and "source[4]" not in str(caught.value)
    lines = images.check()
    assert [line.split(":")[0] for line in lines] == [
        "source[1]",
        "source[2]",
        str(tmp_path / "cut.jpg"),
    ]
    with pytest.raises(ValueError, match="source"):
        list(data.padded_batches({"image": images}, 2))


def test_batches_of_images_equal_those_of_arrays():
    images, want = lazy()
    labels = np.arange(9)
    for size in (2, 4, 16):
        ours = list(data.padded_batches({"image": images, "label": labels}, size))
        theirs = list(data.padded_batches({"image": want, "label": labels}, size))
        assert len(ours) == len(theirs)
        for (a, valid_a), (b, valid_b) in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(valid_a, valid_b)
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("is_lazy", [(True, True), (False, False), (True, False)])
def test_mixed_is_one_batch_of_all(is_lazy):
    tasks, arrays = [], []
    for k, as_images in enumerate(is_lazy):
        images, want = lazy(5 + k, seed=k)
        for kept, image in ((tasks, images if as_images else want), (arrays, want)):
            splits = {"test": {"image": image, "label": np.arange(5 + k)}}
            kept.append(data.Task(f"t{k}", ("x",), splits, "", ""))
    found = data.mixed(tasks, "test", 3)
    want, _ = next(data.mixed_batches(arrays, "test", 11, 3))
    assert isinstance(found["image"], Images) == all(is_lazy)
    assert set(found) == set(want) == {"image", "label", "task"}
    for name in want:
        np.testing.assert_array_equal(np.asarray(found[name]), want[name])


def test_ahead_keeps_order_overlaps_and_raises():
    threads = set()

    def make(i):
        threads.add(threading.get_ident())
        if i == 7:
            raise RuntimeError("seven")
        return i * i

    results = data.ahead(make, range(10))
    assert [next(results) for _ in range(7)] == [i * i for i in range(7)]
    with pytest.raises(RuntimeError, match="seven"):
        next(results)
    assert threading.get_ident() not in threads
    drawn = []
    results = data.ahead(drawn.append, iter(range(100)))
    next(results)
    results.close()
    time.sleep(0.05)
    assert len(drawn) <= 4
