"""ReTeX, table 4: what an input of an unknown task costs, of the methods that give each input a model of its own.

    python experiments/retex_table_4.py --suite=minilm_text8

One shuffled batch of all tasks' test inputs, warm, all methods in turn in each repeat: seconds an input, and times a
plain pass of the merged model, medians over the repeats. ReTeX's include the identification. What is held is the merged
model and what the method stores, in models. Accuracies are of `evaluate.routed_inputs` inputs a task, whose own heads
predict.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import paper_programs
import papers

from retex_jax import (
    artifact,
    collection,
    command_line,
    data,
    evaluate,
    experiment,
    identification,
    logging,
    protocols,
    recovery,
    tree,
)
from retex_jax.bench import Bench
from retex_jax.identify.__main__ import fit_offsets
from retex_jax.methods import METHODS

MODES = {
    "ReTeX, sample-wise": "sample_wise",
    "ReTeX, grouped": "grouped",
    "ReTeX, in factors": "factored",
}
ROUTED = {"Twin-Merging": papers.Entry("twin"), "DaWin": papers.Entry("dawin")}
PLAIN = "plain pass"
REPEATS = 5

Passes = dict[str, Callable[[], Any]]
"""What is said of a method, and a call that takes the batch through it."""


def measure(config: papers.ConfigDict, workdir: Path) -> Mapping[str, Any]:
    """Fits ReTeX and the routed methods, and writes what each takes and reaches."""
    settings = command_line.as_dict(config)
    experiment.start()
    experiment.fetch(settings, announce=logging.info)
    backbone, tasks = experiment.load(settings)
    collected = collection.collect(settings, backbone, tasks)
    bench = Bench(settings, backbone, tasks, collected, logging.Clock())
    few, size = bench.routed, bench.suite.batch_size
    mixed = protocols.mixed_test(few.tasks, few.seed)
    batch = data.trim({name: mixed[name][:size] for name in backbone.model.example_batch()})

    with logging.progress(1, "fit ReTeX"):
        passes, row = recovered(bench, few, batch)
    rows = dict.fromkeys(MODES, row)
    for label, entry in ROUTED.items():
        with logging.progress(1, f"fit {label}"):
            passes[label], rows[label] = routed(bench, papers.configured(entry, config), batch)
    seconds = timed(passes)
    model_bytes = tree.param_bytes(collected.experts.expert_params(0))
    results = {
        "commit": logging.commit(),
        "checkpoint_set": experiment.checkpoint_set(settings),
        "device": logging.device(),
        "rows": {
            label: {
                "seconds": taken / len(mixed["task"][:size]),
                "passes": taken / seconds[PLAIN],
                "held": 1 + rows[label]["bytes_per_task"] * len(tasks) / model_bytes,
                "normalized_accuracy": rows[label]["normalized_accuracy"],
            }
            for label, taken in seconds.items()
            if label != PLAIN
        },
    }
    workdir.mkdir(parents=True, exist_ok=True)
    artifact.write_json(workdir / "results.json", results)
    return results


def recovered(
    bench: Bench, few: protocols.Suite, batch: Mapping[str, np.ndarray]
) -> tuple[Passes, dict[str, Any]]:
    """A plain pass and ReTeX's ways to take one; and ReTeX's row, with the backbone routed."""
    model, size, key = few.model, few.batch_size, bench.key(0)
    state = fit_offsets(bench.settings, bench.collected, key, bench.calibrations["train"])
    identifier, _ = identification.obtain(bench.settings, model, state, bench.suite.tasks, key)
    recoverer = recovery.Recoverer(model, state, max_batch=size)

    def identified(mode: recovery.Mode) -> np.ndarray:
        ids = recovery.identify(model, state.merged, identifier, batch, size)
        return recoverer.features(batch, ids, mode)

    passes: Passes = {PLAIN: lambda: recovery.run(model, state.merged, batch, size)}
    passes |= {label: lambda mode=mode: identified(mode) for label, mode in MODES.items()}
    (row, _), _ = evaluate.unknown_rows(few, "", state, identifier, 0.0)
    return passes, row


def routed(
    bench: Bench, entry: papers.Entry, batch: Mapping[str, np.ndarray]
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """How a routed method takes the batch, and its row."""
    method, model = METHODS[entry.method], bench.calibrations["test"]
    options = {**entry.options, **bench.data_options(entry)}
    state = method.fit(bench.experts(None), key=bench.key(0), **options)
    row = evaluate.routed_row(bench.routed, entry.method, "", state, model, 0.0)
    return lambda: jax.block_until_ready(method.predict(state, model, batch)), row


def timed(passes: Passes) -> dict[str, float]:
    """Median seconds of each, all in turn, after a first round that compiles."""
    found: dict[str, list[float]] = {label: [] for label in passes}
    with logging.progress(1 + REPEATS, "time all methods") as bar:
        for repeat in range(1 + REPEATS):
            for label, call in passes.items():
                started = time.perf_counter()
                call()
                found[label].append(time.perf_counter() - started)
            bar.update(repeat + 1)
    return {label: float(np.median(seconds[1:])) for label, seconds in found.items()}


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A row a method."""
    return results["rows"]


if __name__ == "__main__":
    paper_programs.programmed(
        __file__, rows, "costs", measure, unit="seconds, passes, models; accuracy"
    )
