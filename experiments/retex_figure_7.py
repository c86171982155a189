"""ReTeX, figure 7: the scales gamma of the affine form while Adam learns it, by kind of layer.

    python experiments/retex_figure_7.py --suite=minilm_text8

Means over tasks and layers of a kind, by step; rank and settings of Adam are those of the suite (`config.offsets`). A
fit that is finished is kept in the workdir.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import paper_output
import paper_programs
import papers

from retex_jax import artifact, collection, command_line, experiment, logging, offsets

CHUNKS = 32


def learn(config: papers.ConfigDict, workdir: Path) -> Mapping[str, Any]:
    """Fits the affine form, and writes gamma of every matrix leaf, the mean over tasks, after every chunk of steps."""
    settings = command_line.as_dict(config)
    experiment.start()
    experiment.fetch(settings, announce=logging.info)
    collected = collection.collect(settings, *experiment.load(settings))
    spec = settings["offsets"]
    chunk = max(1, spec["adam"]["steps"] // CHUNKS)
    with logging.progress(spec["adam"]["steps"], "fit offsets, adam") as bar:
        state = offsets.fit(
            collected.experts,
            key=jax.random.key(settings["seed"]),
            form="affine",
            solver="adam",
            rank=spec["rank"],
            base=spec["base"],
            base_options=spec["base_options"],
            progress=lambda done, _, loss: bar.update(done, loss=loss),
            **{**spec["adam"], "chunk_steps": chunk, "checkpoint_every": chunk},
        )
    gammas = {name: x.mean(axis=1).tolist() for name, x in state.report.gammas.items()}
    experts_of = experiment.checkpoint_set(settings)
    results = {"checkpoint_set": experts_of, "chunk_steps": chunk, "gammas": gammas}
    workdir.mkdir(parents=True, exist_ok=True)
    artifact.write_json(workdir / "results.json", results)
    return results


def rows(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A curve a kind of layer, after 1, 2, 4, ... chunks of steps."""
    kinds: dict[str, list[list[float]]] = {}
    for name, by_chunk in results["gammas"].items():
        parts = name.split("/")[:-1]
        kind = "/".join(part for part in parts if not part[-1].isdigit())
        kinds.setdefault(kind, []).append(by_chunk)
    counts = [2**n for n in range(12) if 2**n <= min(map(len, results["gammas"].values()))]
    return {
        kind: {
            str(count * results["chunk_steps"]): paper_output.mean([one[count - 1] for one in each])
            for count in counts
        }
        for kind, each in kinds.items()
    }


if __name__ == "__main__":
    paper_programs.programmed(__file__, rows, "gammas", learn)
