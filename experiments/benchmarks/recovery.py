"""A batch of mixed tasks by every recovery mode, against a plain forward pass of the merged model.

    python experiments/benchmarks/recovery.py --out recovery.json

Models of the sizes of ViT-S/16 (images of 112 pixels: 50 tokens) and of BERT-mini (texts of 32 tokens), float32,
random weights, and offsets with drawn factors of each rank (of min(a, b) where a leaf is smaller), the shared factor
on the longer side: time depends on shapes, not on values. The task of each input is drawn. All modes run in turn in
one process, so that a drift of the machine's speed hits all; "materialized" has its experts at hand, "grouped"
recovers them in every pass. Times include the copies to and from the host. Memory is not measured.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
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


def vit_small() -> tuple[Any, Callable[[int], dict[str, np.ndarray]]]:
    """The model, and a function that draws a batch."""
    config = models.ViTConfig(image_size=112, width=384, num_heads=6, mlp_dim=1536)

    def draw(size: int) -> dict[str, np.ndarray]:
        shape = (size, config.image_size, config.image_size, 3)
        return {"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)}

    return models.ViT(config), draw


def bert_mini(length: int = 32) -> tuple[Any, Callable[[int], dict[str, np.ndarray]]]:
    """The model, and a function that draws a batch without padding."""
    config = models.BertConfig(width=256, num_layers=4, num_heads=4, mlp_dim=1024)

    def draw(size: int) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(0).integers(1, config.vocab_size, (size, length), np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return models.Bert(config), draw


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


def measure(
    model: Any, state: offsets.OffsetState, batch: Mapping[str, np.ndarray], repeats: int
) -> dict[str, float]:
    """Median seconds of a plain forward pass, and each mode's median ratio to it over the repeats."""
    size = len(next(iter(batch.values())))
    task_ids = np.random.default_rng(2).integers(0, state.num_tasks, size)
    recoverer = recovery.Recoverer(model, state, max_batch=size)
    runs: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: recovery.run(model, state.merged, batch, size)
    }
    for mode in MODES:
        runs[mode] = lambda mode=mode: recoverer.features(batch, task_ids, mode)
    want = runs["grouped"]()
    for mode in MODES:
        error = np.abs(runs[mode]() - want).max() / np.abs(want).max()
        if error > 1e-4:
            raise ValueError(f"{mode}: differs from grouped recovery by {error}")
    rounds = []
    for _ in range(repeats):
        seconds = {}
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - started
        ratios = {mode: seconds[mode] / seconds["plain"] for mode in MODES}
        rounds.append({"plain_seconds": seconds["plain"], **ratios})
    least = {f"least_{mode}": min(figures[mode] for figures in rounds) for mode in MODES}
    return {**measuring.medians(rounds), **least, "auto_is": recoverer.plan(batch, task_ids)}


def main() -> None:
    """Measures both models at each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_tasks", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results: dict[str, Any] = {
        "commit": logging.commit(),
        "device": logging.device(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "batch_size": args.batch_size,
        "num_tasks": args.num_tasks,
    }
    for name, make in (("vit_small", vit_small), ("bert_mini", bert_mini)):
        model, draw = make()
        results[name] = {}
        for rank in args.ranks:
            state = drawn_state(model, min(rank, model.config.width), args.num_tasks)
            found = measure(model, state, draw(args.batch_size), args.repeats)
            results[name][f"rank {rank}"] = found
            print(name, rank, found, flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
