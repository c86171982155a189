"""The tables of README.md and of experiments/docs, from the committed results.

Read are experiments/results/*/results.json, experiments/results/papers/rows, experiments/benchmarks/*.json and the
tables of the package. `BLOCKS` has the tables by name.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import findings as ablations
from compared import (
    FAMILIES,
    FRONTS,
    IN_SHORT,
    KEPT_APART,
    ONE_MODEL,
    ROUTED,
    SIZES,
    SUITES,
    WEIGHTED,
    WEIGHTS,
    Entry,
)

ROOT = Path(__file__).parents[1]


@functools.cache
def read(path: str) -> Any:
    """A JSON file, by its path in the repository."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def results_path(experiment: str) -> str:
    """Where an experiment's results lie."""
    return f"experiments/results/{experiment}/results.json"


def entry(suite: str, name: Entry) -> dict[str, Any] | None:
    """The row of a comparison of all methods; None where the suite has none."""
    name = name if isinstance(name, str) else name[SUITES.index(suite)]
    if name is None:
        return None
    path = results_path(f"{suite}_compare")
    return _only(path, [row for row in read(path)["rows"] if row["entry"] == name], name)


def row(experiment: str, method: str, *, rank: int | None = None, told: str = "known") -> Any:
    """The row of an experiment; `told` is what it knew: "known" (the task), "head" or "nothing"."""
    path = results_path(experiment)
    knew = {"known": (True, True), "head": (False, True), "nothing": (False, False)}[told]
    found = [
        row
        for row in read(path)["rows"]
        if row["method"] == method
        and (row["task_known"], row["head_known"]) == knew
        and (rank is None or row["variant"].endswith(f" r={rank}"))
    ]
    return _only(path, found, f"{method}, rank {rank}, {told}")


def _only(path: str, found: Sequence[Any], what: str) -> Any:
    if len(found) != 1:
        raise ValueError(f"{path}: got {len(found)} rows of {what!r}, expected one")
    return found[0]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; of the columns after the first, numbers are at the right."""
    rows = list(rows)
    align = ["---", *(["---:"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))


def score(found: dict[str, Any]) -> str:
    """Normalized accuracy, with the standard deviation where there are several seeds, and what was chosen."""
    text = f"{found['normalized_accuracy']:.3f}"
    if (spread := found.get("normalized_accuracy_std")) is not None:
        text += f" ± {spread:.3f}"
    chosen = re.search(r"=([\d.]+) \(validation\)", found["variant"])
    return f"{text} ({chosen[1]})" if chosen else text


def percent(fraction: float) -> str:
    """Three digits."""
    return f"{100 * fraction:.3g}%"


def told_source(path: str, commits: Iterable[str]) -> str:
    """A file, and the commits that its rows were made with; a row of several seeds may name several."""
    different = dict.fromkeys(one for commit in commits for one in commit.split(", "))
    return f"`{path}` (commits {', '.join(f'`{commit}`' for commit in different)})"


def demo() -> str:
    """Accuracy of each task of the demo."""
    results = read(results_path("demo"))
    columns = {
        "linear probe": results["linear_probe"],
        "expert": results["individual"],
        "Weight Averaging": row("demo", "weight_average")["accuracy"],
        "recovered": row("demo", "retex", rank=64)["accuracy"],
        "routed": row("demo", "retex", rank=64, told="head")["accuracy"],
        "nothing known": row("demo", "retex", rank=64, told="nothing")["accuracy"],
    }
    rows = [
        [task, *(f"{accuracy[task]:.3f}" for accuracy in columns.values())]
        for task in results["tasks"]
    ]
    known = [row("demo", "weight_average"), row("demo", "retex", rank=64)]
    unknown = [row("demo", "retex", rank=64, told=told) for told in ("head", "nothing")]
    rows.append(["normalized", "", "1", *(score(found) for found in (*known, *unknown))])
    others = {
        name: row("demo", name)["normalized_accuracy"] for name in ("task_arithmetic", "ties")
    }
    sent = unknown[0]["identification_accuracy"]
    told = (
        f"`{results_path('demo')}`, commit `{results['commit']}`, seed {results['seed']}. Normalized, Task "
        f"Arithmetic (scaling 0.3) reaches {others['task_arithmetic']:.3f} and TIES (density 0.2) "
        f"{others['ties']:.3f}. {percent(sent)} of the mixed test inputs are sent to the right task. The offsets "
        f"take {percent(known[1]['amr'])} of the model a task at rank {results['offsets']['rank']}. With cached "
        f"experts the run took {sum(results['seconds'].values()):.0f} s."
    )
    return f"{table(['task', *columns], rows)}\n\n{told}"


def solvers() -> str:
    """The closed form beside the paper's loop, on the demo."""
    rows = []
    for name in ("demo", "demo_adam_rank64", "demo_adam_rank16"):
        found = read(results_path(name))
        fit, shown = found["offsets"], "closed form"
        if fit["solver"] == "adam":
            adam = read(f"experiments/results/{name}/config.json")["offsets"]["adam"]
            shown = f"Adam, {adam['steps']} steps, {adam['learning_rate']:g}"
        rank = fit["rank"]
        recovered = score(row(name, "retex", rank=rank))
        figures = (
            f"{fit['ratio']:.4f}",
            recovered,
            f"{fit['seconds']:.0f}",
            f"`{found['commit']}`",
        )
        rows.append([shown, str(rank), *figures, f"`{name}`"])
    header = ["solver", "rank", "residual / optimum", "recovered", "seconds", "commit"]
    return table([*header, "`experiments/results/`"], rows)


