"""Looks for everything that would stop an experiment later, before any long work, and reports it at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retex_jax import (
    data,
    experiment,
    files,
    identifier_checks,
    language_checks,
    method_checks,
    plots,
    pretrained,
    snapshot_checks,
    tree,
)
from retex_jax.experiment import Settings

_REQUIRED = (
    "name",
    "seed",
    "model.name",
    "model.options",
    "model.max_length",
    "tasks",
    "data.seed",
    "data.max_train",
    "data.max_val",
    "data.max_test",
    "data_sets.root",
    "data_sets.workers",
    "language.metrics",
    "language.shots",
    "language.max_answer",
    "experts.root",
    "experts.pretrained",
    "experts.repositories",
    "experts.templates",
    "experts.revisions",
    "finetune.steps",
    "finetune.batch_size",
    "finetune.learning_rate",
    "finetune.head_learning_rate",
    "finetune.weight_decay",
    "finetune.warmup_steps",
    "finetune.checkpoint_every",
    "baselines",
    "methods",
    "method_options",
    "extra_variants",
    "num_seeds",
    "expert_seeds",
    "search.enabled",
    "search.num_inputs",
    "offsets.rank",
    "offsets.extra_ranks",
    "offsets.rank_rule",
    "offsets.orientation",
    "offsets.budget",
    "offsets.sharing",
    "offsets.task_weights",
    "offsets.solver",
    "offsets.base",
    "offsets.base_options",
    "offsets.exact",
    "offsets.adam",
    "identifier.kind",
    "identifier.rank",
    "identifier.layer",
    "identifier.layers",
    "identifier.center",
    "identifier.normalize",
    "identifier.options",
    "identifier.num_calibration",
    "identifier.search",
    "identifier.max_forward",
    "identify.kinds",
    "identify.experts",
    "identify.max_forward",
    "identify.calibration_sizes",
    "identify.unseen",
    "identify.target",
    "calibration.num_inputs",
    "calibration.batch_size",
    "evaluate.batch_size",
    "evaluate.routed_inputs",
    "writers.tensorboard",
    "writers.wandb",
)

ENTRIES = (
    *_REQUIRED,
    "offsets.leaf_weights",
    "unseen.num_unseen",
    "unseen.num_splits",
    "unseen.splits",
    "unseen.num_train",
    "unseen.num_test",
    "unseen.temperatures",
)
"""Every entry that an experiment may have; what lies below one is free."""


def check(
    settings: Settings,
    *,
    evaluates: bool = True,
    identifies: bool = False,
    offline: bool = False,
    further: Sequence[str] = (),
) -> None:
    """Looks for everything that would stop the experiment later.

    Args:
      settings: the experiment file as plain values.
      evaluates: whether more than fine-tuning is to be done.
      identifies: whether identifiers are to be compared.
      offline: whether snapshots may not be downloaded.
      further: problems that the program has found itself, to be listed with the others.

    Raises:
      ValueError: listing all problems.
    """
    if "task" in settings:
        raise ValueError(
            f"experiment {settings.get('name')!r} has `task`, one expert to be fine-tuned by retex_jax.finetune; "
            "what is merged has `tasks`"
        )
    strange = unknown(settings)
    if absent := lacking(settings):
        lacks = f"the experiment lacks {', '.join(absent)}; see configs/common.py"
        raise ValueError("\n".join([lacks, *strange]))
    problems = [*further, *strange, *_data_problems(settings), *_range_problems(settings)]
    model = None
    try:
        model = experiment.build_model(settings, offline=offline)
    except (ValueError, OSError) as error:
        problems += str(error).splitlines()
    if model is not None:
        problems += _model_problems(settings, model)
        problems += snapshot_checks.problems(settings, model)
    if evaluates:
        problems += method_checks.problems(settings, model)
        problems += identifier_checks.problems(settings, model)
    if identifies and model is not None:
        problems += identifier_checks.comparison_problems(settings, model)
    if evaluates:
        try:
            plots.check_available()
        except ImportError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"experiment {settings['name']!r} cannot run as it is:\n  "
            + "\n  ".join(dict.fromkeys(problems))
        )


def lacking(settings: Settings) -> list[str]:
    """The entries that an experiment must have and this one has not."""
    entries = _entries(settings)
    return [
        path
        for path in _REQUIRED
        if not any(entry == path or entry.startswith(f"{path}.") for entry in entries)
    ]


def unknown(settings: Settings, known: Sequence[str] = ENTRIES, within: str = "") -> list[str]:
    """Says which entries no program reads, as they are misspelt or out of place.

    Args:
      settings: the experiment, or a part of it.
      known: paths of entries.
      within: path of the part, with a dot behind it.

    Returns:
      One line each.
    """
    below = [path.removeprefix(within) for path in known if path.startswith(within)]
    names = {path.partition(".")[0] for path in below}
    found = []
    for name, value in settings.items():
        if name not in names:
            hint = tree.did_you_mean(name, names)
            found.append(f"{within}{name}: no such entry{hint}; see configs/common.py")
        elif name not in below and isinstance(value, Mapping):
            found += unknown(value, known, f"{within}{name}.")
    return found


def check_tasks(settings: Settings, tasks: Sequence[data.Task]) -> None:
    """Makes sure that the loaded tasks have enough inputs for the identifier.

    Raises:
      ValueError: naming each task that has too few.
    """
    wanted = settings["identifier"]["num_calibration"]
    problems = [
        f"identifier.num_calibration: got {wanted}, expected at most {size}, "
        f"the training inputs of {task.name}"
        for task in tasks
        if (size := len(task.splits["train"]["label"])) < wanted
    ]
    if problems:
        raise ValueError("\n".join(problems))


def check_workdir(settings: Settings, workdir: Path) -> None:
    """Makes sure that a workdir in use holds this experiment.

    Raises:
      ValueError: if it holds another one; the entries that differ are named.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return
    try:
        existing = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; choose another --workdir") from error
    ours, theirs = _entries(settings), _entries(existing)
    for entries in (ours, theirs):
        entries.pop("data_sets.workers", None)  # results do not depend on it
    if ours == theirs:
        return
    differing = [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    raise ValueError(
        f"workdir {workdir} holds another experiment; choose another --workdir. They differ in:\n  "
        + "\n  ".join(differing)
    )


def missing(settings: Settings, workdir: Path | None = None) -> list[str]:
    """What stands between here and a run: problems of settings and workdir, and files that no run downloads.

    Nothing is downloaded or computed.

    Args:
      settings: the experiment.
      workdir: of the run, if it has one.

    Returns:
      One line each.
    """
    problems = []
    try:
        check(settings, offline=True)
        problems += _wheels(settings)[0]
    except ValueError as error:
        problems += str(error).splitlines()
    if workdir is not None:
        try:
            check_workdir(settings, workdir)
        except ValueError as error:
            problems += str(error).splitlines()
    return problems


def downloads(settings: Settings) -> list[str]:
    """The files that are not in the cache and that the run itself downloads; one line each."""
    return [] if lacking(settings) else _wheels(settings)[1]


def _wheels(settings: Settings) -> tuple[list[str], list[str]]:
    """What is wrong with the wheels in the cache, and those that are not there."""
    wrong, absent = [], []
    for name in experiment.wheels(settings):
        wheel = data.WHEELS[name]
        try:
            if data.cached(wheel) is None:
                absent.append(
                    f"not in {data.cache_dir()} yet: {wheel.requirement} (the run downloads it)"
                )
        except ValueError as error:
            wrong.append(str(error))
    return wrong, absent


def _data_problems(settings: Settings) -> list[str]:
    problems = []
    if not settings["name"]:
        problems.append("name: got '', expected a name, which the workdir has too")
    names = settings["tasks"]
    if not names or len(set(names)) != len(names):
        problems.append(f"tasks: got {list(names)}, expected one or more different names")
    try:
        data.check_names(names)
    except ValueError as error:
        problems.append(str(error))
    root = settings["data_sets"]["root"]
    return problems + [line for name in names for line in data.data_set_problems(name, root)]


def _range_problems(settings: Settings) -> list[str]:
    least = {
        "finetune.steps": 1,
        "finetune.batch_size": 1,
        "finetune.checkpoint_every": 1,
        "num_seeds": 1,
        "search.num_inputs": 1,
        "evaluate.batch_size": 1,
        "evaluate.routed_inputs": 1,
        "calibration.num_inputs": 1,
        "calibration.batch_size": 1,
        "seed": 0,
        "data.seed": 0,
        "data_sets.workers": data.AUTOMATIC,
    }
    entries = _entries(settings)
    problems = [
        f"{path}: got {entries[path]}, expected {minimum} or more"
        for path, minimum in least.items()
        if entries[path] < minimum
    ]
    numbers = settings["expert_seeds"]
    if not all(isinstance(seed, int) and seed >= 0 for seed in numbers) or len(set(numbers)) < len(
        numbers
    ):
        problems.append(f"expert_seeds: got {numbers}, expected different integers of 0 or more")
    if numbers and (settings["experts"]["root"] or experiment.from_snapshots(settings)):
        problems.append(
            f"expert_seeds: got {numbers}, but the experts lie in experts.root or are snapshots; expected ()"
        )
    for name in ("learning_rate", "head_learning_rate"):
        value = settings["finetune"][name]
        if not 0 < value < float("inf"):
            problems.append(f"finetune.{name}: got {value}, expected a positive number")
    spec = settings["finetune"]
    if not 0 <= spec["warmup_steps"] <= max(spec["steps"] - 1, 0):
        problems.append(
            f"finetune.warmup_steps: got {spec['warmup_steps']}, "
            f"expected 0 to {max(spec['steps'] - 1, 0)}"
        )
    for name in ("max_train", "max_val", "max_test"):
        value = settings["data"][name]
        if value is not None and value < 1:
            problems.append(f"data.{name}={value}: expected None or 1 or more")
    return problems


def _model_problems(settings: Settings, model: Any) -> list[str]:
    is_text = "input_ids" in model.example_batch()
    texts = (*data.TEXT_TASKS, *data.LANGUAGE_TASKS)
    vision = (*data.VISION_TASKS, *data.DATA_SETS)
    known, other = (texts, vision) if is_text else (vision, texts)
    name = settings["model"]["name"]
    problems = []
    misplaced = [task for task in settings["tasks"] if task in other and task not in known]
    if misplaced:
        problems.append(f"tasks: {misplaced} do not suit model.name {name!r}")
    is_random = not (pretrained.required_wheels(name) or experiment.from_snapshots(settings))
    if is_text and is_random:
        problems.append(f"model.name: {name!r} has random weights and no tokenizer to train with")
    return problems + language_checks.problems(settings, model)


def _entries(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    entries = {}
    for name, child in value.items():
        entries.update(_entries(child, f"{prefix}.{name}" if prefix else name))
    return entries
