"""Reads files that were damaged or made up: each must give the right answer or a clear error.

    python experiments/reliability/fuzz.py --cases=10000 --results=experiments/results/reliability/fuzz.json

A case changes one file of a small sample (bit flips, truncations, bytes that are inserted or missing, tensors that are
swapped, headers and JSON with absurd sizes, paths, duplicate keys and deep nesting, files that are missing or are
another's) and reads it with the library in a process of limited memory. Counted by format:

  right      what was written, or an older step or a missing row that the library falls back to
  error      ValueError or OSError with the name of the file
  no hash    another answer, and it is what the files say: they have no hash (checkpoints of others), so that nothing
             can notice it; compared with an independent reader
  other      of hostile cases, whose hashes were written anew: another artefact, which loads and recovers an expert
  bad        anything else: a wrong answer, another error, a crash, a hang, memory beyond the limit

Prints the counts and every bad case, and exits with 1 if there is one. `--only=N` runs one case.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import formats
import mutations

OUTCOMES = ("right", "error", "no hash", "other", "bad")
MEMORY = 1 << 30  # bytes that a worker may take beyond what it has when it is warm
SECONDS = 1800  # until a case counts as a hang; machines are shared
HOSTILE = 0.2


class Worker:
    """A process that runs cases, and tells the outcome of each."""

    def __init__(self, root: Path, seed: int, cases: range):
        """Starts it."""
        self.case = cases.start
        reading, writing = os.pipe()
        self.process = os.fork()
        if not self.process:
            os.close(reading)
            run_cases(root, seed, cases, writing)
        os.close(writing)
        self._pipe = os.fdopen(reading)

    def next(self) -> tuple[str, str, str] | None:
        """Format, outcome and details of the next case; None after the last one."""
        ready = select.select([self._pipe], [], [], SECONDS)[0]
        line = self._pipe.readline() if ready else ""
        self.case += 1
        if line:
            told = json.loads(line)
            return told if told else None
        os.kill(self.process, signal.SIGKILL)
        status = os.waitpid(self.process, 0)[1]
        what = f"crash, status {os.waitstatus_to_exitcode(status)}" if ready else "hang"
        return format_of(self.case - 1).name, "bad", what

    def close(self) -> None:
        """Waits for its end."""
        self._pipe.close()
        os.waitpid(self.process, 0)


def format_of(case: int) -> Any:
    """The format of a case: in turn, by their shares."""
    turns = [each for each in formats.FORMATS for _ in range(each.share)]
    random.Random(0).shuffle(turns)
    return turns[case % len(turns)]


def run_cases(root: Path, seed: int, cases: range, pipe: int) -> None:
    """Runs cases in this process, and ends it."""
    log = (root / "log.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    warnings.simplefilter("ignore")
    try:
        expected = {}
        for each in formats.FORMATS:
            sample = root / "samples" / each.name
            if not sample.exists():
                sample.mkdir(parents=True)
                each.write(sample)
            mutations.fresh(sample, root / "case")
            expected[each.name] = each.read(root / "case")
            if hasattr(each, "use"):
                each.use(root / "case")
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in cases:
            told = [format_of(case).name, *run_case(root, seed, case, expected)]
            os.write(pipe, (json.dumps(told) + "\n").encode())
        os.write(pipe, b"[]\n")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def run_case(root: Path, seed: int, case: int, expected: dict[str, Any]) -> tuple[str, str]:
    """Changes a sample and reads it: outcome and details."""
    rng, kind, folder = random.Random(f"{seed} {case}"), format_of(case), root / "case"
    mutations.fresh(root / "samples" / kind.name, folder)
    files = {path.name for path in folder.rglob("*")} | {folder.name}
    done = mutations.mutate(folder, rng)
    is_hostile = hasattr(kind, "make_fit") and rng.random() < HOSTILE
    if is_hostile:
        try:
            kind.make_fit(folder, done, rng)
        except Exception:  # what cannot be read has no hashes to write
            is_hostile = False
    details = f"{done}{', hashes written anew' if is_hostile else ''}"
    try:
        found = kind.read(folder)
        if is_hostile and hasattr(kind, "use"):
            kind.use(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        is_named = any(name in text or Path(name).stem in text for name in files)
        return ("error", "") if is_named else ("bad", f"{details}: error without a name: {error!r}")
    except BaseException as error:
        return "bad", f"{details}: {''.join(traceback.format_exception(error)[-3:])}"
    answers = [expected[kind.name], *(kind.answers() if hasattr(kind, "answers") else [])]
    if any(formats.same(found, answer) for answer in answers):
        return "right", ""
    if is_hostile:
        return "other", ""
    try:
        if hasattr(kind, "truth") and formats.same(found, kind.truth(folder)):
            return "no hash", ""
    except Exception as error:
        details += f" (independently read: {error!r})"
    return "bad", f"{details}: wrong answer"


def main() -> None:
    """Runs all cases and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one case")
    parser.add_argument("--results", type=Path, help="JSON file that takes the counts")
    options = parser.parse_args()
    is_one = options.only is not None
    cases = range(options.only, options.only + 1) if is_one else range(options.cases)
    counts: dict[str, Counter[str]] = {each.name: Counter() for each in formats.FORMATS}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        worker = Worker(root, options.seed, cases)
        while told := worker.next():
            name, outcome, details = told
            counts[name][outcome] += 1
            if outcome == "bad":
                print(f"bad: case {worker.case - 1}, {name}: {details}", flush=True)
            done = sum(sum(each.values()) for each in counts.values())
            if done % 500 == 0:
                print(f"{done} of {len(cases)} cases", flush=True)
            if details.startswith(("crash", "hang")):
                if not any(each["right"] for each in counts.values()) and done > 3:
                    sys.exit(f"the worker does not start: {(root / 'log.txt').read_text()[-3000:]}")
                worker = Worker(root, options.seed, range(worker.case, cases.stop))
        worker.close()
    print(f"{'format':<16}{'cases':>8}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for name, own in counts.items():
        print(
            f"{name:<16}{sum(own.values()):>8}"
            + "".join(f"{own[outcome]:>9}" for outcome in OUTCOMES)
        )
    total = sum(counts.values(), Counter())
    print(
        f"{'all':<16}{sum(total.values()):>8}"
        + "".join(f"{total[outcome]:>9}" for outcome in OUTCOMES)
    )
    if options.results:
        rows = {
            name: {outcome: own[outcome] for outcome in OUTCOMES} for name, own in counts.items()
        }
        facts = {
            "cases": sum(total.values()),
            "seed": options.seed,
            "formats": rows,
            "all": {outcome: total[outcome] for outcome in OUTCOMES},
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(1 if total["bad"] or sum(total.values()) < len(cases) else 0)


if __name__ == "__main__":
    main()
