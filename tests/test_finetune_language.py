"""Classifiers of texts: fine-tuned from a snapshot, and taken by the suite's configuration as its experts."""

import copy
import importlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import language_stand_ins as stand_ins
import numpy as np
import pytest
import tiny
from tiny_snapshots import kill_at

from retex_jax import (
    command_line,
    estimate,
    evaluate,
    finetune,
    finetune_snapshot,
    finetune_steps,
    models,
    train,
    trainable,
)
from retex_jax.convert.architectures import load

pytest.importorskip("pyarrow")

LENGTH = 16  # of all texts, so that few programs are compiled
SUITES = {
    "roberta": ("roberta_base_glue8", ("cola", "mrpc", "stsb"), ()),
    "gpt2": ("gpt2_glue7", ("cola",), ("rte",)),
}
"""The suite, the tasks whose experts are made here, and those whose experts are public."""


def telling_rows(rows, task, split, count):
    """Rows whose first text ends with a word that tells the label."""
    made = rows(task, split, count)
    column = stand_ins.GLUE[task][0][0]
    most = max(1, max(made["label"]))
    told = ["Answer" if 2 * label >= most else "Passage" for label in made["label"]]
    return {**made, column: [f"{a} {b}" for a, b in zip(made[column], told, strict=True)]}


def suite_of(kind, root, tasks, *experts):
    """The suite on some of its tasks; `experts` as its experiment file takes them."""
    config = stand_ins.small(SUITES[kind][0], root, *experts)
    places = [config.tasks.index(task) for task in tasks]
    config.model.max_length = LENGTH
    config.experts.repositories = tuple(config.experts.repositories[i] for i in places)
    config.tasks = tuple(tasks)
    return config


def write(root, kind):
    """The pretrained model, public experts, and the data; the settings of fine-tuning."""
    _, own, public = SUITES[kind]
    stand_ins.write_classifiers(root / "checkpoints", suite_of(kind, root, public))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "glue_rows", partial(telling_rows, stand_ins.glue_rows))
        for task in (*own, *public):  # numbers take more examples than two classes
            stand_ins.write_glue(root / "datasets", (task,), 240 if task == "stsb" else 60)
    config = importlib.import_module(f"configs.finetune_{kind}").get_config()
    config.data_sets.root = str(root / "datasets")
    config.experts.root = str(root / "checkpoints")
    config.model.max_length = LENGTH
    config.model.options = {}
    config.finetune.update(
        epochs=3.0,
        batch_size=32,
        bucket=2,
        learning_rate=1e-2,
        learning_rates={},
        checkpoint_every=2,
    )
    return command_line.as_dict(config)


def changed(spec, **finetune):
    """Settings with other ones of fine-tuning; `task` is the task."""
    other = copy.deepcopy(spec)
    other["task"] = finetune.pop("task", spec["task"])
    other["finetune"].update(finetune)
    return other


@pytest.fixture(scope="module", params=list(SUITES))
def run(request, tmp_path_factory):
    """Experts of a kind, fine-tuned, and the suite trained on them and on public ones."""
    root = tmp_path_factory.mktemp(request.param)
    kind = request.param
    _, own, public = SUITES[kind]
    with tiny.world(root / "cache"):
        spec = write(root, kind)
        folders = {
            task: finetune_snapshot.run(
                changed(spec, task=task, epochs=8.0, batch_size=16, checkpoint_every=20)
            )
            for task in own
        }
        config = suite_of(kind, root, (*own, *public), "own")
        made, given = config.experts.repositories, suite_of(kind, root, public).experts.repositories
        config.experts.repositories = (*made[: len(own)], *given)
        results = train.train(config, root / "workdir")
    return folders, config, results


def test_suite_finds_the_experts_and_measures_the_same(run):
    folders, config, results = run
    for task, folder in folders.items():
        record = json.loads((folder / finetune_snapshot.RECORD).read_text())
        reached = record["accuracy"]["fine_tuned"]["test"]
        assert results["individual"][task] == pytest.approx(reached, abs=1e-6)
        if (
            task != "mrpc"
        ):  # which would take more steps; STS-B has words for two numbers only, so it reaches no 1
            assert reached > max(0.7, record["accuracy"]["pretrained"]["test"])
        of_roberta = {"cola": "matthews", "stsb": "pearson_spearman"}
        metrics = of_roberta if "roberta" in config.experts.pretrained else {}
        assert record["metric"] == metrics.get(task, "accuracy")


def test_suite_recovers_and_identifies_them(run, capsys):
    _, config, results = run
    known, own_head, nothing = (row for row in results["rows"] if row["method"] == "retex")
    assert known["accuracy"] == pytest.approx(results["individual"], abs=1e-3)
    for row in (own_head, nothing):
        assert 0 <= row["identification_accuracy"] <= 1
    evaluate.print_results(list(config.tasks), results["individual"], results["rows"])
    printed = capsys.readouterr().out
    assert all(task in printed for task in config.tasks)


