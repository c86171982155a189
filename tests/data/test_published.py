"""The papers' data sets: the registry, and stand-ins in each source's own layout."""

import dataclasses

import numpy as np
import pytest
import stand_ins

from retex_jax import data
from retex_jax.data import published, registry
from retex_jax.data.decoding import clip_preprocess
from retex_jax.data.folders import Part, Source

PETS = ("Cat", "Dog")
LIMITS = {"max_train": None, "max_val": None, "max_test": None}


def load(name, root, **changes):
    return data.load_task(name, root=root, image_size=8, **{**LIMITS, **changes})


def brightness(task, split):
    """The mean of each image, which tells its class."""
    return np.asarray(task.splits[split]["image"]).mean(axis=(1, 2, 3))


def check_labels(task, split):
    """Each image is of its label: stand-ins of label l have grey 60 + 70 l, up to a few."""
    want = 60 + 70 * task.splits[split]["label"]
    assert np.abs(brightness(task, split) - want).max() < 12


# The registry


def test_thirty_data_sets_in_the_papers_order():
    names = list(registry.DATA_SETS)
    assert len(names) == 30
    assert names[7] == "dtd" and names[13] == "fer2013" and names[19] == "kmnist"
    sizes = [registry.DATA_SETS[name].num_classes for name in names]
    assert sizes[:8] == [397, 196, 45, 10, 10, 43, 10, 47]
    assert sizes[8:14] == [100, 10, 102, 37, 2, 7]
    assert sizes[14:20] == [26, 10, 101, 10, 2, 10]
    for name, spec in registry.DATA_SETS.items():
        assert spec.name == name and name not in data.VISION_TASKS
        assert spec.where and spec.templates and all("{}" in text for text in spec.templates)
        assert not spec.num_classes or len(set(spec.readable.values())) <= spec.num_classes
        assert sum(spec.shares) < 1


@pytest.mark.parametrize("name", registry.DATA_SETS)
def test_every_data_set_has_a_licence_and_a_size(name):
    """Or says that no licence was found, and why there is no size."""
    spec = registry.DATA_SETS[name]
    assert len(spec.licence) > 2 and spec.licence == spec.licence.strip()
    assert spec.num_test > 0 or len(spec.size_note) > 20
    assert spec.num_test < 50_000


def test_sizes_of_what_is_split_here():
    """A fifth of the examples, or a tenth, by the number that the registry names."""
    for name, total in (("kvasir-v2", 8_000), ("cats-dogs", 23_262), ("eurosat", 27_000)):
        spec = registry.DATA_SETS[name]
        drawn = published.draw({"all": np.arange(total) % 10}, spec.shares, 0)
        assert len(drawn["test"][1]) == spec.num_test


@pytest.mark.parametrize("name", ["gtsrb", "emnist_letters", "svhn", "mnist", "cifar10", "stl10"])
def test_numbers_have_words(name):
    spec = registry.DATA_SETS[name]
    first = 1 if name == "emnist_letters" else 0
    labels = tuple(f"{i + first:05d}" for i in range(spec.num_classes))
    names, _ = published.name_classes(spec, Source(labels, {}, "here", True))
    assert len(set(names)) == spec.num_classes


def test_signs_are_by_class_id():
    """Some anchors of the benchmark's list."""
    words = registry.DATA_SETS["gtsrb"].readable
    anchors = {0: "20", 8: "120", 14: "stop", 17: "no entry", 25: "works", 40: "roundabout"}
    for number, word in anchors.items():
        assert word in words[str(number)]


def test_words_of_labels():
    found = {
        label: published.in_words(label)
        for label in (
            "/a/airplane_cabin",
            "a/apartment_building/outdoor",
            "AnnualCrop",
            "aquarium_fish",
        )
    }
    assert list(found.values()) == [
        "airplane cabin",
        "apartment building outdoor",
        "annual crop",
        "aquarium fish",
    ]
    assert published.in_words("BMW X6 SUV 2012") == "BMW X6 SUV 2012"


def test_wrong_classes_are_named():
    spec = registry.DATA_SETS["cifar100"]
    with pytest.raises(ValueError, match="classes without a name: 0, 1, 2"):
        published.name_classes(spec, Source(tuple(map(str, range(100))), {}, "here", True))
    with pytest.raises(ValueError, match="expected 100 classes, got 2: apple, bear"):
        published.name_classes(spec, Source(("apple", "bear"), {}, "here", True))
    spec = registry.DATA_SETS["cats-dogs"]
    with pytest.raises(ValueError, match="several classes are called cat"):
        published.name_classes(spec, Source(("cat", "Cat"), {}, "here", True))


