"""Every vision suite of the papers at a reduced size: from data sets and snapshots, as published, to a table.

Each data set lies in the layout of its own source. One suite has experts that are fine-tuned here.
"""

import dataclasses
import importlib
import json
from functools import partial

import numpy as np
import pytest
import stand_ins
import tiny
from tiny_snapshots import clip_snapshots

from configs import finetune_clip
from retex_jax import command_line, evaluate, finetune_snapshot, preflight, train
from retex_jax.data import registry

CLASSES = ("first", "second", "third")
WORDS = {name: f"class {i}" for i, name in enumerate(CLASSES)}  # of the tiny tokenizer
SUITES = [
    *(f"vit_b32_{count}" for count in (8, 14, 20, 30)),
    *(f"vit_b16_{count}" for count in (8, 14, 20)),
    *(f"vit_l14_{count}" for count in (8, 14, 20)),
]


def tinted(pixels, tint, *args):
    """An image with a tint that tells its data set, as its grey tells its class."""
    return np.clip(pixels(*args) + tint, 0, 255).astype(np.uint8)


def write(root, spec, source):
    """A data set in the layout of tensorflow-datasets, of the hub, or as folders."""
    trained, tested = spec.splits(source) if source else (("train",), ("test",))
    counts = {split: 16 for split in trained} | {split: 6 for split in tested}
    if source == "tfds":
        name, _, configuration = spec.tfds.partition("/")
        stand_ins.write_tfds(root, name, CLASSES, counts, configuration or None)
    elif source == "hub":
        configuration = spec.hub.partition(":")[2] or "default"
        stand_ins.write_parquet(root / spec.name, CLASSES, counts, configuration)
    else:
        for seed, (split, count) in enumerate(counts.items()):
            stand_ins.write_folder(root / spec.name / split, CLASSES, count, 1000 * seed)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """All thirty data sets with three classes, from tensorflow-datasets and the hub in turn where both have it."""
    root = tmp_path_factory.mktemp("data")
    changes = {"num_classes": 3, "readable": WORDS, "templates": ("a photo of {}.",)}
    rng, pixels = np.random.default_rng(0), stand_ins.pixels
    with pytest.MonkeyPatch.context() as patch:
        for index, (name, spec) in enumerate(list(registry.DATA_SETS.items())):
            patch.setitem(registry.DATA_SETS, name, dataclasses.replace(spec, **changes))
            tint = rng.integers(-50, 50, 3)
            patch.setattr(stand_ins, "pixels", partial(tinted, pixels, tint))
            sources = [source for source in ("tfds", "hub") if getattr(spec, source)]
            write(root, spec, sources[index % len(sources)] if sources else "")
        yield root


def reduced(name, root, data_root, *experts):
    """A suite's experiment, as it is but for its size."""
    config = importlib.import_module(f"configs.{name}").get_config(*experts)
    tested = tiny.get_config()
    config.identifier, config.evaluate = tested.identifier, tested.evaluate
    config.identifier.num_calibration = 16
    config.experts.root = str(root)
    config.data_sets.root = str(data_root)
    config.baselines = {"weight_average": {}}
    config.offsets.rank = 16
    config.offsets.budget = 1e6  # bytes, enough for every rank
    config.offsets.sharing = "separate"
    return config


def check(config, workdir, results, capsys):
    """What holds of every run: offsets of every rank hold each expert, and the table names every task."""
    individual, count = results["individual"], len(config.tasks)
    known, own_head, nothing = (row for row in results["rows"] if row["method"] == "retex")
    assert list(individual) == list(config.tasks)
    assert known["accuracy"] == pytest.approx(individual, abs=1e-6)
    assert own_head["identification_accuracy"] > 2 / count
    assert set(nothing["accuracy"]) == set(individual)
    evaluate.print_results(list(config.tasks), individual, results["rows"])
    shown = (capsys.readouterr().out, (workdir / "report.html").read_text())
    assert all(task in text for text in shown for task in config.tasks)


@pytest.mark.parametrize("name", SUITES)
def test_suite_runs(tmp_path, data_root, capsys, name):
    config = reduced(name, tmp_path, data_root)
    clip_snapshots(tmp_path, config.experts.repositories, config.experts.pretrained)
    with tiny.world(tmp_path / "cache"):
        assert preflight.missing(command_line.as_dict(config)) == []
        results = train.train(config, tmp_path / "workdir")
    assert len(results["individual"]) == int(name.rpartition("_")[2])
    check(config, tmp_path / "workdir", results, capsys)


def test_suite_of_experts_that_are_fine_tuned_here(tmp_path, data_root, capsys):
    clip_snapshots(tmp_path, (), "openai/clip-vit-base-patch32")
    config = reduced("vit_b32_8", tmp_path, data_root, "own")
    config.tasks, config.experts.repositories = config.tasks[5:], config.experts.repositories[5:]
    spec = finetune_clip.get_config()
    spec.experts.root, spec.data_sets.root = str(tmp_path), str(data_root)
    spec.model.options = {}  # float32, as the suite has it
    spec.finetune.update(
        steps=24, batch_size=16, learning_rate=3e-3, warmup=2.0, checkpoint_every=24
    )
    records = {}
    with tiny.world(tmp_path / "cache"):
        for task in config.tasks:
            spec.task = task
            folder = finetune_snapshot.run(command_line.as_dict(spec))
            records[task] = json.loads((folder / finetune_snapshot.RECORD).read_text())["accuracy"]
        results = train.train(config, tmp_path / "workdir")
    reached = {task: record["fine_tuned"]["test"] for task, record in records.items()}
    before = [record["pretrained"]["test"] for record in records.values()]
    assert results["individual"] == pytest.approx(
        reached, abs=0.1
    )  # they were fine-tuned in bfloat16
    assert np.mean(list(reached.values())) > max(0.8, np.mean(before) + 0.3)
    check(config, tmp_path / "workdir", results, capsys)
