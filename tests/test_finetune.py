import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from retex_jax import (
    artifact,
    data,
    experiment,
    finetune,
    logging,
    metrics,
    preemption,
    probe,
    recovery,
    tree,
)
from retex_jax.experts import read_safetensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


def settings_of(run):
    return experiment.finetune_settings(run.settings)


# The optimiser


def test_backbone_and_head_have_rates_of_their_own_and_decay_spares_vectors():
    """Adam's step of a constant gradient is the learning rate; the decay comes on top."""
    params = {
        "backbone": {"w": jnp.full((2, 3), 2.0), "scale": jnp.full(3, 2.0)},
        "head": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.full(2, 2.0)},
    }
    optimizer = finetune.make_optimizer(
        learning_rate=0.01, head_learning_rate=0.1, weight_decay=0.5, warmup_steps=2, steps=6
    )
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    gradients = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e-2, "f4"), params)
    shares = [0, 0.5, 1, *((1 + np.cos(np.pi * np.array([1, 2, 3]) / 4)) / 2)]
    for share in shares:
        updates, state = update(gradients, state, params)
        for part, peak in (("backbone", 0.01), ("head", 0.1)):
            for leaf in updates[part].values():
                decay = 0.5 * 2.0 if leaf.ndim > 1 else 0.0
                np.testing.assert_allclose(leaf, -peak * share * (1 + decay), rtol=1e-4, atol=1e-9)


def test_gradients_are_clipped_over_the_whole_model():
    params = {"backbone": {"w": jnp.zeros((3, 4))}, "head": {"kernel": jnp.zeros((4, 1))}}
    options = {"weight_decay": 0.0, "warmup_steps": 0, "steps": 9}
    optimizer = finetune.make_optimizer(learning_rate=1e-2, head_learning_rate=1e-2, **options)
    state = jax.jit(optimizer.init)(params)
    big = jax.tree.map(lambda leaf: np.full(leaf.shape, 100.0, "f4"), params)
    _, state = jax.jit(optimizer.update)(big, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in ((3, 4), (4, 1))]
    first = [np.asarray(leaf) for leaf in moments if leaf.max() > 1e-2]
    assert len(first) == 2
    for leaf in first:  # 0.1 of the clipped gradient, whose norm over all 16 entries is 1
        np.testing.assert_allclose(leaf, 0.1 / 4, rtol=1e-4)


# What is written


def test_experts_are_written_with_their_records(run):
    assert {path.name for path in run.experts.iterdir()} == {
        ".lock",
        "experts.json",
        "pretrained.safetensors",
        *(f"{name}.{kind}" for name in tiny.NAMES for kind in ("json", "safetensors")),
    }
    pretrained = tree.flatten(read_safetensors(run.experts / "pretrained.safetensors"))
    for name, leaf in tree.flatten(run.backbone.params).items():
        np.testing.assert_array_equal(pretrained[name], leaf)
    for task in run.tasks:
        record = json.loads((run.experts / f"{task.name}.json").read_text())
        assert record["task"] == task.name
        assert record["classes"] == list(task.classes)
        assert record["examples"] == {"train": 136, "val": 24, "test": 80}
        assert set(record["accuracy"]) == {"val", "val_balanced", "test", "test_balanced"}
        assert set(record["linear_probe"]) == {"val", "test"}
        assert record["seconds"] > 0
        expert = tree.flatten(read_safetensors(run.experts / f"{task.name}.safetensors"))
        assert expert.keys() == {*pretrained, "head/kernel", "head/bias"}
        assert expert["head/kernel"].shape == (16, 3)
        moved = [name for name in pretrained if (expert[name] != pretrained[name]).any()]
        assert set(moved) == set(pretrained)