def unknown_tasks() -> str:
    """What is left where the task has to be identified."""
    rows = []
    for name in ("demo", *SUITES):
        found = read(results_path(name))
        told = {
            told: row(name, "retex", rank=64, told=told) for told in ("known", "head", "nothing")
        }
        sent = percent(told["head"]["identification_accuracy"])
        rows.append([f"`{name}`", *map(score, told.values()), sent, f"`{found['commit']}`"])
    header = [
        "`experiments/results/`",
        "recovered",
        "routed",
        "nothing known",
        "right task",
        "commit",
    ]
    return table(header, rows)


def _comparison(*groups: dict[str, Entry], shown: Sequence[str] | None = None) -> str:
    entries = {label: name for group in groups for label, name in group.items()}
    labels = list(entries) if shown is None else shown
    header, commits = ["method"], []
    for suite in SUITES:
        header += [f"`{suite}`", "bytes a task"]
    rows = []
    for label in labels:
        cells = [label]
        for suite in SUITES:
            if found := entry(suite, entries[label]):
                cells += [score(found), percent(found["amr"])]
                commits.append((suite, found["commit"]))
            else:
                cells += ["", ""]
        rows.append(cells)
    files = " and ".join(
        told_source(results_path(f"{suite}_compare"), (c for s, c in commits if s == suite))
        for suite in SUITES
    )
    return f"{table(header, rows)}\n\nFrom {files}."


def comparison() -> str:
    """The usual setting of each method, beside ours."""
    return _comparison(ONE_MODEL, KEPT_APART, ROUTED, shown=IN_SHORT)


def comparison_one_model() -> str:
    """All that merge into one model."""
    return _comparison(ONE_MODEL)


def comparison_kept_apart() -> str:
    """All that keep experts apart, the task being known."""
    return _comparison(KEPT_APART)


def comparison_routed() -> str:
    """All that mix experts by input."""
    return _comparison(ROUTED)


def fronts() -> str:
    """The best row of every method that stores no more than a size, by suite."""
    return "\n\n".join(_front(name) for name in FRONTS)


def weights() -> str:
    """The same of offsets by budget, by how their errors are weighed."""
    return "\n\n".join(_front(name, WEIGHTED) for name in WEIGHTS)


def _front(name: str, families: Mapping[str, str] = FAMILIES) -> str:
    results = read(results_path(name))
    steps = [step for step in itertools.pairwise((0, *SIZES)) if _between(results["rows"], *step)]
    rows, above = [], []
    for label, pattern in families.items():
        family = [found for found in results["rows"] if re.fullmatch(pattern, found["entry"])]
        fitting = [
            _between(family, 0, size) if _between(family, below, size) else []
            for below, size in steps
        ]
        if any(fitting):
            rows.append([label, *(_best(found) if found else "" for found in fitting)])
        else:
            least = min(family, key=lambda found: found["amr"])
            above.append(f"{label} {_best(family)} at {percent(least['amr'])}")
    seeds = ", ".join(map(str, results["expert_seeds"]))
    source = told_source(results_path(name), (row["commit"] for row in results["rows"]))
    average = [found for found in results["rows"] if found["entry"] == "weight_average"]
    told = [
        f"Experts of seeds {seeds}: normalized accuracy, half a 95% interval of the mean, and the worst task; the best "
        "of what stores no more; empty where the method has no row between a size and the one before.",
        f"Larger in any case: {'; '.join(above)}." if above else "",
        f"Weight Averaging, which stores nothing: {_best(average)}." if average else "",
        f"From {source}.",
    ]
    header = [f"`{name}`", *(percent(size) for _, size in steps)]
    return f"{table(header, rows)}\n\n{' '.join(filter(None, told))}"


