"""An experiment that takes seconds: random ViT, drawn images. The tests' own tasks, nothing to download.

As a program, `python tests/tiny.py MODULE ARGS...` runs a program of the package with these tasks; with
TINY_KILL=FOLDER:STEP it kills itself (-9) when that checkpoint is about to be saved. As an experiment file
it is `--config=tests/tiny.py`, or `--config=tests/tiny.py:adam`.
"""

import contextlib
import copy
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the experiment files are no part of the package

from configs import common  # noqa: E402
from retex_jax import checkpoint, command_line, data, experiment, release  # noqa: E402

NAMES = ("dots", "bars", "rings")
NUM_CLASSES = 3
TEXT = "notes"


def images(seed, brightness, count=240):
    """Draws each class as a pattern of its own under noise, at a brightness of the task's own."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(0, 30, (NUM_CLASSES, 8, 8))
    labels = np.arange(count) % NUM_CLASSES
    drawn = brightness + patterns[labels] + rng.normal(0, 20, (count, 8, 8))
    pixels = np.clip(drawn, 0, 255).astype(np.uint8)
    return data.Examples(pixels, labels, tuple(f"class {i}" for i in range(NUM_CLASSES)))


def specs():
    """Task name to its TaskSpec."""
    made = {}
    for index, name in enumerate(NAMES):
        examples = images(index, brightness=60 + 60 * index)
        made[name] = data.TaskSpec(lambda _, examples=examples: examples, (), "drawn", "none")
    return made


def text_spec():
    """A text task, for models that read none."""
    return data.TaskSpec(lambda _: data.Examples(["a", "b"], [0, 1], ("x", "y")), (), "", "")


def get_config(kind=""):
    """The experiment; "adam" is a shorter one, with the solver that keeps checkpoints."""
    config = common.get_config()
    config.name = "tiny"
    config.model.name = "vit"
    config.model.options = {
        "image_size": 8,
        "patch_size": 4,
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_dim": 16,
        "pool": "mean",
    }
    config.tasks = NAMES
    config.finetune.update(
        steps=24,
        batch_size=16,
        learning_rate=3e-3,
        head_learning_rate=3e-2,
        warmup_steps=2,
        checkpoint_every=8,
    )
    config.offsets.rank = 8
    config.offsets.extra_ranks = (2,)
    config.offsets.adam = {
        "learning_rate": 2e-3,
        "steps": 60,
        "warmup_steps": 5,
        "tasks_per_step": "one",
        "chunk_steps": 10,
        "checkpoint_every": 20,
    }
    config.identifier.rank = 3
    config.identifier.layer = 1
    config.identifier.num_calibration = 40
    config.evaluate.batch_size = 32
    if kind == "adam":
        config.model.options.num_layers = 1
        config.tasks = ("dots", "rings")
        config.baselines = {}
        config.offsets.extra_ranks = ()
        config.offsets.solver = "adam"
    return config


def settings_with(*changes):
    """The experiment's settings with entries changed: ("offsets.rank", 0), ..."""
    settings = copy.deepcopy(command_line.as_dict(get_config()))
    for path, value in changes:
        *above, name = path.split(".")
        node = settings
        for part in above:
            node = node[part]
        node[name] = value
    return settings


@contextlib.contextmanager
def world(cache):
    """The tiny tasks instead of the packaged ones, a cache folder, and JAX's settings put back."""
    kept = {
        name: jax.config.values[name]
        for name in (
            "jax_compilation_cache_dir",
            "jax_disable_most_optimizations",
            "jax_persistent_cache_min_compile_time_secs",
        )
    }
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETEX_CACHE", str(cache))
        for table, tasks in ((data.VISION_TASKS, specs()), (data.TEXT_TASKS, {TEXT: text_spec()})):
            for name in list(table):
                patch.delitem(table, name)
            for name, spec in tasks.items():
                patch.setitem(table, name, spec)
        try:
            yield
        finally:
            for name, value in kept.items():
                jax.config.update(name, value)


class Run(NamedTuple):
    """A finished run of the experiment."""

    config: Any
    settings: dict
    cache: Path
    workdir: Path
    experts: Path
    results: dict
    backbone: Any
    tasks: list
    released: release.Release


def suite(run):
    """What the run's methods were evaluated on, with the released heads."""
    from retex_jax import protocols  # here, because as a program this file runs it

    heads = list(run.released.heads.values())
    return protocols.Suite(run.backbone.model, run.tasks, heads, run.results["individual"], 32, 0)


_RUNS = []


def trained(tmp_path_factory):
    """The run that all tests share: trained when first asked for, and left as it is."""
    from retex_jax import train  # here, as above: as a program this file runs it

    if not _RUNS:
        cache, workdir = (
            tmp_path_factory.mktemp("cache"),
            tmp_path_factory.mktemp("run") / "workdir",
        )
        config = get_config()
        settings = command_line.as_dict(config)
        with world(cache):
            results = train.train(config, workdir)
            backbone, tasks = experiment.load(settings)
            experts = experiment.experts_directory(settings)
        _RUNS.append(
            Run(
                config,
                settings,
                cache,
                workdir,
                experts,
                results,
                backbone,
                tasks,
                release.load(workdir),
            )
        )
    return _RUNS[0]


def main():
    """Runs a program of the package with the tiny tasks."""
    data.VISION_TASKS.update(specs())
    if kill := os.environ.get("TINY_KILL"):
        folder, step = kill.split(":")
        save = checkpoint.Checkpointer.save

        def save_or_die(self, number, *args, **kwargs):
            if (self.directory.name, number) == (folder, int(step)):
                os.kill(os.getpid(), signal.SIGKILL)
            return save(self, number, *args, **kwargs)

        checkpoint.Checkpointer.save = save_or_die
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