def test_records_tell_what_the_expert_reaches(run):
    for task in run.tasks:
        record = json.loads((run.experts / f"{task.name}.json").read_text())
        params = read_safetensors(run.experts / f"{task.name}.safetensors")
        head = params.pop("head")
        for split in ("val", "test"):
            arrays = task.splits[split]
            features = recovery.run(run.backbone.model, params, arrays, 16)
            right = (features @ head["kernel"] + head["bias"]).argmax(1) == arrays["label"]
            assert record["accuracy"][split] == np.mean(right)
            by_class = [right[arrays["label"] == c].mean() for c in range(3)]
            assert record["accuracy"][f"{split}_balanced"] == pytest.approx(np.mean(by_class))


def test_linear_probe_reads_the_pretrained_model(run):
    task = run.tasks[0]
    record = json.loads((run.experts / f"{task.name}.json").read_text())
    assert finetune.linear_probe(run.backbone, task, 16)[1] == record["linear_probe"]
    assert record["linear_probe"]["test"] > 0.5
    blind = jax.tree.map(jnp.zeros_like, run.backbone.params)
    _, found = finetune.linear_probe(run.backbone._replace(params=blind), task, 16)
    assert found["test"] < 0.5


def test_training_reads_no_test_data_and_leaves_the_pretrained_model(run, tmp_path):
    """Other test and validation data give the same expert, bit by bit; the donated state is a copy."""
    before = jax.tree.map(np.array, run.backbone.params)
    task = run.tasks[0]
    splits = {**task.splits, "test": run.tasks[1].splits["test"], "val": task.splits["test"]}
    other = data.Task(task.name, task.classes, splits, "", "")
    finetune.finetune(run.backbone, other, tmp_path, **settings_of(run))
    first = (run.experts / "dots.safetensors").read_bytes()
    assert (tmp_path / "dots.safetensors").read_bytes() == first
    assert not (tmp_path / ".unfinished" / "dots").exists()
    jax.tree.map(np.testing.assert_array_equal, before, run.backbone.params)


def test_regression_is_fitted_by_its_numbers(run, tmp_path):
    """A task whose labels are the brightness of the picture: the expert's correlation is that of its outputs."""
    rng, splits = np.random.default_rng(0), {}
    for name, split in run.tasks[0].splits.items():
        light = rng.uniform(0.2, 1, (len(split["image"]), 1, 1, 1))
        image = (split["image"] * light).astype(np.uint8)
        splits[name] = {"image": image, "label": image.mean((1, 2, 3)).astype("f4") / 50}
    task = data.Task("bright", (), splits, "", "", metric="pearson_spearman")
    record = finetune.finetune(run.backbone, task, tmp_path, **settings_of(run))
    assert set(record["accuracy"]) == {"val", "test"}
    params = read_safetensors(tmp_path / "bright.safetensors")
    head = params.pop("head")
    assert head["kernel"].shape == (16, 1)
    outputs = recovery.run(run.backbone.model, params, splits["test"], 16) @ head["kernel"]
    want = metrics.score("pearson_spearman", outputs + head["bias"], splits["test"]["label"])
    assert record["accuracy"]["test"] == pytest.approx(want, abs=1e-5)
    assert record["accuracy"]["test"] > 0.9


def test_loss_of_numbers_is_the_squared_error():
    outputs = jnp.array([[1.0], [3.0]])
    assert float(probe.mean_loss(outputs, jnp.array([2.0, 5.0]))) == pytest.approx((1 + 4) / 2)
    logits = jnp.array([[0.0, 0.0], [0.0, np.log(3)]])
    want = -(np.log(1 / 2) + np.log(3 / 4)) / 2
    assert float(probe.mean_loss(logits, jnp.array([0, 1]))) == pytest.approx(want, rel=1e-5)


# Interrupted, repeated, broken


def test_loss_that_is_not_finite_stops_with_the_step(run, tmp_path, monkeypatch):
    real, calls = finetune.train_step, []

    def poisoned(model, settings, state, batch):
        calls.append(1)
        state, loss = real(model, settings, state, batch)
        return state, loss if len(calls) < 11 else loss * jnp.nan

    monkeypatch.setattr(finetune, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"dots: the loss is nan at step 11;") as error:
        finetune.finetune(run.backbone, run.tasks[0], tmp_path, **settings_of(run))
    assert "learning_rate = 0.003" in str(error.value)
    assert len(calls) == 11
    assert [path.name for path in (tmp_path / ".unfinished/dots").iterdir()] == ["8"]
    assert not list(tmp_path.glob("*.safetensors"))


