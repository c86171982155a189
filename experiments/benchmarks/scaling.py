"""The exact fit of twenty experts of ViT-L/14's size from bfloat16 files, and what eight devices hold of one problem.

    python experiments/benchmarks/scaling.py --folder=/tmp/scaling_bench --devices

The experts are made here from a random model and random deltas: synthetic, for time and memory only. The fit runs in a
process of its own, from opening the files to the written offsets (rank 256). Its peak of anonymous memory (what files
that are mapped into memory take is not counted: neither the experts nor the offsets) may be 1.5 GB and the largest
leaf's stack: that leaf of all experts in float32, which is what the solver holds of it.

Of eight simulated devices, each may hold 1.15 / 8 of what one holds alone. "state" are arguments: the fitted offsets
and their merged model, on a mesh of eight along "task", and Adam's parameters, moments and targets, on one of eight
along "model". "program" is arguments, results and scratch memory of what is compiled for them (XLA's own analysis):
of the closed form of one leaf, 768 x 768, of T experts, and of eight leaves on a mesh of eight along "layer", beside
one device that has all of them; of Adam's loop over the leaves of ViT-B/32 of 8 experts, rank 16. Prints the figures
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

import numpy as np
from measuring import AnonymousMemory, paths, random_model, vit_shapes, write_experts

NUM_TASKS, RANK = 20, 256
LAYERS = 24
VIT_B = vit_shapes(768, 3072, 12, 3 * 32 * 32, 50, 512)
# The most that a fit may take beside the largest leaf's stack, bytes.
BESIDE_STACK = 1.5e9
NUM_DEVICES = 8
# The most that a device may hold of what one holds alone.
SHARE = 1.15 / NUM_DEVICES


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


def compiled_bytes(lowered: Any) -> int:
    """Arguments, results and scratch memory of a program on each of its devices."""
    found = lowered.compile().memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def closed_form_program(num_tasks: int, num_leaves: int, **mesh_sizes: int) -> int:
    """Bytes a device of the closed form of leaves 768 x 768."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from retex_jax.offsets import sharded
    from retex_jax.offsets.state import plan_leaves

    shape = (768, 768)
    plan = plan_leaves({"a": jax.ShapeDtypeStruct(shape, np.float32)}, "torch", 64)["a"]
    mesh = make_mesh(**mesh_sizes)
    program = sharded.program(mesh, plan, num_tasks, "float64", False, np.dtype(np.float32))
    where = NamedSharding(mesh, P("layer" if "layer" in mesh_sizes else None, "task"))
    stack = jax.ShapeDtypeStruct((num_leaves, num_tasks, *shape), np.float32, sharding=where)
    with jax.enable_x64(True):
        return compiled_bytes(program.lower(stack))


def closed_form_state(num_devices: int) -> int:
    """Bytes a device of the offsets of 16 experts of two small layers, and of the merged model."""
    from retex_jax import ExpertSet, offsets, sharding, tree

    small = vit_shapes(128, 512, 2, 192, 17, 64)
    pretrained, *models = (tree.unflatten(random_model(small, task)) for task in range(-1, 16))
    experts = ExpertSet.from_trees(pretrained, models, layout="torch")
    state = offsets.fit_sharded(experts, make_mesh(task=num_devices), rank=16)
    return sharding.device_bytes((state.merged, state.task_embeddings, state.offsets))


def adam(shapes: dict[str, tuple[int, ...]], num_devices: int) -> tuple[int, int]:
    """Bytes a device of Adam's state and targets, and of its loop."""
    import jax
    import jax.numpy as jnp

    from retex_jax import sharding, tree
    from retex_jax.offsets import adam, generator
    from retex_jax.offsets.state import plan_leaves

    num_tasks = 8
    leaves = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    plans = plan_leaves(leaves, "torch", 16)
    groups = tree.groups(shapes, lambda _: len(shapes))
    ranks = {index: getattr(plans.get(own[0]), "rank", None) for index, own in enumerate(groups)}
    optimizer = adam.make_optimizer(2e-4, 600, 5000)

    def start() -> tuple[adam.TrainState, generator.Problem]:
        targets = {
            index: jnp.zeros((len(own), num_tasks, *shapes[own[0]]))
            for index, own in enumerate(groups)
        }
        params = generator.init_params(jax.random.key(0), groups, targets, ranks, num_tasks)
        state = adam.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        counts = dict.fromkeys(targets, jnp.ones(()))
        each = jnp.zeros(num_tasks)
        return state, generator.Problem(targets, {}, counts, each, each, jnp.zeros(()))

    placed, mesh = jax.eval_shape(start), None
    if num_devices > 1:
        mesh = make_mesh(model=num_devices)
        placed = jax.tree.map(
            lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
            placed,
            tuple(sharding.shardings(part, mesh, adam.RULES) for part in placed),
        )
    lowered = adam.run_steps.lower(
        optimizer, "all", generator.Objective(), "product", mesh, 100, *placed, jax.random.key(0)
    )
    return sharding.device_bytes(placed), compiled_bytes(lowered)


def make_mesh(**sizes: int) -> Any:
    """A mesh of the first devices."""
    import jax

    devices = jax.devices()[: math.prod(sizes.values())]
    automatic = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), automatic, devices=devices)


def devices() -> None:
    """One measured process: prints, by what is held, its bytes on one device and on each of eight, as JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    counts = (1, NUM_DEVICES)
    found = {"closed form, state": [closed_form_state(count) for count in counts]}
    for num_tasks in (8, 32, 128):
        found[f"closed form, program, {num_tasks} experts along task"] = [
            closed_form_program(num_tasks, 1, task=count) for count in counts
        ]
    found["closed form, program, 8 leaves along layer"] = [
        closed_form_program(8, NUM_DEVICES, layer=count, task=1) for count in counts
    ]
    (one_state, one_program), (state, program) = (adam(VIT_B, count) for count in counts)
    found["Adam, state"] = [one_state, state]
    found["Adam, program"] = [one_program, program]
    print(json.dumps(found))


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


def measure_devices() -> dict[str, Any]:
    """What each of eight devices holds of what one holds."""
    shares = {}
    for name, (one, each) in run_worker("devices").items():
        shares[name] = {"one": one, "each_of_8": each, "share": each / one}
        print_goal(name, each / one, SHARE)
    return shares


def main() -> None:
    """Measures, prints the figures beside their goals and writes them beside those of other parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="18 GB of space; no fit when not given")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a trial")
    parser.add_argument("--devices", action="store_true", help="what each of eight devices holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", choices=("fit", "devices"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "fit":
        fit(args.folder)
        return
    if args.worker == "devices":
        devices()
        return
    from retex_jax import logging

    facts = {"commit": logging.commit(), "device": logging.device(), "cores": os.cpu_count()}
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if args.devices:
        results["devices"] = {**facts, "shares": measure_devices()}
    if args.folder:
        results["fit"] = {**facts, **measure_fit(args.folder, args.layers)}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
