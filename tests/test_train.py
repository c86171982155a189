import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from retex_jax import (
    artifact,
    command_line,
    experiment,
    experts,
    finetune,
    logging,
    metrics,
    offsets,
    preflight,
    recovery,
    release,
    train,
)
from retex_jax.experts import ExpertSet
from retex_jax.offsets import exact

ROW = {
    "method": str,
    "variant": str,
    "task_known": bool,
    "head_known": bool,
    "needs": str,
    "accuracy": dict,
    "normalized_accuracy": float,
    "worst_normalized_accuracy": float,
    "adr": float,
    "amr": float,
    "bytes_per_task": (int, float),
    "identification_accuracy": (float, type(None)),
    "seconds_fit": float,
    "peak_rss_bytes": int,
}
TOP = {
    "schema": int,
    "commit": str,
    "checkpoint_set": str,
    "seed": int,
    "device": str,
    "tasks": list,
    "individual": dict,
    "rows": list,
    "offsets": dict,
}
OFFSETS = {
    "solver": str,
    "rank": int,
    "residual": float,
    "optimum": float,
    "ratio": float,
    "seconds": float,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


def read(path):
    return json.loads(path.read_text())


def contents(folder):
    """Path to (bytes' hash, modification time) of every file."""
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_types(found, schema):
    for name, kind in schema.items():
        assert type(found[name]) in (kind if isinstance(kind, tuple) else (kind,)), name


def find(rows, method, variant="", known=(True, True)):
    found = [
        row
        for row in rows
        if row["method"] == method
        and variant in row["variant"]
        and (row["task_known"], row["head_known"]) == known
    ]
    assert len(found) == 1
    return found[0]


# What a finished run leaves


def test_results_have_the_schema(run):
    results = read(run.workdir / "results.json")
    names = list(tiny.NAMES)
    assert_types(results, TOP)
    assert results["schema"] == 1
    assert results["tasks"] == names
    assert results["seed"] == run.settings["seed"]
    assert results["device"] == "8 x cpu"
    assert results["checkpoint_set"] == run.experts.name
    assert list(results["individual"]) == names
    assert_types(results["offsets"], OFFSETS)
    assert (results["offsets"]["solver"], results["offsets"]["rank"]) == ("exact", 8)
    assert 1 <= results["offsets"]["ratio"] <= 1.0001
    for row in results["rows"]:
        assert_types(row, ROW)
        assert list(row["accuracy"]) == names
        assert all(type(x) is float and 0 <= x <= 1 for x in row["accuracy"].values())
        assert row["seconds_fit"] > 0
        assert row["peak_rss_bytes"] > 1 << 20
        assert (row["identification_accuracy"] is None) == row["task_known"]
        assert row["needs"]


def test_results_have_one_row_a_method_and_protocol(run):
    rows = [
        (row["method"], row["variant"], row["task_known"], row["head_known"])
        for row in run.results["rows"]
    ]
    assert sorted(rows) == [
        ("retex", "exact r=2", True, True),
        ("retex", "exact r=8", False, False),
        ("retex", "exact r=8", False, True),
        ("retex", "exact r=8", True, True),
        ("task_arithmetic", "scaling=0.3", True, True),
        ("ties", "density=0.2, merge=mean, scaling=1.0", True, True),
        ("weight_average", "", True, True),
    ]


def test_results_are_returned(run):
    assert read(run.workdir / "results.json") == json.loads(json.dumps(run.results))


def test_row_figures_follow_from_its_accuracies_and_bytes(run):
    individual = run.results["individual"]
    tensors = artifact.load(run.workdir).tensors
    model_bytes = sum(x.nbytes for name, x in tensors.items() if name.startswith("merged/"))
    for row in run.results["rows"]:
        accuracy = row["accuracy"]
        ratios = [accuracy[name] / individual[name] for name in individual]
        assert row["normalized_accuracy"] == pytest.approx(np.mean(ratios))
        assert row["worst_normalized_accuracy"] == min(ratios)
        total = sum(accuracy.values()) / sum(individual.values())
        assert row["adr"] == pytest.approx(1 - total)
        assert row["amr"] == pytest.approx(row["bytes_per_task"] / model_bytes)


def test_bytes_are_those_in_the_artifact(run):
    tensors = artifact.load(run.workdir).tensors
    stored = {}
    for name, tensor in tensors.items():
        part = name.split("/")[0]
        stored[part] = stored.get(part, 0) + tensor.nbytes
    offset_bytes = stored["task_embeddings"] + stored["offsets"]
    rows = run.results["rows"]
    assert find(rows, "weight_average")["bytes_per_task"] == 0
    assert find(rows, "retex", "r=8")["bytes_per_task"] == pytest.approx(offset_bytes / 3)
    for head_known in (True, False):
        row = find(rows, "retex", "r=8", (False, head_known))
        assert row["bytes_per_task"] == pytest.approx((offset_bytes + stored["identifier"]) / 3)


def test_merging_loses_and_recovery_restores(run):
    rows = run.results["rows"]
    recovered = find(rows, "retex", "r=8")["normalized_accuracy"]
    assert find(rows, "weight_average")["normalized_accuracy"] < recovered - 0.01
    assert find(rows, "retex", "r=2")["normalized_accuracy"] < recovered
    assert recovered >= 0.99
    known = find(rows, "retex", "r=8", (False, True))
    unknown = find(rows, "retex", "r=8", (False, False))
    for name in tiny.NAMES:
        assert unknown["accuracy"][name] <= known["accuracy"][name]


def test_individual_accuracies_are_those_of_the_experts(run):
    for task in run.tasks:
        tree = experts.read_safetensors(run.experts / f"{task.name}.safetensors")
        head = tree.pop("head")
        test = task.splits["test"]
        features = recovery.run(run.backbone.model, tree, test, 32)
        predictions = np.asarray(features @ head["kernel"] + head["bias"]).argmax(axis=1)
        assert run.results["individual"][task.name] == metrics.accuracy(predictions, test["label"])


def test_every_file_is_there_and_whole(run):
    report = (run.workdir / "report.html").read_text()
    for word in ("<svg", "Identified task", "dots", "rings", "num_calibration"):
        assert word in report
    manifest = read(run.workdir / "manifest.json")
    parts = {name.split("/")[0] for name in manifest["tensors"]}
    assert parts == {
        "merged",
        "task_embeddings",
        "offsets",
        "identifier",
        "heads",
    }
    assert read(run.workdir / "config.json") == run.settings
    lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
    assert {"phase", "step"} <= set(json.loads(lines[0]))
    assert {path.name for path in run.workdir.iterdir()} == {
        ".lock",
        "artifact.safetensors",
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "results.json",
    }


def test_files_can_be_read_by_others(run):
    """A run's folder on a cluster is shared; all files have the mode that the umask gives."""
    umask = os.umask(0)
    os.umask(umask)
    modes = {
        path.name: path.stat().st_mode & 0o777
        for folder in (run.workdir, run.experts)
        for path in folder.iterdir()
        if path.is_file() and path.name != ".lock"
    }
    assert set(modes.values()) == {0o666 & ~umask}


# Running again, and beside others


def test_finished_workdir_can_be_run_again(run, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(run.workdir, workdir)
    for name in ("report.html", "results.json"):
        (workdir / name).unlink()
    experts_before = contents(run.experts)
    with tiny.world(run.cache):
        results = train.train(run.config, workdir)
    assert [row["accuracy"] for row in results["rows"]] == [
        row["accuracy"] for row in run.results["rows"]
    ]
    assert (workdir / "report.html").is_file()
    assert artifact.load(workdir).metadata["variant"] == "exact r=8"
    assert (workdir / "artifact.safetensors").read_bytes() == (
        run.workdir / "artifact.safetensors"
    ).read_bytes()
    unchanged = {name: x for name, x in contents(run.experts).items() if name.name != ".lock"}
    assert unchanged == {name: x for name, x in experts_before.items() if name.name != ".lock"}


def test_workdir_of_another_experiment_is_refused_and_not_touched(run):
    before = contents(run.workdir)
    config = tiny.get_config()
    config.offsets.rank = 7
    config.finetune.learning_rate = 0.5
    with tiny.world(run.cache), pytest.raises(ValueError, match="another experiment") as error:
        train.train(config, run.workdir)
    lines = str(error.value).splitlines()
    assert str(run.workdir) in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "finetune.learning_rate: 0.003 there, 0.5 here",
        "offsets.rank: 8 there, 7 here",
    ]
    assert contents(run.workdir) == before


def test_dry_run_looks_at_the_workdir(run, capsys):
    for steps, code in ((run.settings["finetune"]["steps"], 0), (9, 1)):
        settings = tiny.settings_with(("finetune.steps", steps))
        with tiny.world(run.cache), pytest.raises(SystemExit) as stopped:
            train.dry_run(settings, run.workdir)
        assert stopped.value.code == code
    assert "finetune.steps: 24 there, 9 here" in capsys.readouterr().out


def test_workdir_of_another_version_names_missing_entries(run, tmp_path):
    settings = json.loads(json.dumps(run.settings))
    settings["offsets"]["renamed"] = settings["offsets"].pop("rank")
    artifact.write_json(tmp_path / "config.json", settings)
    with pytest.raises(ValueError, match=r"offsets\.rank: None there, 8 here\n  offsets\.renamed"):
        preflight.check_workdir(run.settings, tmp_path)


def test_workdir_goes_on_with_other_workers(run, tmp_path):
    settings = json.loads(json.dumps(run.settings))
    settings["data_sets"]["workers"] = 3
    artifact.write_json(tmp_path / "config.json", settings)
    preflight.check_workdir(run.settings, tmp_path)


def test_damaged_workdir_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text('{"na')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        preflight.check_workdir(run.settings, tmp_path)


def test_workdir_in_use_is_refused(run, tmp_path):
    with tiny.world(run.cache), logging.WorkdirLock(tmp_path):
        with pytest.raises(RuntimeError, match="in use by another run"):
            train.train(run.config, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_run_that_cannot_start_leaves_nothing(run, tmp_path):
    config = tiny.get_config()
    config.offsets.rank = 99
    workdir = tmp_path / "workdir"
    with tiny.world(tmp_path / "cache"), pytest.raises(ValueError, match=r"offsets\.rank"):
        train.train(config, workdir)
    assert not workdir.exists()
    assert not (tmp_path / "cache").exists()


def test_run_whose_data_cannot_be_read_leaves_the_workdir_free(run, tmp_path, monkeypatch):
    """The settings are corrected and the same command is typed again."""

    def fail(settings, announce=None):
        raise ValueError("SHA-256 expected")

    with tiny.world(tmp_path / "cache"), monkeypatch.context() as patch:
        patch.setattr(experiment, "fetch", fail)
        with pytest.raises(ValueError, match="SHA-256"):
            train.train(run.config, tmp_path / "workdir")
    config = tiny.get_config()
    config.tasks = ("dots",)
    preflight.check_workdir(command_line.as_dict(config), tmp_path / "workdir")


def test_experts_of_other_settings_are_not_taken_for_these(run, tmp_path):
    """With a root of one's own the folder's name does not tell; the experts themselves must."""
    root = tmp_path / "experts"
    shutil.copytree(run.experts, root)
    config = tiny.get_config()
    config.experts.root = str(root)
    config.finetune.steps = 5
    with tiny.world(run.cache), pytest.raises(ValueError, match="experts"):
        train.train(config, tmp_path / "workdir")


def test_unfinished_experts_of_other_settings_are_not_continued(run, tmp_path, monkeypatch):
    """In a root of one's own: what was begun on other data must not be finished on these."""
    root, real, calls = tmp_path / "experts", finetune.train_step, []

    def stop(*given):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*given)

    config = tiny.get_config()
    config.experts.root = str(root)
    with tiny.world(run.cache):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(finetune, "train_step", stop)
            train.train(config, tmp_path / "first")
        assert (root / ".unfinished/dots/8").is_dir()
        config.data.seed = 1
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="experts"):
            patch.setattr(finetune, "train_step", stop)
            train.train(config, tmp_path / "second")
    assert not list(root.glob("dots.*"))


