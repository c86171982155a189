"""Mergers on eight synthetic experts of RoBERTa-base's size on disk, beside mergekit on the same files in one run.

    python experiments/benchmarks/mergers.py --folder=/tmp/merge_bench --mergekit=VENV/bin/mergekit-yaml

The experts are made here from a random model and random deltas: synthetic, for time and memory only. Each figure is of
a process of its own, in turn with the others: whole-process seconds; seconds inside, from opening the files to the
written result; and the peak of anonymous memory (what files that are mapped into memory take is not counted).
"read_write" reads every byte of all nine files and writes one model. mergekit 0.1.5 (pip install mergekit==0.1.5, in an
environment of its own) fails offline when it copies the tokenizer, after the merged model is written. Before each
process, ours or mergekit's, all files are read once, so that they lie in the page cache for both. Prints the
ratios that matter (whole process against mergekit, inside against read_write, peak memory against one model and one
leaf's stack) beside their goals, and writes experiments/benchmarks/mergers.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from measuring import AnonymousMemory, anonymous_bytes, medians, random_model

NUM_TASKS = 8
WIDTH, MLP, LAYERS, VOCABULARY, POSITIONS = 768, 3072, 12, 50265, 514
METHODS = {
    "read_write": {},
    "weight_average": {},
    "task_arithmetic": {},
    "ties": {},
    "dare": {},
    "emr": {},
    "dts_t": {},
}
MERGEKIT = {
    "weight_average": ("linear", {"weight": 1.0 / NUM_TASKS}, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}, {"lambda": 0.3, "normalize": False}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}, {"lambda": 1.0, "normalize": True}),
    "dare": ("dare_linear", {"weight": 1.0, "density": 0.5}, {"lambda": 0.3, "normalize": False}),
}

# The most that a figure may be of what it is compared with.
GOALS = {
    "process / mergekit": {
        "weight_average": 1 / 2,
        "task_arithmetic": 1 / 2,
        "ties": 1 / 20,
        "dare": 1 / 4,
    },
    "inside / read_write": {"weight_average": 4, "task_arithmetic": 4, "ties": 12, "emr": 4},
    "peak / (model + stack)": dict.fromkeys(
        ("weight_average", "task_arithmetic", "ties", "dare", "emr", "dts_t"), 1
    ),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of transformers' RobertaModel, named as mergekit expects them."""
    made = {
        "roberta.embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
        "roberta.embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "roberta.embeddings.token_type_embeddings.weight": (1, WIDTH),
        "roberta.embeddings.LayerNorm.weight": (WIDTH,),
        "roberta.embeddings.LayerNorm.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        block = f"roberta.encoder.layer.{layer}."
        for name, (rows, columns) in {
            "attention.self.query": (WIDTH, WIDTH),
            "attention.self.key": (WIDTH, WIDTH),
            "attention.self.value": (WIDTH, WIDTH),
            "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (MLP, WIDTH),
            "output.dense": (WIDTH, MLP),
        }.items():
            made[f"{block}{name}.weight"] = (rows, columns)
            made[f"{block}{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            made[f"{block}{name}.weight"] = made[f"{block}{name}.bias"] = (WIDTH,)
    made["pooler.dense.weight"], made["pooler.dense.bias"] = (WIDTH, WIDTH), (WIDTH,)
    return made


def make_checkpoints(folder: Path) -> None:
    """Writes a random model and eight experts of it, where they are not there yet."""
    config = {
        "model_type": "roberta",
        "architectures": ["RobertaModel"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 1,
        "torch_dtype": "float32",
    }
    for task in range(-1, NUM_TASKS):
        target = folder / ("base" if task < 0 else f"expert_{task}")
        if (target / "config.json").is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        tensors = random_model(shapes(), task)
        safetensors.numpy.save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))


def paths(folder: Path) -> tuple[Path, list[Path]]:
    """The base's file and the experts'."""
    experts = [folder / f"expert_{task}" / "model.safetensors" for task in range(NUM_TASKS)]
    return folder / "base" / "model.safetensors", experts


def read_write(folder: Path, out: Path) -> None:
    """Touches every byte of all files, and writes one model."""
    base, experts = paths(folder)
    total = 0
    for path in experts:
        for x in safetensors.numpy.load_file(path).values():
            total += int(x.view(np.uint32).max())
    tensors = safetensors.numpy.load_file(base)
    safetensors.numpy.save_file(tensors, out)


def warm(folder: Path) -> None:
    """Reads all files, so that what follows finds them in the page cache."""
    base, experts = paths(folder)
    for path in (base, *experts):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def merge(method: str, folder: Path, out: Path) -> None:
    """Fits one method and writes the merged model, or the state that recovers the experts."""
    import jax

    from retex_jax import artifact, tree
    from retex_jax.experts import ExpertSet
    from retex_jax.methods import METHODS as TABLE

    base, experts = paths(folder)
    names = [path.parent.name for path in experts]
    expert_set = ExpertSet.from_safetensors(base, experts, names=names, check_finite=False)
    state = TABLE[method].fit(expert_set, **METHODS[method])
    if isinstance(state, dict):
        tensors = tree.flatten(state)
    else:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        tensors = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    artifact.save_safetensors(out, tensors)


def worker(method: str, folder: Path) -> None:
    """One measured process: prints seconds inside and peak anonymous memory as JSON."""
    memory = AnonymousMemory()
    memory.start()
    started = time.perf_counter()
    out = folder / "merged.safetensors"
    if method == "read_write":
        read_write(folder, out)
    else:
        merge(method, folder, out)
    inside = time.perf_counter() - started
    out.unlink()
    print(json.dumps({"inside_seconds": inside, "peak_anonymous_bytes": memory.peak}))


def run_ours(method: str, folder: Path) -> dict[str, float]:
    """Measures one of our methods in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--worker", method, "--folder", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    inside = json.loads(done.stdout.splitlines()[-1])
    return {"process_seconds": time.perf_counter() - started, **inside}


def run_mergekit(program: Path, method: str, folder: Path) -> dict[str, float]:
    """Measures mergekit; its exit status does not count once the model is written."""
    name, model_options, options = MERGEKIT[method]
    config = {
        "merge_method": name,
        "dtype": "float32",
        "models": [
            {"model": str(folder / f"expert_{task}"), "parameters": model_options}
            for task in range(NUM_TASKS)
        ],
        "parameters": options,
    }
    if name != "linear":
        config["base_model"] = str(folder / "base")
    (folder / "mergekit.yml").write_text(json.dumps(config))  # JSON is YAML
    out = folder / "mergekit_out"
    peak, started = 0, time.perf_counter()
    with subprocess.Popen(
        [program, folder / "mergekit.yml", out, "--allow-crimes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        text=True,
    ) as process:
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        drain.start()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
    seconds = time.perf_counter() - started
    written = list(out.glob("*.safetensors"))
    if not written:
        raise RuntimeError(f"mergekit {name} wrote no model")
    for path in written:
        path.unlink()
    return {"process_seconds": seconds, "peak_anonymous_bytes": peak}


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What `GOALS` bounds: kind to method to ratio, of what was measured."""
    ours, mergekit = results["ours"], results["mergekit"]
    largest = max(math.prod(shape) for shape in shapes().values())
    memory = results["model_bytes"] + NUM_TASKS * 4 * largest
    base = {
        "process / mergekit": ("process_seconds", lambda m: mergekit[m]["process_seconds"]),
        "inside / read_write": (
            "inside_seconds",
            lambda m: ours["read_write"]["inside_seconds"],
        ),
        "peak / (model + stack)": ("peak_anonymous_bytes", lambda m: memory),
    }
    return {
        kind: {
            method: ours[method][figure] / of(method)
            for method in ours
            if method != "read_write" and (kind != "process / mergekit" or method in mergekit)
        }
        for kind, (figure, of) in base.items()
    }


def print_ratios(found: dict[str, dict[str, float]]) -> None:
    """One line a ratio, with its goal."""
    for kind, methods in found.items():
        for method, ratio in methods.items():
            goal = GOALS[kind].get(method)
            told = (
                "no goal"
                if goal is None
                else f"goal {goal:.3g}, {'met' if ratio <= goal else 'MISSED'}"
            )
            print(f"{kind:24} {method:16} {ratio:8.3f}  {told}")


def main() -> None:
    """Makes the checkpoints, measures everything in turn, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="5 GB of space")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml; left out when not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder)
        return
    from retex_jax import logging

    make_checkpoints(args.folder)
    results = {
        "commit": logging.commit(),
        "device": logging.device(),
        "cores": os.cpu_count(),
        "model_bytes": paths(args.folder)[0].stat().st_size,
        "ours": {},
        "mergekit": {},
    }
    for method in args.methods:
        ours, theirs = [], []
        for _ in range(args.repeats):
            warm(args.folder)
            ours.append(run_ours(method, args.folder))
            if args.mergekit and method in MERGEKIT:
                warm(args.folder)
                theirs.append(run_mergekit(args.mergekit, method, args.folder))
        results["ours"][method] = medians(ours)
        print(method, results["ours"][method], flush=True)
        if theirs:
            results["mergekit"][method] = medians(theirs)
            print("  mergekit", results["mergekit"][method], flush=True)
    results["ratios"] = ratios(results)
    print_ratios(results["ratios"])
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
