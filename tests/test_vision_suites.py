"""The papers' vision experiments: what they name, what they miss, and a run on stand-ins of data and experts."""

import dataclasses
import importlib

import numpy as np
import pytest
import stand_ins
import tiny
from tiny_snapshots import clip_snapshots

from configs import common
from retex_jax import (
    command_line,
    data,
    experiment,
    huggingface,
    preflight,
    protocols,
    recovery,
    train,
)
from retex_jax.data import registry

SUITES = [
    *(("b32", "base-patch32", count) for count in (8, 14, 20, 30)),
    *(("b16", "base-patch16", count) for count in (8, 14, 20)),
    *(("l14", "large-patch14", count) for count in (8, 14, 20)),
]
NAMES = ("cats-dogs", "intel-images", "beans")
TOWERS = tuple(f"owner/{name}" for name in NAMES)
CLASSES = ("first", "second", "third")
WORDS = {name: f"class {i}" for i, name in enumerate(CLASSES)}  # of the tiny tokenizer


@pytest.mark.parametrize(("short", "backbone", "count"), SUITES)
def test_every_suite_names_all_that_it_misses(
    tmp_path, monkeypatch, capsys, short, backbone, count
):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    module = importlib.import_module(f"configs.vit_{short}_{count}")
    config = module.get_config()
    config.experts.root = str(tmp_path / "checkpoints")
    config.data_sets.root = str(tmp_path / "data")
    assert config.name == f"vit_{short}_{count}" and f"configs/{config.name}.py" in module.__doc__
    assert config.tasks == tuple(data.DATA_SETS)[:count]
    assert config.data.max_test is None and config.offsets.rank == 256
    assert len(set(config.experts.repositories)) == count
    lines = preflight.missing(command_line.as_dict(config))
    for task, repository in zip(config.tasks, config.experts.repositories, strict=True):
        assert f"clip-vit-{backbone}_{task}".replace("fashion-", "fashion_") in repository
        assert sum(f"tasks: {task}: no data in" in line for line in lines) == 1
        assert sum(f"{repository}: no snapshot" in line for line in lines) == 1
    assert sum(f"openai/clip-vit-{backbone}: no snapshot" in line for line in lines) == 1
    assert len(lines) == 2 * count + 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        train.dry_run(command_line.as_dict(config), tmp_path / "workdir")
    assert stopped.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-4] == lines
    assert [line.split(":")[0] for line in printed[-4:]] == ["model", "disk", "memory", "time"]


def small_config(root, names=NAMES):
    config = common.vision_suite("small", "base-patch32", 8)
    tested = tiny.get_config()
    for part in ("identifier", "evaluate", "offsets"):
        config[part] = tested[part]
    config.tasks = names
    config.data.max_train = 60
    config.experts.root = str(root)
    config.experts.pretrained = "owner/base"
    config.experts.repositories = TOWERS
    config.data_sets.root = str(root / "data")
    config.offsets.rank = 4
    return config


@pytest.fixture
def data_sets(monkeypatch):
    """Three of the data sets with the classes and words of the stand-ins."""
    for name in NAMES:
        changes = {"num_classes": 3, "readable": WORDS, "templates": ("a photo of {}.", "{}")}
        spec = dataclasses.replace(registry.DATA_SETS[name], **changes)
        monkeypatch.setitem(registry.DATA_SETS, name, spec)


def write(root, source):
    """The three data sets; the first two as folders, the last in the layout of the source."""
    stand_ins.write_folder(root / "cats-dogs", CLASSES, 40)
    for seed, split in enumerate(("seg_train", "seg_test")):
        stand_ins.write_folder(root / "intel-images" / split / split, CLASSES, 30, 100 * seed)
    counts = {"train": 30, "validation": 5, "test": 10}
    if source == "array_record":
        stand_ins.write_tfds(root, "beans", CLASSES, counts)
    elif source == "parquet":
        stand_ins.write_parquet(root / "beans", CLASSES, counts)
    else:
        for seed, (split, count) in enumerate(counts.items()):
            stand_ins.write_folder(root / "beans" / split, CLASSES, count, 1000 * seed)


@pytest.mark.parametrize("source", ["folder", "array_record", "parquet"])
def test_run_on_stand_ins(tmp_path, data_sets, source):
    clip_snapshots(tmp_path, TOWERS)
    write(tmp_path / "data", source)
    config = small_config(tmp_path)
    config.data_sets.workers = 2
    settings = command_line.as_dict(config)
    with tiny.world(tmp_path / "cache"):
        assert preflight.missing(settings) == []
        results = train.train(config, tmp_path / "workdir")
        settings["data_sets"]["workers"] = 0  # what is compared with is decoded by threads
        backbone, tasks = experiment.load(settings)
    assert results["tasks"] == list(NAMES)
    located = huggingface.locate(settings, offline=True)
    experts, _ = huggingface.open_experts(located, backbone)
    heads = huggingface.zero_shot_heads(located.pretrained, tasks, ())
    given = huggingface.zero_shot_heads(located.pretrained, tasks, ("{}",))
    for index, task in enumerate(tasks):
        assert task.classes == ("class 0", "class 1", "class 2")
        test = task.splits["test"]
        pixels = {"image": np.asarray(test["image"])}  # all at once, and as an array
        features = recovery.run(backbone.model, experts.expert_params(index), pixels, 32)
        predictions = recovery.logits(heads[task.name], features).argmax(axis=1)
        accuracy = float((predictions == test["label"]).mean())
        assert results["individual"][task.name] == pytest.approx(accuracy, abs=1e-6)
        other = np.asarray(given[task.name]["kernel"])
        assert not np.allclose(heads[task.name]["kernel"], other, atol=1e-4)
    rows = {(row["method"], row["task_known"], row["head_known"]) for row in results["rows"]}
    assert ("retex", True, True) in rows and ("retex", False, False) in rows
    mixed = protocols.mixed_test(tasks, 0)
    assert isinstance(mixed["image"], data.Images)
    assert len(mixed["image"]) == sum(len(task.splits["test"]["label"]) for task in tasks)


def test_damaged_data_stop_a_run_before_any_work(tmp_path, data_sets):
    clip_snapshots(tmp_path, TOWERS)
    write(tmp_path / "data", "folder")
    broken = tmp_path / "data/beans/test/third/third_1.png"
    broken.write_bytes(b"none")
    config = small_config(tmp_path)
    with tiny.world(tmp_path / "cache"), pytest.raises(ValueError, match=r"third_1\.png"):
        train.train(config, tmp_path / "workdir")
    assert not (tmp_path / "workdir/results.json").exists()


def test_text_models_take_no_images(tmp_path):
    settings = tiny.settings_with(("model.name", "minilm_l6"), ("model.options", {}))
    settings["tasks"] = ("mnist",)
    settings["data_sets"]["root"] = str(tmp_path)
    with pytest.raises(ValueError, match=r"tasks: \['mnist'\] do not suit model.name 'minilm_l6'"):
        preflight.check(settings, evaluates=False)
