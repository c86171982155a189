"""Folders of images in the layouts that archives have."""

import numpy as np
import pytest
import stand_ins

from retex_jax.data.folders import holds_images, read_folder, split_of


def rows(source, part):
    """(file name, class) of a part."""
    read = source.parts[part].images()()
    labels = source.parts[part].labels()
    return sorted((read(i).name, source.classes[label]) for i, label in enumerate(labels))


def test_classes_without_splits(tmp_path):
    stand_ins.write_folder(tmp_path, ("dog", "cat"), 4)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = read_folder(tmp_path)
    assert source.classes == ("cat", "dog") and set(source.parts) == {"all"}
    want = [(f"{name}_{i}.png", name) for name in ("cat", "dog") for i in range(4)]
    assert rows(source, "all") == want
    assert source.parts["all"].labels().dtype == np.int64


@pytest.mark.parametrize(
    ("folders", "tested"),
    [
        (("train", "test"), ("test",)),
        (("train", "val"), ("val",)),  # as the task-vectors code has SUN397
        (("Train", "Validation", "Test"), ("Test",)),
        (("seg_train/seg_train", "seg_test/seg_test"), ("seg_test/seg_test",)),  # Intel
        (("top/Training Data", "top/Testing Data"), ("top/Testing Data",)),
    ],
)
def test_folders_of_splits(tmp_path, folders, tested):
    for seed, folder in enumerate(folders):
        stand_ins.write_folder(tmp_path / folder, ("a", "b"), 2 + seed, seed)
    if "seg" in folders[0]:  # unlabelled images beside the splits
        (tmp_path / "seg_pred/seg_pred").mkdir(parents=True)
        (tmp_path / "seg_pred/seg_pred/1.png").write_bytes(b"")
    source = read_folder(tmp_path)
    assert source.classes == ("a", "b")
    sizes = {folder: 2 * (2 + seed) for seed, folder in enumerate(folders)}
    found = {part: len(source.parts[part].labels()) for part in source.parts}
    test = sizes.pop(tested[0])
    assert found == {"train": sum(sizes.values()), "test": test}
    read = source.parts["test"].images()()
    assert all(tested[0] in str(read(i)) for i in range(test))


def test_deep_classes_and_lists(tmp_path):
    """SUN397's layout, with its lists; list 01 wins over 02."""
    for name in ("a/abbey", "a/apartment/outdoor", "b/abbey"):
        stand_ins.write_folder(tmp_path / name.rpartition("/")[0], (name.rpartition("/")[2],), 3)
    lines = {
        "Training_01": ["/a/abbey/abbey_0.png", "/a/apartment/outdoor/outdoor_1.png"],
        "Testing_01": ["/a/abbey/abbey_2.png", "/a/apartment/outdoor/outdoor_0.png"],
        "Training_02": ["/a/abbey/none.png"],
    }
    for name, wanted in lines.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(wanted) + "\n")
    for i in range(3):
        (tmp_path / f"b/abbey/abbey_{i}.png").unlink()
    source = read_folder(tmp_path)
    assert source.classes == ("abbey", "apartment/outdoor")
    assert rows(source, "train") == [
        ("abbey_0.png", "abbey"),
        ("outdoor_1.png", "apartment/outdoor"),
    ]
    assert rows(source, "test") == [
        ("abbey_2.png", "abbey"),
        ("outdoor_0.png", "apartment/outdoor"),
    ]


def test_lists_of_file_names_with_a_validation_list(tmp_path):
    """RESISC45's layout: images below NWPU-RESISC45, lists beside it."""
    stand_ins.write_folder(tmp_path / "NWPU-RESISC45", ("airport", "beach"), 3)
    for k, split in enumerate(("train", "val", "test")):
        lines = [f"airport_{k}.png", f"beach_{k}.png"]
        (tmp_path / f"resisc45-{split}.txt").write_text("\n".join(lines))
    source = read_folder(tmp_path)
    assert [name for name, _ in rows(source, "test")] == ["airport_2.png", "beach_2.png"]
    assert len(source.parts["train"].labels()) == 4


def test_problems_are_all_named(tmp_path):
    stand_ins.write_folder(tmp_path / "train", ("a", "b", "c"), 2)
    stand_ins.write_folder(tmp_path / "test", ("a",), 2)
    (tmp_path / "test" / "lost.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 images outside of class folders.*lost\.png") as caught:
        read_folder(tmp_path)
    assert "test lacks b, c" in str(caught.value)
    with pytest.raises(ValueError, match="expected images, got none"):
        read_folder(tmp_path / "none")


def test_missing_images_of_lists(tmp_path):
    stand_ins.write_folder(tmp_path, ("a", "b"), 2)
    (tmp_path / "train.txt").write_text("a/a_0.png\nb/b_0.png\na/gone.png\n")
    (tmp_path / "test.txt").write_text("a/a_1.png\nb/b_1.png\nb/a_0.png\n")
    with pytest.raises(ValueError, match=r"1 images of .*train\.txt missing, such as a/gone"):
        read_folder(tmp_path)


def test_names_of_splits():
    names = ("train", "Testing_01", "resisc45-val", "seg_train", "training", "Validation Data")
    assert [split_of(n) for n in names] == ["train", "test", "val", "train", "train", "val"]
    assert [split_of(n) for n in ("trainer", "valley", "testament", "labels")] == [""] * 4


def test_one_class_is_a_class(tmp_path):
    stand_ins.write_folder(tmp_path / "deep" / "deeper", ("only",), 2)
    assert read_folder(tmp_path).classes == ("only",)
    assert holds_images(tmp_path) and not holds_images(tmp_path / "none")
