"""A batch of mixed tasks by every recovery mode, against a plain forward pass of the merged model.

    python experiments/benchmarks/inference.py

A model of the size of CLIP's ViT-B/32 (images of 224 pixels: 50 tokens), float32, random weights, and offsets with
drawn factors of each rank, the shared factor on the longer side: time depends on shapes, not on values. The task of
each input is drawn. Warm times are of all modes in turn in one process, so that a drift of the machine's speed hits
all; "materialized" keeps as many experts as fit its cache of 1 GiB (three of this size), "grouped" recovers them in
every pass; times include the copies to and from the host. Cold seconds (the first call, compiling included) and the
peak of anonymous memory are of a process a mode. Growth is with the number of tasks, at one batch size. Prints the
ratios beside their goals, and writes experiments/benchmarks/inference.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import measuring
import numpy as np

from retex_jax import logging, models, offsets, recovery, tree
from retex_jax.offsets.forms import Elementwise, Form, Product
from retex_jax.offsets.state import plan_leaves

MODES = ("factored", "materialized", "grouped", "sample_wise", "auto")

# By rank, the most that a warm pass in factors may take of a plain one.
GOALS = {16: 1.15, 64: 1.25, 256: 1.7}
# How many times slower than grouped recovery the sample-wise one is at least, by input.
SAMPLE_WISE_GOAL = 8


def vit_base() -> models.ViT:
    """The image tower, without the projection to the texts."""
    return models.ViT(models.ViTConfig(image_size=224, patch_size=32))


def draw_images(model: models.ViT, size: int) -> dict[str, np.ndarray]:
    """A batch of noise."""
    shape = (size, model.config.image_size, model.config.image_size, 3)
    return {"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def draw_tasks(num_tasks: int, size: int) -> np.ndarray:
    """The task of each input."""
    return np.random.default_rng(2).integers(0, num_tasks, size)


def drawn_state(model: Any, rank: int, num_tasks: int) -> offsets.OffsetState:
    """A merged model with offsets of one rank."""
    merged = models.init_params(model, jax.random.key(0))
    flat = tree.flatten(merged)
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return 1e-2 * rng.standard_normal(shape, np.float32)

    plans = plan_leaves(flat, "flax", rank, "clip", "auto")
    forms: dict[str, Form] = {}
    for name, leaf in flat.items():
        if name in plans:
            plan = plans[name]
            own, common = plan.solved_shape
            factors = draw(num_tasks, own, plan.rank), draw(plan.rank, common)
            forms[name] = Product(*factors, plan.orientation)
        else:
            forms[name] = Elementwise(draw(num_tasks, *leaf.shape), np.float32(1))
    state = offsets.OffsetState.baked(
        merged, forms, offsets.FitReport({}, {}, {}, {}), num_tasks, "flax"
    )
    return replace(state, offsets=jax.device_put(state.offsets))


def runs(
    model: Any, state: offsets.OffsetState, size: int
) -> tuple[recovery.Recoverer, dict[str, Callable[[], np.ndarray]]]:
    """What runs one batch, and a call of it by every mode and by a plain forward pass."""
    batch, task_ids = draw_images(model, size), draw_tasks(state.num_tasks, size)
    recoverer = recovery.Recoverer(model, state, max_batch=size)
    found = {"plain": lambda: recovery.run(model, state.merged, batch, size)}
    for mode in MODES:
        found[mode] = lambda mode=mode: recoverer.features(batch, task_ids, mode)
    return recoverer, found


def warm(
    model: Any, state: offsets.OffsetState, size: int, repeats: int, modes: tuple[str, ...] = MODES
) -> dict[str, Any]:
    """Median seconds of a plain forward pass, and each mode's median ratio to it over the repeats."""
    recoverer, found = runs(model, state, size)
    want = found["grouped"]()
    for mode in modes:
        error = np.abs(found[mode]() - want).max() / np.abs(want).max()
        if error > 1e-4:
            raise ValueError(f"{mode}: differs from grouped recovery by {error}")
    rounds = []
    for _ in range(repeats):
        seconds = {}
        for name in ("plain", *modes):
            started = time.perf_counter()
            found[name]()
            seconds[name] = time.perf_counter() - started
        ratios = {mode: seconds[mode] / seconds["plain"] for mode in modes}
        rounds.append({"plain_seconds": seconds["plain"], **ratios})
    least = {f"least_{mode}": min(figures[mode] for figures in rounds) for mode in modes}
    plan = recoverer.plan(draw_images(model, size), draw_tasks(state.num_tasks, size))
    return {**measuring.medians(rounds), **least, "auto_is": plan}


def worker(mode: str, rank: int, num_tasks: int, size: int) -> None:
    """A first and a second pass in this process: prints seconds and the peak of anonymous memory as JSON."""
    model = vit_base()
    state = drawn_state(model, rank, num_tasks)
    before = measuring.anonymous_bytes(os.getpid())
    memory = measuring.AnonymousMemory()
    memory.start()
    run = runs(model, state, size)[1][mode]
    started = time.perf_counter()
    run()
    cold = time.perf_counter() - started
    run()
    print(json.dumps({"cold_seconds": cold, "peak_bytes_above_state": memory.peak - before}))


def run_worker(mode: str, rank: int, args: argparse.Namespace) -> dict[str, float]:
    """`worker` in a process of its own."""
    command = [sys.executable, __file__, "--worker", mode, "--ranks", str(rank)]
    command += ["--num_tasks", str(args.num_tasks), "--batch_size", str(args.batch_size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tell(what: str, ratio: float, goal: float, is_met: bool) -> None:
    """One line a goal."""
    print(f"{what:44} {ratio:7.2f}  goal {goal:g}: {'met' if is_met else 'MISSED'}", flush=True)


def main() -> None:
    """Measures each rank, then each number of tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_tasks", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--growth", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.ranks[0], args.num_tasks, args.batch_size)
        return
    model = vit_base()
    results: dict[str, Any] = {
        "commit": logging.commit(),
        "device": logging.device(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "batch_size": args.batch_size,
        "num_tasks": args.num_tasks,
        "ranks": {},
        "growth": {},
    }
    for rank in args.ranks:
        state = drawn_state(model, rank, args.num_tasks)
        figures = warm(model, state, args.batch_size, args.repeats)
        cold = {mode: run_worker(mode, rank, args) for mode in ("plain", *MODES)}
        results["ranks"][str(rank)] = {"warm": figures, "processes": cold}
        if rank in GOALS:
            ratio = figures["factored"]
            tell(f"rank {rank}: factored / plain", ratio, GOALS[rank], ratio <= GOALS[rank])
        ratio = figures["sample_wise"] / figures["grouped"]
        is_met = ratio >= SAMPLE_WISE_GOAL
        tell(f"rank {rank}: sample-wise / grouped", ratio, SAMPLE_WISE_GOAL, is_met)
        print(json.dumps(results["ranks"][str(rank)]), flush=True)
    for num_tasks in args.growth:
        state = drawn_state(model, min(args.ranks), num_tasks)
        figures = warm(model, state, args.batch_size, args.repeats, ("factored", "grouped", "auto"))
        results["growth"][str(num_tasks)] = figures
        print(f"{num_tasks} tasks, rank {min(args.ranks)}: {json.dumps(figures)}", flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
