"""ReTeX from 8 to 1000 experts: time, memory, residual and bytes, with experts that are made on the fly (synthetic).

    python experiments/scaling_num_tasks.py

The model has the leaves of all-MiniLM-L6-v2 (22.6M parameters). An expert is the pretrained model and offsets that are
drawn from its seed when they are read: of rank 16 in a subspace that all tasks share, and of rank 4 in one of its own.
Nothing of T experts is ever in memory or on disk. For every T a process of its own averages the experts and solves the
offsets in closed form into a file, a few tasks at a time; the seconds that it took inside, of clock and of
processors, and its peak of anonymous memory are measured. The rank is fixed, so that a task takes nearly the same bytes
for every T, but for its part of the shared factors. Beside them stand the bytes of the form with few embeddings
(d_emb < T), counted, not fitted. Prints how time and memory grow from the first T to the last, with their goals, and
writes results.json and scaling.svg below experiments/results/scaling_num_tasks. The file of 1000 tasks takes 3.5 GB of
the folder of temporary files while it is measured.
"""

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from measuring import AnonymousMemory

RANK, SHARED_RANK, OWN_RANK = 16, 16, 4
OFFSET = np.float32(1e-3)
STACK_BYTES = 1 << 26
NUM_EMBEDDINGS = 32
# The most that time may grow beyond linear, and memory beyond flat, from the first T to the last.
TIME_GOAL, MEMORY_GOAL = 1.2, 1.1


def shapes() -> dict[str, tuple[int, ...]]:
    """The leaves of MiniLM, in Flax layout."""
    from retex_jax import models, tree

    config = models.BertConfig(width=384, num_layers=6, num_heads=12, mlp_dim=1536)
    expected = models.expected_params(models.Bert(config))
    return {name: leaf.shape for name, leaf in tree.flatten(expected).items()}


class Drawn:
    """A source whose leaves are drawn when they are read.

    Attributes:
      leaves: name to shape and dtype.
    """

    def __init__(self, leaves: dict[str, Any], task: int):
        self.leaves = leaves
        self._task = task

    def read(self, name: str) -> np.ndarray:
        """The pretrained leaf (task -1), or an expert's."""
        shape, leaf = self.leaves[name].shape, zlib.crc32(name.encode())
        base = _pretrained(leaf, shape)
        if self._task < 0:
            return base
        own = np.random.default_rng((leaf, self._task + 1))
        if len(shape) < 2:
            return base + OFFSET * own.standard_normal(shape, np.float32)
        left = own.standard_normal((math.prod(shape[:-1]), SHARED_RANK + OWN_RANK), np.float32)
        right = own.standard_normal((OWN_RANK, shape[-1]), np.float32) / np.sqrt(OWN_RANK)
        right = np.concatenate([_common(leaf, shape[-1]), right])
        found = left @ (OFFSET * right)
        found = found.reshape(shape)
        return np.add(found, base, out=found)


@functools.lru_cache(maxsize=1)
def _pretrained(leaf: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(leaf).standard_normal(shape, np.float32) * np.float32(0.02)


@functools.lru_cache(maxsize=1)
def _common(leaf: int, columns: int) -> np.ndarray:
    """The rows that the offsets of all tasks share, [r, columns]."""
    drawn = np.random.default_rng((leaf, 0)).standard_normal((SHARED_RANK, columns), np.float32)
    return drawn / np.sqrt(np.float32(SHARED_RANK))


def worker(num_tasks: int) -> None:
    """One measured process: prints its figures as JSON."""
    import jax

    from retex_jax import METHODS, ExpertSet, logging

    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes().items()}
    experts = ExpertSet.from_sources(
        Drawn(leaves, -1),
        [Drawn(leaves, task) for task in range(num_tasks)],
        layout="flax",
        check_finite=False,
    )
    memory = AnonymousMemory()
    memory.start()
    started, processors = time.perf_counter(), _processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "offsets.safetensors"
        merged = METHODS["weight_average"].fit(experts)
        with logging.progress(len(leaves), f"{num_tasks} tasks") as bar:
            state = METHODS["retex"].fit(
                experts,
                rank=RANK,
                base=merged,
                stack_bytes=STACK_BYTES,
                file=path,
                progress=lambda done, _: bar.update(done),
            )
        seconds = time.perf_counter() - started
        figures = {
            "num_tasks": num_tasks,
            "seconds": seconds,
            "processor_seconds": _processor_seconds() - processors,
            "peak_anonymous_bytes": memory.peak,
            "relative_residual": state.report.residual / state.report.energy,
            "ratio_to_optimum": state.report.ratio,
            "file_bytes": path.stat().st_size,
            "bytes_per_task": METHODS["retex"].extra_bytes(state) / num_tasks,
        }
    print(json.dumps(figures))


