"""What the benchmarks share: synthetic experts, memory of a process, and medians of repeated runs."""

import os
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def random_model(shapes: Mapping[str, tuple[int, ...]], task: int) -> dict[str, np.ndarray]:
    """A random model, float32, or (task >= 0) an expert of it: the same with random deltas."""
    base, delta = np.random.default_rng(0), np.random.default_rng(task + 2)
    tensors = {}
    for name, shape in shapes.items():
        x = base.standard_normal(shape, np.float32) * np.float32(0.02)
        if task >= 0:
            x += delta.standard_normal(shape, np.float32) * np.float32(0.001)
        tensors[name] = x
    return tensors


def vit_shapes(
    width: int, mlp: int, layers: int, patch: int, positions: int, projection: int
) -> dict[str, tuple[int, ...]]:
    """The leaves of a CLIP vision tower in the layout (out, in)."""
    made = {
        "patch/weight": (width, patch),
        "position/weight": (positions, width),
        "projection/weight": (projection, width),
        "class": (width,),
    }
    for layer in range(layers):
        for name in ("query", "key", "value", "out"):
            made[f"{layer}/{name}/weight"] = (width, width)
            made[f"{layer}/{name}/bias"] = (width,)
        made[f"{layer}/fc1/weight"], made[f"{layer}/fc1/bias"] = (mlp, width), (mlp,)
        made[f"{layer}/fc2/weight"], made[f"{layer}/fc2/bias"] = (width, mlp), (width,)
        for name in ("norm1", "norm2"):
            made[f"{layer}/{name}/weight"] = made[f"{layer}/{name}/bias"] = (width,)
    return made


def write_experts(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], num_tasks: int, dtype: Any = np.float32
) -> None:
    """Writes base.safetensors and expert_0.safetensors, ... where they are not there yet."""
    from retex_jax import artifact

    folder.mkdir(parents=True, exist_ok=True)
    for task, path in zip(range(-1, num_tasks), paths(folder, num_tasks), strict=True):
        if not path.is_file():
            drawn = random_model(shapes, task)
            tensors = {name.replace("/", "."): x.astype(dtype) for name, x in drawn.items()}
            artifact.save_safetensors(path, tensors)


def paths(folder: Path, num_tasks: int) -> list[Path]:
    """The files that `write_experts` writes: the base's, and the experts'."""
    experts = [folder / f"expert_{task}.safetensors" for task in range(num_tasks)]
    return [folder / "base.safetensors", *experts]


class AnonymousMemory(threading.Thread):
    """Samples this process's anonymous memory; `peak` is the largest seen, bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Samples until the process ends."""
        while True:
            self.peak = max(self.peak, anonymous_bytes(os.getpid()))
            time.sleep(0.005)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def medians(measured: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over runs."""
    return {key: statistics.median(figures[key] for figures in measured) for key in measured[0]}
