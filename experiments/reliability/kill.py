"""Kills runs at random moments, resumes them, and compares what they leave with runs that nothing killed, bit by bit.

    python experiments/reliability/kill.py --kills=200 --results=experiments/results/reliability/kill.json

The phases are those of a tiny experiment: fine-tuning two experts of a random transformer on drawn images; and, of two
drawn experts, the Adam fit, the exact fit into a file, and writing the released artefact again and again. Every run is
a process that is forked after all imports, and half of them are killed (SIGKILL) at a random moment of their time; the
others kill themselves when they are about to open, flush, rename or remove the n-th file. A run that was killed is
started again, and may be killed again, until it ends by itself. After every kill an artefact that was there before must
load. At the end everything that the phase has written must be the same to the last bit, and no other file may lie
beside it. Prints counts by phase, and exits with 1 if anything is lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from retex_jax import artifact, checkpoint, data, finetune, offsets, pretrained, release
from retex_jax.experts import ExpertSet, read_safetensors
from retex_jax.identifier import IDENTIFIERS
from retex_jax.recovery import Identifier

NAMES = ("dots", "bars")
MODEL = {
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 16,
    "pool": "mean",
}
FINETUNE = {
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "head_learning_rate": 3e-2,
    "weight_decay": 0.05,
    "warmup_steps": 2,
    "checkpoint_every": 2,
    "seed": 0,
}
ADAM = {"steps": 8, "warmup_steps": 2, "chunk_steps": 1, "checkpoint_every": 2}
RANK = 4
NUM_WRITES = 40
AGAIN = 0.7  # the share of resumed runs that are killed as well
# Part of a record that a clock decides, and the hash that covers it.
CLOCKED = {"seconds", "sha256"}
WRITES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def tasks() -> list[data.Task]:
    """Two tasks of drawn images: each class a pattern under noise."""
    made = []
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        patterns = rng.normal(0, 30, (3, 8, 8, 1))
        splits = {}
        for split, count in (("train", 24), ("val", 9), ("test", 9)):
            labels = np.arange(count, dtype=np.int32) % 3
            drawn = 100 + patterns[labels] + rng.normal(0, 20, (count, 8, 8, 3))
            splits[split] = {"image": np.clip(drawn, 0, 255).astype(np.uint8), "label": labels}
        made.append(data.Task(name, ("a", "b", "c"), splits, "drawn", "none"))
    return made


def run_finetune(folder: Path, _: Path) -> None:
    """Makes the experts."""
    backbone = pretrained.load_backbone("vit", MODEL)
    finetune.build_experts(backbone, tasks(), folder / "experts", FINETUNE, checkpoint_set="tiny")


def run_adam(folder: Path, inputs: Path) -> None:
    """Fits the offsets by Adam, with checkpoints, and writes them."""
    state = offsets.fit(
        open_experts(inputs),
        rank=RANK,
        solver="adam",
        checkpoints=checkpoint.Checkpointer(folder / "unfinished"),
        **ADAM,
    )
    release.save(folder, released(state, inputs, {"solver": "adam"}))
    shutil.rmtree(folder / "unfinished")


def run_exact(folder: Path, inputs: Path) -> None:
    """Solves the offsets into a file, every leaf as a group of its own."""
    experts, file = open_experts(inputs), folder / "offsets.safetensors"
    offsets.fit(experts, rank=RANK, group_bytes=1, bits=3, file=file, resume="tiny")


def run_artifact(folder: Path, inputs: Path) -> None:
    """Writes two artefacts in turn over each other; the last one is the second."""
    state = offsets.fit(open_experts(inputs), rank=RANK)
    for number in range(NUM_WRITES):
        release.save(folder, released(state, inputs, {"number": number % 2}))


PHASES = {
    "finetune": run_finetune,
    "adam": run_adam,
    "exact": run_exact,
    "artifact": run_artifact,
}


def draw_experts(inputs: Path) -> None:
    """Writes a pretrained model and two experts."""
    shapes = {f"block_{n}/{side}/kernel": (16, 24) for n in range(6) for side in ("in", "out")}
    shapes |= {"norm/scale": (16,), "head/kernel": (16, 3), "head/bias": (3,)}
    for number, name in enumerate((finetune.PRETRAINED, *NAMES)):
        rng = np.random.default_rng(number)
        leaves = {leaf: rng.normal(size=shape).astype("f4") for leaf, shape in shapes.items()}
        artifact.save_safetensors(inputs / f"{name}.safetensors", leaves)


def open_experts(inputs: Path) -> ExpertSet:
    """The drawn experts."""
    paths = [inputs / f"{name}.safetensors" for name in NAMES]
    pretrained_path = inputs / f"{finetune.PRETRAINED}.safetensors"
    return ExpertSet.from_safetensors(pretrained_path, paths, layout="flax", exclude=["^head/"])


def released(state: offsets.OffsetState, inputs: Path, facts: dict[str, Any]) -> release.Release:
    """What an artefact holds."""
    features = [np.random.default_rng(task).normal(size=(9, 16)).astype("f4") for task in (0, 1)]
    known = IDENTIFIERS["subspace"].fit(features, rank=2)
    heads = {
        name: read_safetensors(inputs / f"{name}.safetensors", "^head/")["head"] for name in NAMES
    }
    return release.Release(state, Identifier(known, 0, "subspace"), heads, facts)


class Run:
    """A process that runs one phase.

    Attributes:
      seconds: from its start to its end.
      is_killed: whether it was.
    """

    def __init__(self, phase: str, folder: Path, inputs: Path, cache: Path):
        self._arguments = phase, folder, inputs, cache
        self.log = cache / "log.txt"
        self.seconds = 0.0
        self.is_killed = False

    def start(self, *, delay: float | None = None, write: int | None = None) -> None:
        """Runs it to its end.

        Args:
          delay: seconds after which it is killed.
          write: number of the change of a file before which it kills itself.

        Raises:
          RuntimeError: if it fails by itself, with what it has said.
        """
        started = time.monotonic()
        process = os.fork()
        if not process:
            self._work(write)
        limit = float("inf") if delay is None else started + delay
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if time.monotonic() > limit:
                os.kill(process, signal.SIGKILL)
                limit = float("inf")
            time.sleep(0.002)
        self.seconds = time.monotonic() - started
        code = os.waitstatus_to_exitcode(ended[1])
        self.is_killed = code == -signal.SIGKILL
        if code and not self.is_killed:
            raise RuntimeError(f"exit code {code}: {self.log.read_text(errors='replace')[-2000:]}")

    def _work(self, write: int | None) -> None:
        phase, folder, inputs, cache = self._arguments
        code = 1
        try:
            with self.log.open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            jax.config.update("jax_disable_most_optimizations", True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            count = count_writes(folder, write)
            PHASES[phase](folder, inputs)
            (cache / "writes").write_text(str(count[0]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def count_writes(folder: Path, last: int | None) -> list[int]:
    """Counts the changes below a folder, and the flushes, of this process, and kills it before the last one."""
    count, prefix, flush = [0], str(folder), os.fsync

    def add() -> None:
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or not str(arguments[0]).startswith(prefix):
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            add()

    def counted(descriptor: int) -> None:
        add()
        flush(descriptor)

    sys.addaudithook(hook)
    os.fsync = counted
    return count


def left(folder: Path) -> dict[str, Any]:
    """What a phase has written: path to content, without clock times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        content: Any = path.read_bytes()
        if path.suffix == ".json" and path.stem in NAMES:
            record = json.loads(content)
            content = {name: value for name, value in record.items() if name not in CLOCKED}
        found[str(path.relative_to(folder))] = content
    return found


