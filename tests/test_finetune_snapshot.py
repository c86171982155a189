"""Fine-tuning of snapshots on the example of CLIP: from a snapshot and a data set to a snapshot."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins
import tiny
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tiny_snapshots import clip_snapshots, kill_at

from configs import finetune_clip as configuration
from retex_jax import (
    command_line,
    data,
    finetune,
    finetune_snapshot,
    finetune_steps,
    huggingface,
    recovery,
)
from retex_jax.data import registry

CLASSES = ("first", "second", "third")
NAME = "cats-dogs"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tiny CLIP, and a data set of three classes."""
    words = {name: f"class {i}" for i, name in enumerate(CLASSES)}
    spec = dataclasses.replace(
        registry.DATA_SETS[NAME], num_classes=3, readable=words, templates=("a photo of {}.",)
    )
    monkeypatch.setitem(registry.DATA_SETS, NAME, spec)
    clip_snapshots(tmp_path, ())
    stand_ins.write_folder(tmp_path / "data" / NAME, CLASSES, 24)
    with tiny.world(tmp_path / "cache"):
        yield tmp_path


def settings(root, **finetune):
    config = configuration.get_config()
    config.task = NAME
    config.experts.root = str(root)
    config.experts.pretrained = "owner/base"
    config.data_sets.root = str(root / "data")
    config.finetune.update(
        steps=16, batch_size=16, learning_rate=3e-3, warmup=2.0, checkpoint_every=8
    )
    config.finetune.update(finetune)
    return command_line.as_dict(config)


def loaded(folder, spec):
    """The tower of a snapshot, and the task with its head."""
    located = huggingface.Located(folder, {NAME: folder})
    backbone = huggingface.load_backbone(located, {})
    task = data.load_task(NAME, image_size=8, root=spec["data_sets"]["root"], **spec["data"])
    return backbone, task


def test_setting_of_the_papers():
    spec = command_line.as_dict(configuration.get_config())
    assert spec["finetune"] == {
        "steps": 2000,
        "epochs": 0,
        "batch_size": 128,
        "accumulate": 1,
        "bucket": 1,
        "learning_rate": 1e-5,
        "learning_rates": {},
        "weight_decay": 0.1,
        "decay_vectors": True,
        "schedule": "cosine",
        "warmup": 200,
        "keep_best": False,
        "checkpoint_every": 200,
    }
    assert spec["model"]["options"] == {"dtype": "bfloat16"}


def test_from_snapshot_and_data_to_an_expert(root, monkeypatch, capsys):
    spec = settings(root, accumulate=2)
    folder = finetune_snapshot.run(spec)
    assert folder == root / f"own/base_{NAME}"
    record = json.loads((folder / finetune_snapshot.RECORD).read_text())
    assert record["settings"] == spec
    assert not (folder / ".unfinished").exists()
    backbone, task = loaded(folder, spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(backbone.params)} == {np.dtype(np.float32)}
    head = huggingface.zero_shot_heads(root / "owner/base", [task], ())[NAME]
    model = type(backbone.model)(dataclasses.replace(backbone.model.config, dtype=jnp.bfloat16))
    test = task.splits["test"]
    outputs = recovery.outputs(model, backbone.params, head, test, 64)
    right = float((outputs.argmax(axis=1) == test["label"]).mean())
    assert record["accuracy"]["fine_tuned"]["test"] == pytest.approx(right, abs=1e-6)
    assert right > record["accuracy"]["pretrained"]["test"] + 0.2
    before = (folder / "model.safetensors").stat().st_mtime_ns
    config = SimpleNamespace(value=ConfigDict(spec))
    monkeypatch.setattr(finetune, "_CONFIG", config, raising=False)
    monkeypatch.setattr(finetune, "_DRY_RUN", SimpleNamespace(value=False), raising=False)
    finetune.main()  # it is there
    assert str(folder) in capsys.readouterr().err
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_interrupted_run_goes_on(root, monkeypatch):
    spec = settings(root, steps=5, checkpoint_every=2)
    whole = finetune_snapshot.run(spec)
    want, _ = loaded(whole, spec)
    whole.rename(root / "whole")
    calls = kill_at(monkeypatch, finetune_steps, "train_step", 4)
    with pytest.raises(KeyboardInterrupt):
        finetune_snapshot.run(spec)
    other = copy.deepcopy(spec)
    other["finetune"]["learning_rate"] = 1.0
    with pytest.raises(ValueError, match="begun with other settings"):
        finetune_snapshot.run(other)
    spec["data_sets"]["workers"] = 2  # it was begun by threads, and ends the same
    found, _ = loaded(finetune_snapshot.run(spec), spec)
    assert len(calls) == 4 + 3  # steps 3 to 5
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)


def test_parts_and_devices_change_nothing(root):
    """The loss and the gradients of a whole batch on one device, on eight, and in four parts; in float32."""
    spec = settings(root)
    backbone, task = loaded(root / "owner/base", spec)
    head = huggingface.zero_shot_heads(root / "owner/base", [task], ())[NAME]
    batch = data.materialize(data.take(task.splits["train"], np.arange(16)))
    found = []
    for accumulate, devices in ((1, 1), (1, 8), (4, 1), (2, 8)):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        parts = {k: x.reshape(accumulate, -1, *x.shape[1:]) for k, x in batch.items()}
        placed = jax.device_put(parts, NamedSharding(mesh, P(None, "data")))
        params, frozen = jax.device_put((backbone.params, head), NamedSharding(mesh, P()))
        found.append(
            finetune_steps.loss_and_gradients(
                backbone.model, {"backbone": params}, {"head": frozen}, placed
            )
        )
    features = backbone.model.apply({"params": backbone.params}, batch).pooled
    logits = np.asarray(recovery.apply_head(head, features), np.float64)
    likelihood = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want = -np.log(likelihood[np.arange(16), batch["label"]]).mean()
    assert float(found[0][0]) == pytest.approx(want, abs=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0][1])) > 1e-2
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, found[0])


def test_loss_that_is_not_finite_stops(root):
    with pytest.raises(FloatingPointError, match=rf"{NAME}: the loss is nan at step \d+"):
        finetune_snapshot.run(settings(root, learning_rate=1e30, warmup=0.0))


def test_all_problems_are_listed(root):
    spec = settings(root, batch_size=12, accumulate=0, learning_rate=0.0, warmup=16.0)
    spec |= {"task": "dtd"}
    spec["experts"]["pretrained"] = "owner/none"
    spec["data_sets"]["workers"] = -2
    with pytest.raises(ValueError, match="'finetune_clip' cannot run as it is") as error:
        finetune_snapshot.run(spec)
    for part in (
        "tasks: dtd: no data in",
        "data_sets.workers: got -2, expected -1 or more",
        "finetune.accumulate: got 0, expected 1 or more",
        "finetune.learning_rate: got 0.0",
        "finetune.warmup: got 16.0, expected a fraction below 1",
        "finetune.batch_size: got 12, expected a multiple",
        "owner/none: no snapshot in",
    ):
        assert str(error.value).count(part) == 1, part
    assert any(
        "did you mean 'dtd'" in line for line in finetune_snapshot.problems({**spec, "task": "dtt"})
    )
    spec["experts"]["pretrained"] = "owner/base"
    assert "task: got 'cola', expected a task of images" in finetune_snapshot.problems(
        {**spec, "task": "cola"}
    )