def test_expert_is_a_whole_snapshot(run):
    folders, config, _ = run
    for task, folder in folders.items():
        expert = load(folder)
        assert expert.architecture.name.endswith("ForSequenceClassification")
        assert expert.model.num_labels == stand_ins.GLUE[task][1]
        assert {leaf.dtype for leaf in jax.tree.leaves(expert.params)} == {np.dtype(np.float32)}
        assert (folder / "tokenizer.json").is_file()
        pad = 1 if "roberta" in config.experts.pretrained else 0
        assert expert.hf_config["pad_token_id"] == pad


@pytest.fixture
def roberta(tmp_path):
    with tiny.world(tmp_path / "cache"):
        yield write(tmp_path, "roberta")


@pytest.mark.slow  # tests/test_finetune_snapshot.py has the same of the loop
def test_interrupted_run_goes_on(roberta, tmp_path, monkeypatch):
    """To the bit, with the best parameters so far."""
    whole = finetune_snapshot.run(roberta).rename(tmp_path / "whole")
    calls = kill_at(monkeypatch, finetune_steps, "train_step", 4)
    with pytest.raises(KeyboardInterrupt):
        finetune_snapshot.run(roberta)
    resumed = finetune_snapshot.run(roberta)
    assert len(calls) == 4 + 4  # 54 examples are 6 steps of 32 in three passes; from step 3
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_best_parameters_are_kept(roberta, tmp_path):
    start = trainable.load(roberta, tmp_path / "checkpoints/FacebookAI/roberta-base")
    scores, seen = [0.1, 0.9, 0.9], []

    def measure(params):
        seen.append(params)
        return scores[len(seen) - 1]

    keywords = finetune_snapshot.keywords(roberta)
    found = finetune_steps.finetune(
        *start[:4], tmp_path / "unfinished", **{**keywords, "measure": measure}
    )
    assert len(seen) == len(scores)
    jax.tree.map(np.testing.assert_array_equal, found, seen[1])
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, seen[1:3]), strict=True))


def test_head_is_drawn_as_transformers_does(roberta, tmp_path):
    start = trainable.load(roberta, tmp_path / "checkpoints/FacebookAI/roberta-base")
    dense, out = (start.params["head"][name] for name in ("dense", "out_proj"))
    assert dense["kernel"].shape == (16, 16) and out["kernel"].shape == (16, 2)
    assert 0.015 < np.std(dense["kernel"]) < 0.025
    assert not np.any(dense["bias"]) and not np.any(out["bias"])


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_loss_is_that_of_the_classifier(roberta, tmp_path, task):
    """In parts and whole; by the classifier as a module, in float64 from its outputs on."""
    pretrained = tmp_path / "checkpoints/FacebookAI/roberta-base"
    start = trainable.load(changed(roberta, task=task), pretrained)
    batch = {name: array[:8] for name, array in start.task.splits["train"].items()}
    num_labels = stand_ins.GLUE[task][1]
    classifier = models.SequenceClassifier(start.model, num_labels, "roberta")
    outputs = np.asarray(classifier.apply({"params": start.params}, batch), np.float64)
    if task == "stsb":
        want = ((outputs[:, 0] - batch["label"]) ** 2).mean()
    else:
        likelihood = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        want = -np.log(likelihood[np.arange(8), batch["label"]]).mean()
    found = []
    for parts in (1, 4):
        divided = {k: x.reshape(parts, -1, *x.shape[1:]) for k, x in batch.items()}
        found.append(finetune_steps.loss_and_gradients(start.model, start.params, {}, divided))
        assert float(found[-1][0]) == pytest.approx(want, rel=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0][1]["head"])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def learning_rates(schedule, warmup_steps, steps, decay_vectors=True):
    """What AdamW moves a matrix and a vector by under a constant gradient, which is the learning rate."""
    optimizer = finetune_steps.make_optimizer(
        learning_rate=0.1,
        weight_decay=0.0,
        decay_vectors=decay_vectors,
        schedule=schedule,
        warmup_steps=warmup_steps,
        steps=steps,
    )
    params = {"matrix": jnp.zeros((1, 1))}
    state = optimizer.init(params)
    rates = []
    for _ in range(steps):
        updates, state = optimizer.update({"matrix": jnp.full((1, 1), 0.5)}, state, params)
        rates.append(-float(updates["matrix"][0, 0]))
    return rates