# Unusual experiments


def fit_offsets(run, kind, workdir):
    """The offsets of the run's experts, as `train` fits them."""
    settings = command_line.as_dict(tiny.get_config(kind))
    paths = [run.experts / f"{name}.safetensors" for name in settings["tasks"]]
    experts = ExpertSet.from_safetensors(
        run.experts / "pretrained.safetensors", paths, layout="flax", exclude=["^head/"]
    )
    writer = logging.MetricWriter(workdir)
    with tiny.world(run.cache):
        return train.fit_offsets(settings, experts, jax.random.key(0), writer, workdir)


def test_sigterm_saves_the_adam_fit_and_it_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    whole = fit_offsets(run, "adam", tmp_path / "whole")
    real = logging.MetricWriter.write

    def write(self, step, metrics, *, phase):
        real(self, step, metrics, phase=phase)
        if step == 30:  # no step of a checkpoint
            signal.raise_signal(signal.SIGTERM)

    workdir = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(logging.MetricWriter, "write", write)
        with pytest.raises(SystemExit, match="saved at step 30 of 60") as error:
            fit_offsets(run, "adam", workdir)
    assert error.value.code == 75
    resumed = fit_offsets(run, "adam", workdir)
    for mine, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert offset_rows(workdir) == offset_rows(tmp_path / "whole")


