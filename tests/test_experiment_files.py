"""The experiment files of the papers' suites say how they are run, on what, for how long, and what to expect."""

import importlib
import re
from pathlib import Path

import pytest

from retex_jax import command_line, estimate, finetune_snapshot, preflight

FOLDER = Path(__file__).parents[1] / "configs"
FINETUNING = sorted(path.stem for path in FOLDER.glob("finetune_*.py"))
SUITES = sorted(
    path.stem for path in FOLDER.glob("*.py") if re.match(r"vit_|roberta_|gpt2_|qwen_", path.stem)
)
PARTS = ("Checkpoints", "Hardware", "Time", "Expected")


def parts_of(name):
    """The paragraphs of a file's docstring by what they begin with."""
    text = importlib.import_module(f"configs.{name}").__doc__
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return {"command": paragraphs[1]} | {
        part: found
        for part in PARTS
        for found in paragraphs
        if found.startswith(f"{part}: ") and len(found) > 40
    }


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.py")])
def test_file_has_no_unknown_entry(name):
    settings = command_line.as_dict(importlib.import_module(f"configs.{name}").get_config())
    if name in FINETUNING:
        assert "no such entry" not in "".join(finetune_snapshot.problems(settings))
        settings["finetune"]["epoch"] = 1.0
        assert finetune_snapshot.problems(settings)[0].startswith("finetune.epoch: no such entry")
    else:
        assert preflight.unknown(settings) == []


def written(flops):
    """As the docstrings have it: 5.3e15."""
    return f"{flops:.1e}".replace("e+", "e")


def test_there_are_sixteen():
    assert (len(SUITES), len(FINETUNING)) == (13, 3)


@pytest.mark.parametrize("name", [*SUITES, *FINETUNING])
def test_docstring_has_every_part(name):
    program = "finetune" if name in FINETUNING else "train"
    parts = parts_of(name)
    assert parts["command"].startswith(f"python -m retex_jax.{program} --config=configs/{name}.py")
    assert set(parts) == {"command", *PARTS}
    assert re.search(r"(ReTeX|DTS).*Tables? \d", parts["Expected"])
    assert re.search(r"\d\d\.\d|\.\d{4}|no figure", parts["Expected"])


@pytest.mark.parametrize("name", [*SUITES, *FINETUNING])
def test_docstring_names_the_checkpoints(name):
    """Every repository, by name or as OWNER/..._TASK."""
    config = importlib.import_module(f"configs.{name}").get_config()
    said = parts_of(name)["Checkpoints"]
    assert config.experts.pretrained in said
    tasks = config.get("tasks", ())
    for repository, task in zip(config.experts.repositories, tasks, strict=bool(tasks)):
        task = task.replace("fashion-", "fashion_")
        common = repository.partition(f"_{task}")[0]
        folders = "/".join(repository.split("/")[:2])
        assert f"{common}_TASK" in said or folders in said, repository


@pytest.mark.parametrize("name", SUITES)
def test_docstring_says_what_is_estimated(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    found, parts = estimate.estimate(command_line.as_dict(config)), parts_of(name)
    assert f"{found.expert_bytes / 1e9:.1f} GB of disk" in parts["Hardware"]
    assert f"{found.device_bytes / 1e9:.1f} GB of memory" in parts["Hardware"]
    assert f" {written(found.flops)} operations" in parts["Time"]
    assert all(task in parts["Time"] for task in found.unsized)


@pytest.mark.parametrize("name", FINETUNING)
def test_docstring_says_what_fine_tuning_takes(name, monkeypatch):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(estimate.jax, "device_count", lambda: 1)
    config = importlib.import_module(f"configs.{name}").get_config()
    *_, memory, took = estimate.training_lines(command_line.as_dict(config))
    gigabytes = float(re.search(r"about ([\d.]+) GB", memory)[1])
    parts = parts_of(name)
    assert f"{gigabytes:.1f} GB of memory" in parts["Hardware"]
    operations = float(re.search(r"([\d.e+]+) operations", took)[1])
    assert f" {written(operations)} operations" in parts["Time"]