@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules(warmup):
    steps = np.arange(10)
    rest = (steps - warmup) / (10 - warmup)
    ramp = np.where(steps < warmup, steps / max(warmup, 1), 1)
    linear = np.where(steps < warmup, ramp, 1 - rest)
    cosine = np.where(steps < warmup, ramp, (1 + np.cos(np.pi * rest)) / 2)
    for schedule, want in (("linear", linear), ("cosine", cosine)):
        np.testing.assert_allclose(learning_rates(schedule, warmup, 10), 0.1 * want, atol=1e-6)


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_decay_of_vectors(decay_vectors):
    optimizer = finetune_steps.make_optimizer(
        learning_rate=0.1,
        weight_decay=0.5,
        decay_vectors=decay_vectors,
        schedule="linear",
        warmup_steps=0,
        steps=10,
    )
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05, atol=1e-7)
    np.testing.assert_allclose(updates["vector"], -0.05 * decay_vectors, atol=1e-7)


def test_recipes():
    roberta, gpt2 = (
        importlib.import_module(f"configs.finetune_{name}").get_config()
        for name in ("roberta", "gpt2")
    )
    mrpc = command_line.as_dict(roberta) | {"task": "mrpc"}
    assert finetune_snapshot.keywords(mrpc)["learning_rate"] == 5e-5
    assert finetune_snapshot.keywords(command_line.as_dict(roberta))["learning_rate"] == 1e-5
    assert finetune_snapshot.keywords(command_line.as_dict(gpt2))["learning_rate"] == 5e-5
    assert finetune_steps.length(7_696, 16, 0, 10.0) == 4_810
    assert finetune_steps.length(7_696, 16, 12, 10.0) == 12
    assert finetune_steps.warmup_length(4_810, 0.06) == 289
    assert finetune_steps.warmup_length(2_000, 200.0) == 200


def test_all_problems_are_listed(roberta, tmp_path):
    (tmp_path / "checkpoints/FacebookAI/roberta-base/tokenizer.json").unlink()
    spec = changed(
        roberta,
        task="dtd",
        epochs=0.0,
        bucket=0,
        schedule="step",
        warmup=1.5,
        learning_rates={"mrpc": 0.0},
    )
    spec["language"]["metrics"] = {"dots": "accuracy"}
    spec["model"]["max_length"] = 25
    with pytest.raises(ValueError, match="'finetune_roberta' cannot run as it is") as error:
        finetune_snapshot.run(spec)
    for part in (
        "task: got 'dtd', expected a task of texts with classes or numbers",
        "tasks: dtd: no data in",
        "finetune.steps: got 0 and epochs 0.0",
        "finetune.bucket: got 0, expected 1 or more",
        "finetune.schedule: got 'step', expected one of ('cosine', 'linear')",
        "finetune.warmup: got 1.5",
        "finetune.learning_rates.mrpc: got 0.0",
        "language.metrics.dots: no language task",
        "model.max_length: got 25, expected at most the model's 24",
        "tokenizer.json: no such file",
    ):
        assert str(error.value).count(part) == 1, part


def test_dry_run_of_what_is_whole(roberta, capsys):
    with pytest.raises(SystemExit) as stopped:
        finetune.dry_run(roberta)
    printed = capsys.readouterr().out
    assert (stopped.value.code, "is here" in printed) == (0, True)
    assert "\nmodel: " in printed and "\ntime: " in printed


@pytest.mark.parametrize(
    ("name", "pretrained", "data_set", "parameters"),
    [
        ("clip", "openai/clip-vit-base-patch32", "tfds build sun397/", "87,456,000"),
        (
            "roberta",
            "FacebookAI/roberta-base",
            "nyu-mll/glue --repo-type dataset --include 'cola/*'",
            "124,055,040",
        ),
        (
            "gpt2",
            "openai-community/gpt2",
            "nyu-mll/glue --repo-type dataset --include 'cola/*'",
            "124,439,808",
        ),
    ],
)
def test_dry_run_names_all_that_is_missing(
    tmp_path, monkeypatch, capsys, name, pretrained, data_set, parameters
):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    config = importlib.import_module(f"configs.finetune_{name}").get_config()
    config.experts.root = str(tmp_path / "checkpoints")
    config.data_sets.root = str(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        finetune.dry_run(command_line.as_dict(config))
    printed = capsys.readouterr().out
    assert stopped.value.code == 1
    assert f"hf download {pretrained} --local-dir {tmp_path}/checkpoints/{pretrained}" in printed
    assert data_set in printed
    assert f"\nmodel: {parameters} parameters" in printed
    for what in ("\ndisk: ", "\nmemory: about ", "\ntime: "):
        assert what in printed
    assert not list(tmp_path.iterdir())


def test_model_without_a_classifier_is_refused(roberta, tmp_path):
    path = tmp_path / "checkpoints/FacebookAI/roberta-base/config.json"
    path.write_text(json.dumps({"model_type": "dinov2", "architectures": ["Dinov2Model"]}))
    [line] = finetune_snapshot.problems(roberta)
    assert "model_type 'dinov2' has no sequence classifier here" in line