def _processor_seconds() -> float:
    """Of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def few_embeddings_bytes(num_tasks: int) -> float:
    """Bytes a task of the form with `NUM_EMBEDDINGS` embeddings that all leaves share; see `offsets.tucker`."""
    import jax

    from retex_jax.offsets.state import plan_leaves
    from retex_jax.typing import Layout

    layout: Layout = "flax"
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes().items()}
    plans = plan_leaves(leaves, layout, RANK, "paper", "right")
    generated, common = 0, 0
    for name, leaf in leaves.items():
        if name in plans:
            own, shared = plans[name].solved_shape
            generated += own * plans[name].rank
            common += plans[name].rank * shared
        else:
            generated += leaf.size
    embeddings = min(NUM_EMBEDDINGS, num_tasks)
    return 4 * (embeddings * generated + common + num_tasks * embeddings) / num_tasks


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of time from the first T to the last, of memory from the first to the largest of all."""
    first, last = rows[0], rows[-1]
    more = last["num_tasks"] / first["num_tasks"]
    return {
        "time / linear": last["seconds"] / first["seconds"] / more,
        "processor time / linear": last["processor_seconds"] / first["processor_seconds"] / more,
        "memory / flat": max(row["peak_anonymous_bytes"] for row in rows)
        / first["peak_anonymous_bytes"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time, memory, bytes and residual against T, beside lines of the goals."""
    import matplotlib.pyplot as plt

    counts = [row["num_tasks"] for row in rows]
    panels = {
        "processor seconds a task": [row["processor_seconds"] / row["num_tasks"] for row in rows],
        "peak memory, GB": [row["peak_anonymous_bytes"] / 1e9 for row in rows],
        "residual / energy": [row["relative_residual"] for row in rows],
        "MB stored a task": [row["bytes_per_task"] / 1e6 for row in rows],
    }
    figure, axes = plt.subplots(2, 2, figsize=(7, 5), layout="constrained")
    for axis, (label, values) in zip(axes.flat, panels.items(), strict=True):
        axis.plot(counts, values, "o-", color="#0072B2", label=f"rank {RANK}")
        axis.set(xscale="log", xlabel="experts", ylabel=label, ylim=(0, 1.25 * max(values)))
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    few = [row["few_embeddings_bytes_per_task"] / 1e6 for row in rows]
    axis.plot(counts, few, "s--", color="#D55E00", label=f"{NUM_EMBEDDINGS} embeddings")
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measures every T, prints the growth, writes figures and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_tasks", type=int, nargs="+", default=[8, 32, 128, 512, 1000])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "scaling_num_tasks"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    from retex_jax import logging

    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"commit": logging.commit(), "device": logging.device(), "cores": os.cpu_count()}
    rows = []
    for num_tasks in sorted(args.num_tasks):
        command = [sys.executable, __file__, "--worker", str(num_tasks)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        row["few_embeddings_bytes_per_task"] = few_embeddings_bytes(num_tasks)
        rows.append(row)
        print(json.dumps(row), flush=True)
        results = {**facts, "rank": RANK, "rows": rows, "growth": growth(rows)}
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(rows, args.out / "scaling.svg")
    for name, ratio in growth(rows).items():
        goal = MEMORY_GOAL if name.startswith("memory") else TIME_GOAL
        told = "met" if ratio <= goal else "MISSED"
        told_range = f"T = {rows[0]['num_tasks']} to {rows[-1]['num_tasks']}"
        print(f"{name}, {told_range}: {ratio:.3f}, goal {goal}: {told}")
    print(f"wrote {args.out / 'results.json'} and scaling.svg")


if __name__ == "__main__":
    main()