def test_labels_of_no_class_are_named(tmp_path, monkeypatch):
    part = Part(lambda: np.array([0, 1, 36]), lambda: None)
    source = Source(tuple(map(str, range(37))), {"all": part}, "here", True)
    monkeypatch.setattr(published, "_open", lambda spec, root: source)
    with pytest.raises(ValueError, match=r"all has labels of no class, such as \[0, 36\]"):
        load("emnist_letters", tmp_path)


# Folders


def test_folder_of_classes_is_split_by_shares_and_seed(tmp_path):
    stand_ins.write_folder(tmp_path / "cats-dogs", PETS, 50)
    task = load("cats-dogs", tmp_path)
    assert task.classes == ("cat", "dog")
    sizes = {split: len(arrays["label"]) for split, arrays in task.splits.items()}
    assert sizes == {"train": 70, "val": 10, "test": 20}
    for split, arrays in task.splits.items():
        check_labels(task, split)
        assert np.bincount(arrays["label"]).tolist() == [sizes[split] // 2] * 2
        assert arrays["image"].shape == (sizes[split], 8, 8, 3)
        assert arrays["label"].dtype == np.int32
    everything = np.concatenate([np.asarray(a["image"]) for a in task.splits.values()])
    assert len(np.unique(everything.reshape(100, -1), axis=0)) == 100
    again, other = load("cats-dogs", tmp_path), load("cats-dogs", tmp_path, seed=1)
    for split in task.splits:
        np.testing.assert_array_equal(brightness(task, split), brightness(again, split))
    assert not np.array_equal(brightness(task, "test"), brightness(other, "test"))
    few = load("cats-dogs", tmp_path, max_train=6, max_val=2, max_test=4)
    np.testing.assert_array_equal(brightness(few, "test"), brightness(task, "test")[:4])
    assert np.bincount(few.splits["train"]["label"]).tolist() == [3, 3]


def test_eurosat_is_split_as_the_task_vectors_code_does():
    labels = {"all": np.repeat(np.arange(10), 2700)}
    drawn = published.draw(labels, registry.DATA_SETS["eurosat"].shares, 0)
    assert [len(rows) for _, rows in drawn.values()] == [21600, 2700, 2700]
    rows = np.concatenate([rows for _, rows in drawn.values()])
    np.testing.assert_array_equal(np.sort(rows), np.arange(27000))
    for part, rows in drawn.values():
        assert np.ptp(np.bincount(labels[part][rows])) <= 1
    labels = {"all": np.repeat(np.arange(45), 700)}
    drawn = published.draw(labels, registry.DATA_SETS["resisc45"].shares, 0)
    assert [len(rows) for _, rows in drawn.values()] == [18900, 6300, 6300]


def test_validation_is_a_tenth_of_training_and_at_most_5000():
    labels = {"train": np.arange(60000) % 10, "test": np.arange(100) % 10}
    drawn = published.draw(labels, (0.1, 0.2), 0)
    assert [(part, len(rows)) for part, rows in drawn.values()] == [
        ("train", 55000),
        ("train", 5000),
        ("test", 100),
    ]
    with pytest.raises(ValueError, match="5 examples leave val empty"):
        published.draw({"train": np.arange(5), "test": np.arange(5)}, (0.1, 0.2), 0)


def test_published_splits_of_a_folder(tmp_path):
    classes = ("angular_leaf_spot", "bean_rust", "healthy")
    for seed, split in enumerate(("train", "validation", "test")):
        stand_ins.write_folder(tmp_path / "beans" / split, classes, 10, 100 * seed)
    task = load("beans", tmp_path)
    assert task.classes == ("angular leaf spot", "bean rust", "no disease")
    assert [len(a["label"]) for a in task.splits.values()] == [54, 6, 30]
    assert task.templates == registry.DATA_SETS["beans"].templates and task.licence == "MIT"
    file = tmp_path / "beans/test/healthy/healthy_3.png"
    from PIL import Image

    images = np.asarray(task.splits["test"]["image"])
    want = clip_preprocess(Image.open(file), 8)
    assert (images == want).all(axis=(1, 2, 3)).sum() == 1


def test_damaged_images_are_all_named_at_once(tmp_path):
    stand_ins.write_folder(tmp_path / "cats-dogs", PETS, 50)
    broken = [tmp_path / f"cats-dogs/Dog/Dog_{i}.png" for i in (3, 11, 40)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="3 images that cannot be decoded") as caught:
        load("cats-dogs", tmp_path)
    assert all(str(path) in str(caught.value) for path in broken)


def test_missing_data_is_named_with_what_gets_it(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    for name, spec in registry.DATA_SETS.items():
        [line] = published.problems(name, tmp_path)
        assert line.startswith(f"tasks: {name}: no data in {tmp_path}/{name}; get it with: ")
        if spec.tfds:
            assert f"tfds build {spec.tfds} --file_format=array_record" in line
        if spec.hub:
            assert f"hf download {spec.hub.partition(':')[0]} --repo-type dataset" in line
        assert spec.where in line
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="image_size=None: data set 'mnist'"):
        data.load_task("mnist", root=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'sun397'"):
        data.check_names(["sun379"])


def test_default_root_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path))
    stand_ins.write_folder(tmp_path / "datasets/cats-dogs", PETS, 20)
    assert published.problems("cats-dogs") == []
    assert len(load("cats-dogs", "").splits["test"]["label"]) == 8