def has_work(folder: Path) -> bool:
    """Whether a killed run has left finished work."""
    names = {path.name for path in folder.rglob("*")}
    journal = folder / ".offsets.safetensors.journal"
    is_begun = journal.is_file() and journal.read_bytes().count(b"\n") > 1
    return is_begun or bool(names & {"record.json", artifact.MANIFEST, "dots.json"})


class Phase:
    """One phase, its undisturbed run, and what became of the runs that were killed.

    Attributes:
      counts: of "killed" (of these "with work": finished work lay in the folder), "equal" and "lost" kills.
      seconds: that its trials have taken; the next is of a phase without a kill, or of the one that had the least.
    """

    def __init__(self, name: str, root: Path, inputs: Path):
        """Runs it twice undisturbed: the first run compiles.

        Raises:
          RuntimeError: if the two leave other bits.
        """
        self.name, self._root, self._inputs = name, root, inputs
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._cache = root / "cache" / name
        self._cache.mkdir(parents=True)
        found = []
        for turn in ("compiling", "whole"):
            run = self._run(root / turn / name)
            run.start()
            found.append(left(root / turn / name))
        if differing := differences(*found):
            raise RuntimeError(f"{name}: two undisturbed runs differ in {differing}")
        self._whole, self._expected = found[1], run.seconds
        self._writes = int((self._cache / "writes").read_text())
        print(
            f"{name}: {run.seconds:.1f} s, {self._writes} changes and flushes of files", flush=True
        )

    def trial(self, rng: random.Random, most: int) -> int:
        """Kills a run, at most so many times, and lets it end; returns how many times."""
        started, killed = time.monotonic(), 0
        folder = self._root / "trials" / self.name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            while True:
                run = self._run(folder)
                if killed < most and (not killed or rng.random() < AGAIN):
                    at_random = rng.random() < 0.5
                    delay = rng.uniform(0, self._expected) if at_random else None
                    run.start(delay=delay, write=None if delay else rng.randint(1, self._writes))
                else:
                    run.start()
                if not run.is_killed:
                    break
                killed += 1
                self.counts["with work"] += has_work(folder)
                if (folder / artifact.MANIFEST).is_file():
                    artifact.load(folder)
            self._expected = 0.8 * self._expected + 0.2 * run.seconds
            problem = differences(left(folder), self._whole)
        except (RuntimeError, ValueError, OSError) as error:
            problem = [f"{type(error).__name__}: {error}"]
        self.counts["killed"] += killed
        self.counts["lost" if problem else "equal"] += killed
        if problem:
            print(f"lost: {self.name}: {'; '.join(problem)}", flush=True)
            self.counts["lost"] += not killed
        self.seconds += time.monotonic() - started
        return killed

    def _run(self, folder: Path) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        return Run(self.name, folder, self._inputs, self._cache)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The paths that only one has, or whose content differs."""
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def main() -> None:
    """Kills and compares; prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--results", type=Path, help="JSON file that takes the counts")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        inputs = root / "inputs"
        inputs.mkdir()
        draw_experts(inputs)
        phases = [Phase(name, root, inputs) for name in options.phases]
        most = max(1, options.kills // (2 * len(phases)))  # of one trial
        done = turn = 0
        while done < options.kills and turn < 10 * options.kills:
            phase = min(phases, key=lambda phase: (phase.counts["killed"] > 0, phase.seconds))
            done += phase.trial(rng, min(most, options.kills - done))
            turn += 1
            lost = sum(phase.counts["lost"] for phase in phases)
            print(f"{done} of {options.kills} kills, {lost} lost", flush=True)
    columns = ("killed", "with work", "equal", "lost")
    print("phase      " + "".join(f"{column:>11}" for column in columns))
    for phase in phases:
        print(f"{phase.name:<11}" + "".join(f"{phase.counts[column]:>11}" for column in columns))
    total = {column: sum(phase.counts[column] for phase in phases) for column in columns}
    print(f"{'all':<11}" + "".join(f"{total[column]:>11}" for column in columns))
    if options.results:
        rows = {
            phase.name: {column: phase.counts[column] for column in columns} for phase in phases
        }
        facts = {"kills": options.kills, "seed": options.seed, "phases": rows, "all": total}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(1 if total["lost"] or total["killed"] < options.kills else 0)


if __name__ == "__main__":
    main()