def _between(rows: Sequence[dict[str, Any]], below: float, size: float) -> list[dict[str, Any]]:
    return [found for found in rows if below < found["amr"] <= size]


def _best(found: Sequence[dict[str, Any]]) -> str:
    best = max(found, key=lambda row: row["normalized_accuracy"])
    score, worst = best["normalized_accuracy"], best["worst_normalized_accuracy"]
    return f"{score:.4f} ± {best['normalized_accuracy_interval']:.4f} ({worst:.3f})"


def findings() -> str:
    """What each ablation buys, by suite."""
    return "\n\n".join(map(_findings, SUITES))


def _findings(suite: str) -> str:
    rows, used = [], {}
    for change in ablations.changes(suite):
        found = [
            (source.path, bought)
            for source in ablations.sources(suite)
            if (bought := ablations.difference(change, source.found)) is not None
        ]
        if found:
            path, bought = max(found, key=lambda one: len(one[1]["seeds"]))
            points = f"{100 * bought['mean']:+.2f} ± {100 * bought['half_width']:.2f}"
            stored = [percent(bought[name]) for name in ("plain", "changed")]
            rows.append([change.what, points, *stored, " ".join(map(str, bought["seeds"]))])
            used.setdefault(path, []).extend(bought["commits"])
    header = [f"`{suite}`", "points", "bytes a task", "with the change", "seeds"]
    told = "; ".join(told_source(path, commits) for path, commits in used.items())
    return f"{table(header, rows)}\n\nFrom {told}."


def unseen() -> str:
    """What is made of the other tasks' experts for tasks whose own are left out."""
    path = "experiments/results/papers/rows/minilm_text8_unseen/seed_0/results.json"
    found = read(path)

    def told(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.3f} ± {row[f'{name}_interval']:.3f}"

    rows = [
        [
            row["rule"],
            told(row, "unseen_accuracy"),
            told(row, "gain"),
            f"{row['seen_normalized_accuracy']:.3f}",
        ]
        for row in found["rows"]
    ]
    header = ["`minilm_text8`", "unseen tasks", "above pretrained", "seen tasks, normalized"]
    held = "; ".join(", ".join(split["unseen"]) for split in found["splits"])
    made = (row["commit"] for split in found["splits"] for row in split["rows"].values())
    return (
        f"{table(header, rows)}\n\nAccuracies, and half a 95% interval of the mean over {len(found['splits'])} splits "
        f"({held} left out). From {told_source(path, made)}, seed {found['seed']}."
    )


def benchmarks() -> str:
    """Time and memory of mergers beside mergekit, and of forward passes beside torch."""
    path = "experiments/benchmarks/mergers.json"
    found = read(path)
    rows = []
    for method, theirs in found["mergekit"].items():
        cells = [f"`{method}`"]
        for measured in (found["ours"][method], theirs):
            cells.append(f"{measured['process_seconds']:.1f}")
            cells.append(f"{measured['peak_anonymous_bytes'] / 1e6:.0f}")
        rows.append(cells)
    passes = "experiments/benchmarks/forward.json"
    forward = read(passes)
    ratios = " and ".join(
        f"{forward[key]['ratio']:.2f} times ({name})"
        for key, name in (("clip_vit_b32", "CLIP ViT-B/32"), ("roberta_base", "RoBERTa-base"))
    )
    header = ["merger", "seconds", "peak MB", "mergekit's seconds", "mergekit's peak MB"]
    return (
        f"{table(header, rows)}\n\nFrom `{path}`, commit `{found['commit']}`, {found['cores']} cores. Forward "
        f"passes run at {ratios} the speed of transformers' torch models (`{passes}`, commit "
        f"`{forward['commit']}`)."
    )


def pipeline() -> str:
    """Images a second of the input pipeline beside those of the model that it feeds."""
    path = "experiments/benchmarks/pipeline.json"
    found = read(path)
    kinds = {"jpeg_500x375": "JPEG, 500 x 375", "png_32x32": "PNG, 32 x 32"}
    rows = [
        [
            shown,
            *(f"{found[kind][figure]:.0f}" for figure in ("threads", "one_process", "processes")),
            *(f"{found[kind][figure]:.1f}" for figure in ("model", "together")),
            f"{found[kind]['pipeline_to_model']:.0f}",
        ]
        for kind, shown in kinds.items()
    ]
    header = ["files", "threads", "one process", "a process a core", "model", "together"]
    return (
        f"{table([*header, 'pipeline / model'], rows)}\n\nFrom `{path}`, commit `{found['commit']}`, "
        f"{found['cores']} cores, which pipeline and model share."
    )


