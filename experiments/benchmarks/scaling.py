"""The exact fit of twenty experts of ViT-L/14's size from bfloat16 files.

    python experiments/benchmarks/scaling.py --folder=/tmp/scaling_bench

The experts are made here from a random model and random deltas: synthetic, for time and memory only. The fit runs in a
process of its own, from opening the files to the written offsets (rank 256). Its peak of anonymous memory (what files
that are mapped into memory take is not counted: neither the experts nor the offsets) may be 1.5 GB and the largest
leaf's stack: that leaf of all experts in float32, which is what the solver holds of it. Prints the figures
beside their goals, and writes experiments/benchmarks/scaling.json.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import AnonymousMemory, paths, vit_shapes, write_experts

NUM_TASKS, RANK = 20, 256
LAYERS = 24
# The most that a fit may take beside the largest leaf's stack, bytes.
BESIDE_STACK = 1.5e9


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The leaves of CLIP ViT-L/14's vision tower, of so many layers, in the layout (out, in)."""
    return vit_shapes(1024, 4096, layers, 3 * 14 * 14, 257, 768)


def stack_bytes(layers: int) -> int:
    """Of the largest leaf of all experts, float32."""
    return NUM_TASKS * 4 * max(math.prod(shape) for shape in shapes(layers).values())


def fit(folder: Path) -> None:
    """One measured process: prints its figures as JSON."""
    from retex_jax import METHODS, ExpertSet

    memory = AnonymousMemory()
    memory.start()
    started = time.perf_counter()
    base, *files = paths(folder, NUM_TASKS)
    experts = ExpertSet.from_safetensors(base, files, check_finite=False)
    written = folder / "offsets.safetensors"
    state = METHODS["retex"].fit(experts, rank=RANK, file=written)
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds_per_expert": seconds / NUM_TASKS,
        "peak_anonymous_bytes": memory.peak,
        "ratio_to_optimum": state.report.ratio,
        "file_bytes": written.stat().st_size,
    }
    written.unlink()
    print(json.dumps(figures))


def run_worker(*arguments: str) -> dict[str, Any]:
    """Runs a part of this script in a process of its own; what its last line says."""
    command = [sys.executable, __file__, "--worker", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_goal(name: str, value: float, goal: float, told: str = "") -> None:
    """One line of what is measured, with its goal."""
    is_met = "met" if value <= goal else "MISSED"
    print(f"{name:50} {value:8.3f}  goal {goal:.3f}, {is_met}{told}", flush=True)


def measure_fit(folder: Path, layers: int) -> dict[str, Any]:
    """The fit of bfloat16 files, which are made where they are not there yet."""
    import ml_dtypes

    write_experts(folder, shapes(layers), NUM_TASKS, ml_dtypes.bfloat16)
    goal = BESIDE_STACK + stack_bytes(layers)
    figures = run_worker("fit", "--folder", str(folder))
    told = f"; {figures['seconds_per_expert']:.1f} s an expert"
    print_goal("fit, peak in GB", figures["peak_anonymous_bytes"] / 1e9, goal / 1e9, told)
    return {
        **figures,
        "layers": layers,
        "model_bytes": paths(folder, NUM_TASKS)[0].stat().st_size,
        "stack_bytes": stack_bytes(layers),
        "peak_goal_bytes": goal,
    }


def main() -> None:
    """Measures, prints the figures beside their goals and writes them beside those of other parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="18 GB of space")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a trial")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", choices=("fit",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "fit":
        fit(args.folder)
        return
    from retex_jax import logging

    facts = {"commit": logging.commit(), "device": logging.device(), "cores": os.cpu_count()}
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results["fit"] = {**facts, **measure_fit(args.folder, args.layers)}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