def test_a_killed_exact_fit_goes_on_from_its_finished_leaves(run, tmp_path, monkeypatch):
    whole = fit_offsets(run, "", tmp_path / "whole")
    calls, real = [], exact.add_to_report

    def stop(*args):
        calls.append(1)
        real(*args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    workdir = tmp_path / "stopped"
    monkeypatch.setattr(exact, "add_to_report", stop)
    with pytest.raises(KeyboardInterrupt):
        fit_offsets(run, "", workdir)
    resumed = fit_offsets(run, "", workdir)
    groups = len(calls) - 1
    for mine, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    fit_offsets(run, "", workdir)
    assert len(calls) == groups + 1  # the third group was solved twice, and nothing a third time
    fit_offsets(run, "", tmp_path / "again")
    assert len(calls) == 2 * groups + 1


def test_one_task(run, tmp_path):
    config = tiny.get_config()
    config.tasks = ("dots",)
    config.baselines = {"weight_average": {}}
    config.offsets.extra_ranks = ()
    with tiny.world(run.cache):
        results = train.train(config, tmp_path)
    individual = run.results["individual"]["dots"]
    assert results["individual"] == {"dots": individual}
    assert [row["accuracy"] for row in results["rows"]] == [{"dots": individual}] * 4
    assert find(results["rows"], "retex", known=(False, False))["identification_accuracy"] == 1
    assert results["offsets"]["ratio"] == 1
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "weights",
    [
        {"task_weights": "energy"},
        {"task_weights": "divergence", "leaf_weights": "fisher"},
    ],
)
def test_a_budget_instead_of_a_rank(weights, run, tmp_path):
    config = tiny.get_config()
    config.baselines = {"weight_average": {}}
    config.offsets.extra_ranks = ()
    config.offsets.update(budget=0.3, sharing="auto", orientation="auto", **weights)
    config.offsets.exact.update(bits=4, vector_bits=8)
    with tiny.world(run.cache):
        results = train.train(config, tmp_path)
    row = find(results["rows"], "retex", "budget=0.3")
    assert 0.2 < row["amr"] <= 0.31
    assert results["offsets"]["budget"] == 0.3
    assert results["offsets"]["rank"] is None
    assert "<svg" in (tmp_path / "report.html").read_text()
    loaded = release.load(tmp_path)
    assert offsets.offset_bytes(loaded.state) == pytest.approx(row["bytes_per_task"] * 3)