# array_record


def test_array_record_of_one_split(tmp_path):
    counts = {"train": 30}
    stand_ins.write_tfds(tmp_path, "cats_vs_dogs", ("cat", "dog"), counts)
    task = load("cats-dogs", tmp_path)
    assert [len(a["label"]) for a in task.splits.values()] == [42, 6, 12]
    for split in task.splits:
        check_labels(task, split)


def test_array_record_with_splits_and_configuration(tmp_path, monkeypatch):
    classes = tuple(f"texture_{chr(97 + i)}" for i in range(3))
    spec = dataclasses.replace(registry.DATA_SETS["dtd"], num_classes=3, tfds="dtd/some")
    monkeypatch.setitem(registry.DATA_SETS, "dtd", spec)
    counts = {"train": 10, "test": 5, "validation": 10}
    stand_ins.write_tfds(tmp_path, "dtd", classes, counts, configuration="some")
    assert published.problems("dtd", tmp_path) == []
    task = load("dtd", tmp_path)
    assert task.classes == ("texture a", "texture b", "texture c")
    assert [len(a["label"]) for a in task.splits.values()] == [54, 6, 15]
    for split in task.splits:
        check_labels(task, split)


def test_unused_labels_of_array_record_are_left_out(tmp_path):
    classes = [str(i) for i in range(37)]
    counts = {"train": 4, "test": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "examples", lambda names, *a: _examples(names[:26], *a))
        stand_ins.write_tfds(tmp_path, "emnist", classes, counts, "letters", first=1)
    task = load("emnist_letters", tmp_path)
    assert task.classes == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert np.bincount(task.splits["test"]["label"]).tolist() == [1] * 26


_examples = stand_ins.examples


def test_array_record_lacks_what_is_asked_for(tmp_path):
    stand_ins.write_tfds(tmp_path, "beans", ("a", "b"), {"train": 3})
    [line] = published.problems("beans", tmp_path)
    assert "splits ['validation', 'test'] missing, found ['train']" in line


def test_reading_imports_no_tensorflow(tmp_path):
    import sys

    stand_ins.write_tfds(tmp_path, "cats_vs_dogs", ("cat", "dog"), {"train": 10})
    load("cats-dogs", tmp_path).splits["test"]["image"].decode()
    assert "tensorflow" not in sys.modules


# Parquet of the hub


def test_parquet(tmp_path):
    classes = ("angular_leaf_spot", "bean_rust", "healthy")
    counts = {"train": 10, "validation": 10, "test": 5}
    stand_ins.write_parquet(tmp_path / "beans", classes, counts)
    assert published.problems("beans", tmp_path) == []
    assert not (tmp_path / "beans/.cache").exists()
    task = load("beans", tmp_path)
    assert task.classes == ("angular leaf spot", "bean rust", "no disease")
    assert [len(a["label"]) for a in task.splits.values()] == [54, 6, 15]
    for split in task.splits:
        check_labels(task, split)


def test_parquet_of_one_configuration(tmp_path):
    counts = {"train": 3, "test": 1}
    digits = tuple("0123456789")
    folder = tmp_path / "svhn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "pixels", lambda seed, label, h, w: np.zeros((h, w, 3), np.uint8))
        stand_ins.write_parquet(folder, digits, counts, "cropped_digits")
        stand_ins.write_parquet(folder, digits, {"train": 7, "test": 7}, "full_numbers")
    task = load("svhn", tmp_path)
    assert len(task.splits["test"]["label"]) == 10
    assert len(task.splits["train"]["label"]) == 27
    assert task.classes[3] == "3 (three)"


def test_parquet_lacks_what_is_asked_for(tmp_path):
    stand_ins.write_parquet(tmp_path / "beans", ("a", "b"), {"train": 2})
    [line] = published.problems("beans", tmp_path)
    assert "splits ['validation', 'test'] missing, found ['train']" in line