def test_sigterm_saves_the_step_and_the_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    real, calls = finetune.train_step, []

    def preempted(*args):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_step", preempted)
        with pytest.raises(preemption.Preempted, match="dots is saved at step 5 of 24") as error:
            finetune.finetune(run.backbone, run.tasks[0], tmp_path, **settings_of(run))
    assert (error.value.code, len(calls)) == (75, 5)
    assert [path.name for path in (tmp_path / ".unfinished/dots").iterdir()] == ["5"]
    finetune.finetune(run.backbone, run.tasks[0], tmp_path, **settings_of(run))
    first = (run.experts / "dots.safetensors").read_bytes()
    assert (tmp_path / "dots.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bars.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has changed since"),
        ("bars.json", lambda data: data.replace(b'"test": 80', b'"test": 81'), "content hash"),
        ("bars.json", lambda data: data[:50], "is damaged"),
        ("bars.json", lambda data: b"[]", "is not the record of an expert"),
        ("bars.json", lambda data: b"[" * 100_000, "nested too deeply"),
        ("experts.json", lambda data: b"[3]", r"holds the experts of \[3\]"),
    ],
)
def test_damaged_experts_are_named(run, tmp_path, name, change, message):
    root = tmp_path / "experts"
    shutil.copytree(run.experts, root)
    before = (root / name).read_bytes()
    (root / name).write_bytes(change(before))
    assert (root / name).read_bytes() != before
    with pytest.raises(ValueError, match=message):
        finetune.build_experts(
            run.backbone, run.tasks, root, settings_of(run), checkpoint_set=run.experts.name
        )


def test_only_missing_experts_are_made(run, tmp_path, monkeypatch):
    root = tmp_path / "experts"
    shutil.copytree(run.experts, root)
    (root / "bars.json").unlink()
    assert experiment.missing_experts(root, tiny.NAMES) == ["bars"]
    made, new = [], {"accuracy": {}, "linear_probe": {}}

    def record(backbone, task, directory, **settings):
        made.append(task.name)
        assert settings == settings_of(run)
        artifact.write_json(directory / f"{task.name}.json", new)

    monkeypatch.setattr(finetune, "finetune", record)
    records = finetune.build_experts(
        run.backbone, run.tasks, root, settings_of(run), checkpoint_set=run.experts.name
    )
    assert made == ["bars"]
    assert list(records) == list(tiny.NAMES)
    assert records["bars"] == new
    assert records["dots"] == json.loads((run.experts / "dots.json").read_text())


def test_finished_experts_can_be_read_while_another_run_holds_the_folder(run):
    """Two runs that share finished experts do not stop each other."""
    with logging.WorkdirLock(run.experts):
        records = finetune.build_experts(
            run.backbone, run.tasks, run.experts, settings_of(run), checkpoint_set=run.experts.name
        )
    assert list(records) == list(tiny.NAMES)


def test_unfinished_experts_of_other_tasks_are_kept(run, tmp_path):
    """Another experiment with the same experts may have been killed while it made them."""
    root = tmp_path / "experts"
    shutil.copytree(run.experts, root)
    (root / ".unfinished/circles/8").mkdir(parents=True)
    finetune.build_experts(
        run.backbone, run.tasks, root, settings_of(run), checkpoint_set=run.experts.name
    )
    assert (root / ".unfinished/circles/8").is_dir()


def test_experts_in_the_making_are_locked(run, tmp_path):
    with logging.WorkdirLock(tmp_path), pytest.raises(RuntimeError, match="in use by another run"):
        finetune.build_experts(
            run.backbone, run.tasks, tmp_path, settings_of(run), checkpoint_set="any"
        )