def test_task_with_too_few_inputs_to_calibrate_on_is_named(run, tmp_path):
    """136 training inputs a task: known once the data are read, long before they are needed."""
    config = tiny.get_config()
    config.identifier.num_calibration = 137
    with tiny.world(run.cache), pytest.raises(ValueError, match=r"num_calibration.*137.*dots"):
        train.train(config, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unknown_optimum_can_be_written(run, tmp_path, value):
    """The range finder knows no optimum, and a ratio to an optimum of 0 is infinite."""
    results = json.loads(json.dumps(run.results))
    results["offsets"].update(optimum=value, ratio=value)
    results["rows"][0]["normalized_accuracy"] = value
    train.write(run.settings, tmp_path, results, run.released, np.eye(3, dtype=int))
    assert read(tmp_path / "results.json")["offsets"]["ratio"] is None


def test_spectra_are_summed_over_blocks():
    class Report:
        spectra = {  # noqa: RUF012
            "block_0/kernel": np.array([9.0, 1.0]),
            "block_1/kernel": np.array([7.0, 3.0]),
            "head_2": np.array([0.0]),
        }

    found = train.grouped_spectra(Report)
    assert list(found) == ["block/kernel"]
    np.testing.assert_allclose(found["block/kernel"], [4.0, 2.0])


# Killed runs


def program(cache, root, workdir, kill=None):
    command = [sys.executable, "tests/tiny.py", "retex_jax.train", "--config=tests/tiny.py:adam"]
    command += [f"--workdir={workdir}", f"--config.experts.root={root}"]
    environment = {**os.environ, "RETEX_CACHE": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("TINY_KILL", None)
    if kill:
        environment["TINY_KILL"] = kill
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return done.stderr


def tensors_of(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"
    }


def offset_rows(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["phase"] == "offsets"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A whole run, and one that is killed while it fine-tunes and again while it fits the offsets."""
    folder = tmp_path_factory.mktemp("killed")
    cache, whole, broken = (folder / name for name in ("cache", "whole", "broken"))
    seen = {}
    first = program(cache, broken / "experts", broken / "run", kill="rings:16")
    seen["after first"] = {str(path.relative_to(broken)) for path in broken.rglob("*")}
    second = program(cache, broken / "experts", broken / "run", kill="unfinished:40")
    seen["after second"] = {str(path.relative_to(broken)) for path in broken.rglob("*")}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(program, cache, whole / "experts", whole / "run")
        third = program(cache, broken / "experts", broken / "run")
        other.result()
    return SimpleNamespace(seen=seen, whole=whole, broken=broken, stderr=[first, second, third])


def test_killed_finetuning_leaves_nothing_that_looks_finished(killed):
    files = killed.seen["after first"]
    assert "experts/.unfinished/rings/8" in files
    assert {"experts/dots.json", "experts/dots.safetensors"} <= files
    assert not {"experts/rings.json", "experts/rings.safetensors", "run/results.json"} & files
    assert "resumed" not in killed.stderr[0]


def test_killed_finetuning_resumes_to_the_same_bits(killed):
    said = killed.stderr[1]
    assert "rings: resumed at step 8" in said
    assert "dots: resumed" not in said
    ours, theirs = (tensors_of(folder / "experts") for folder in (killed.broken, killed.whole))
    assert ours.keys() == {f"{x}.safetensors" for x in ("dots", "rings", "pretrained")}
    assert ours == theirs
    assert "experts/.unfinished" not in killed.seen["after second"]


def test_killed_fit_leaves_nothing_that_looks_finished(killed):
    files = killed.seen["after second"]
    assert "run/unfinished/20" in files
    assert "run/unfinished/40" not in files
    names = {"results.json", "artifact.safetensors", "manifest.json", "report.html"}
    assert not {f"run/{name}" for name in names} & files


def test_killed_fit_says_that_it_resumes(killed):
    assert "resumed at step 20" in killed.stderr[2]
    assert "resumed at step 20" not in killed.stderr[1]


def test_killed_fit_resumes_to_the_same_bits(killed):
    ours, theirs = (tensors_of(folder / "run") for folder in (killed.broken, killed.whole))
    assert ours.keys() == {"artifact.safetensors"}
    assert ours == theirs
    ours, theirs = (read(folder / "run/results.json") for folder in (killed.broken, killed.whole))
    assert [row["accuracy"] for row in ours["rows"]] == [row["accuracy"] for row in theirs["rows"]]
    for name in ("residual", "optimum", "ratio"):
        assert ours["offsets"][name] == theirs["offsets"][name]
    assert ours["offsets"]["ratio"] > 1.001  # few steps: the fit is in the middle of its way


def test_killed_fit_writes_each_row_of_metrics_once(killed):
    whole = offset_rows(killed.whole / "run")
    assert [step for step, _ in whole] == [10, 20, 30, 40, 50, 60]
    assert offset_rows(killed.broken / "run") == whole


def test_fit_that_was_killed_leaves_no_checkpoint_when_done(killed):
    for folder in (killed.whole, killed.broken):
        assert not (folder / "run/unfinished").exists()