def recovery_modes() -> str:
    """Times and memory of a batch of mixed tasks, in plain forward passes, and growth with the tasks."""
    path = "experiments/benchmarks/inference.json"
    found = read(path)
    modes = {name: name.replace("_", "-") for name in ("factored", "grouped", "materialized")}
    modes["sample_wise"] = "sample-wise"
    rows = []
    for rank, figures in found["ranks"].items():
        warm, cold = figures["warm"], figures["processes"]
        rows.append(
            [rank, f"{warm['plain_seconds']:.1f}", *(f"{warm[mode]:.2f}" for mode in modes)]
        )
        peaks = [f"{cold[mode]['peak_bytes_above_state'] / 1e9:.1f}" for mode in ("plain", *modes)]
        rows.append([f"{rank}: GB", *peaks])
    grown = "; ".join(
        f"{count} tasks: factored {figures['factored']:.2f}, grouped {figures['grouped']:.2f}"
        for count, figures in found["growth"].items()
    )
    told = (
        "Warm seconds of a plain pass and how many of them a mode takes (medians), and the peak of memory beyond the "
        f"state of a process that runs the mode twice. ViT-B/32's size, {found['batch_size']} inputs of "
        f"{found['num_tasks']} tasks, {found['cores']} cores. At rank {min(map(int, found['ranks']))} by the number of "
        f"tasks: {grown}. From `{path}`, commit `{found['commit']}`."
    )
    return f"{table(['rank', 'plain, s', *modes.values()], rows)}\n\n{told}"


def scaling() -> str:
    """Time, memory and bytes of the closed form against the number of experts."""
    path = "experiments/results/scaling_num_tasks/results.json"
    found = read(path)
    rows = [
        [
            str(row["num_tasks"]),
            f"{row['seconds']:.0f}",
            f"{row['processor_seconds'] / row['num_tasks']:.2f}",
            f"{row['peak_anonymous_bytes'] / 1e6:.0f}",
            f"{row['relative_residual']:.3f}",
            f"{row['bytes_per_task'] / 1e6:.2f}",
            f"{row['few_embeddings_bytes_per_task'] / 1e6:.2f}",
        ]
        for row in found["rows"]
    ]
    header = ["experts", "seconds", "processor seconds a task", "peak MB", "residual / energy"]
    header += ["MB a task", "with 32 embeddings"]
    growth = found["growth"]
    return (
        f"{table(header, rows)}\n\nRank {found['rank']}. Time grows to {growth['time / linear']:.2f} of linear, "
        f"memory to {growth['memory / flat']:.2f} of flat. From `{path}`, commit `{found['commit']}`, "
        f"{found['cores']} cores."
    )


def methods() -> str:
    """METHODS by what they need."""
    from retex_jax.methods import METHODS

    by_needs: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        by_needs.setdefault(method.needs, []).append(f"`{name}`")
    said = {"none": "nothing"}
    rows = [[said.get(needs, needs), " ".join(names)] for needs, names in by_needs.items()]
    return table(["needs", "methods"], rows).replace("---:", "---")


def identifiers() -> str:
    """IDENTIFIERS and what they need."""
    from retex_jax.identifier import IDENTIFIERS

    rows = [
        [
            f"`{name}`",
            method.needs,
            " ".join(f"`{option}`" for option in method.options),
            "yes" if hasattr(method.module, "add") else "no",
        ]
        for name, method in IDENTIFIERS.items()
    ]
    header = ["identifier", "needs", "options", "takes a new task alone"]
    return table(header, rows).replace("---:", "---")


def data_sets() -> str:
    """The papers' vision data sets: size, licence and source."""
    from retex_jax.data import DATA_SETS

    rows = [
        [
            f"`{name}`",
            f"{spec.num_classes or 'varies'}",
            "; ".join(
                filter(None, [f"{spec.num_test:,}" if spec.num_test else "", spec.size_note])
            ),
            spec.licence,
            f"`{spec.where}`",
        ]
        for name, spec in DATA_SETS.items()
    ]
    header = ["data set", "classes", "test examples", "licence", "source"]
    return table(header, rows).replace("---:", "---")


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        demo,
        solvers,
        unknown_tasks,
        comparison,
        comparison_one_model,
        comparison_kept_apart,
        comparison_routed,
        fronts,
        weights,
        findings,
        unseen,
        benchmarks,
        pipeline,
        recovery_modes,
        scaling,
        methods,
        identifiers,
        data_sets,
    )
}
