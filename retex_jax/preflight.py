"""Looks for everything that would stop an experiment later, before any long work, and reports it at once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retex_jax import (
    data,
    experiment,
    files,
    language_checks,
    models,
    offsets,
    plots,
    pretrained,
    tree,
)
from retex_jax.experiment import Settings
from retex_jax.experts import ExpertSet
from retex_jax.identifier import IDENTIFIERS
from retex_jax.mergers import MERGERS
from retex_jax.offsets import adam, exact
from retex_jax.offsets.state import plan_leaves

_GIVEN_BY_THE_PROGRAM = {
    "key",
    "checkpoints",
    "progress",
    "task_weights",
    "roots",
    "file",
    "preempted",
}
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
    if absent := lacking(settings):
        raise ValueError(f"the experiment lacks {', '.join(absent)}; see configs/common.py")
    problems = [*further, *_data_problems(settings), *_range_problems(settings)]
    model = None
    try:
        model = experiment.build_model(settings, offline=offline)
    except (ValueError, OSError) as error:
        problems += str(error).splitlines()
    if model is not None:
        problems += _model_problems(settings, model)
        if evaluates:
            problems += _method_problems(settings, model)
        if identifies:
            problems += _identify_problems(settings, model)
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
    if existing == settings:
        return
    ours, theirs = _entries(settings), _entries(existing)
    differing = [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    raise ValueError(
        f"workdir {workdir} holds another experiment; choose another --workdir. They differ in:\n  "
        + "\n  ".join(differing)
    )


def missing(settings: Settings) -> list[str]:
    """What stands between here and a run: problems of the settings, and files not in the cache.

    Nothing is downloaded or computed.

    Returns:
      One line each; files that the run itself would download are among them.
    """
    try:
        check(settings, offline=True)
    except ValueError as error:
        return str(error).splitlines()
    lines = []
    for name in experiment.wheels(settings):
        try:
            if data.cached(data.WHEELS[name]) is None:
                requirement = data.WHEELS[name].requirement
                lines.append(f"not in {data.cache_dir()} yet: {requirement} (the run downloads it)")
        except ValueError as error:
            lines.append(str(error))
    return lines


def _data_problems(settings: Settings) -> list[str]:
    problems = []
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


def _method_problems(settings: Settings, model: Any) -> list[str]:
    problems = []
    for name, options in settings["baselines"].items():
        problems += _merger_problems("baselines", name, f"baselines.{name}", options)
    spec = settings["offsets"]
    problems += _merger_problems(
        "offsets.base", spec["base"], "offsets.base_options", spec["base_options"]
    )
    leaves = tree.flatten(models.expected_params(model))
    for rank in (spec["rank"], *spec["extra_ranks"]):
        try:
            plan_leaves(leaves, "flax", rank, spec["rank_rule"], spec["orientation"])
        except ValueError as error:
            problems.append(f"offsets.{error}")
    if spec["solver"] not in ("exact", "adam"):
        problems.append(f"offsets.solver: got {spec['solver']!r}, expected 'exact' or 'adam'")
    if spec["solver"] == "adam" and (spec["budget"] or spec["task_weights"] != "equal"):
        problems.append(
            "offsets.solver: 'adam' takes no offsets.budget and no offsets.task_weights"
        )
    problems += _unknown_options("offsets.exact", spec["exact"], exact.fit) or _failure(
        "offsets.exact", lambda: offsets.fit(_toy_experts(), rank=1, **spec["exact"])
    )
    # The toy experts are smaller than any fraction of them: what is positive counts as bytes enough.
    budget = 1e6 if 0 < spec["budget"] < float("inf") else spec["budget"]
    size = {"budget": budget} if budget else {"rank": 1}
    size |= {name: spec[name] for name in ("sharing", "task_weights")}
    problems += _failure("offsets", lambda: offsets.fit(_toy_experts(), **size))
    problems += _unknown_options("offsets.adam", spec["adam"], adam.fit) or _failure(
        "offsets.adam", lambda: adam.check_settings(**spec["adam"])
    )
    return problems + _identifier_problems(settings, model)


def _identifier_problems(settings: Settings, model: Any) -> list[str]:
    spec, config = settings["identifier"], model.config
    problems = [
        f"identifier.{name}: got {layer}, expected 1 to {config.num_layers}, "
        "or 0 for the pooled output"
        for name, layers in (("layer", (spec["layer"],)), ("layers", spec["layers"]))
        for layer in layers
        if not 0 <= layer <= config.num_layers
    ]
    if spec["kind"] not in IDENTIFIERS:
        hint = tree.did_you_mean(spec["kind"], IDENTIFIERS)
        known = sorted(IDENTIFIERS)
        return [*problems, f"identifier.kind: got {spec['kind']!r}, expected one of {known}{hint}"]
    problems += _forward_problems("identifier.max_forward", spec["max_forward"], config.num_layers)
    if spec["search"]:
        options = dict(spec["options"])
    else:
        options = experiment.identifier_options(spec)
        if options.get("joint") and len(spec["layers"]) == 0:
            problems.append("identifier.options.joint: got True, but identifier.layers has none")
    found = IDENTIFIERS[spec["kind"]].problems(options)
    problems += [f"identifier.options.{line}" for line in found]
    return problems + _size_problems(options, spec["num_calibration"], config.width)


def _forward_problems(where: str, value: Any, num_layers: int) -> list[str]:
    if value * num_layers >= 1:
        return []
    return [f"{where}: got {value}, expected 1 / {num_layers} or more, the cost of one block"]


def _identify_problems(settings: Settings, model: Any) -> list[str]:
    """What `retex_jax.identify` needs besides."""
    spec, tasks = settings["identify"], list(settings["tasks"])
    problems = _forward_problems(
        "identify.max_forward", spec["max_forward"], model.config.num_layers
    )
    try:
        kinds = experiment.identifier_kinds(spec)
        if not any(not IDENTIFIERS[kind].needs_experts for kind in kinds):
            problems.append(f"identify.kinds: got {spec['kinds']!r}, expected one without experts")
    except ValueError as error:
        problems.append(str(error))
    sizes = spec["calibration_sizes"]
    if not all(isinstance(size, int) and size > 1 for size in sizes):
        problems.append(f"identify.calibration_sizes: got {sizes}, expected integers of 2 or more")
    if not 0 < spec["target"] <= 1:
        problems.append(f"identify.target: got {spec['target']}, expected a fraction in (0, 1]")
    if len(tasks) < 2:
        problems.append(f"tasks: got {tasks}, expected two or more to identify")
    for split in spec["unseen"]:
        names = [split] if isinstance(split, str) else list(split)
        if not names or not set(names) < set(tasks) or len(set(names)) < len(names):
            problems.append(f"identify.unseen: got {names}, expected some of {tasks}, not all")
    return problems


def _size_problems(options: Mapping[str, Any], num_calibration: int, width: int) -> list[str]:
    """What an identifier's options ask of more inputs or of wider features than there are."""
    problems = []
    rank, num_inputs = options.get("rank", 1), options.get("num_inputs") or 0
    if not 1 <= rank < num_calibration:
        problems.append(
            f"identifier.rank: got {rank}, expected 1 to num_calibration - 1 = {num_calibration - 1}"
        )
    elif rank >= width:
        problems.append(f"identifier.rank: got {rank}, expected less than the features' {width}")
    if num_inputs > num_calibration:
        problems.append(
            f"identifier.options.num_inputs: got {num_inputs}, expected at most num_calibration = "
            f"{num_calibration}"
        )
    if options.get("score") == "distance" and options.get("k", 10) > num_calibration:
        problems.append(
            f"identifier.options.k: got {options.get('k', 10)}, expected at most num_calibration = "
            f"{num_calibration}"
        )
    return problems


def _merger_problems(what: str, name: str, where: str, options: Mapping[str, Any]) -> list[str]:
    if name not in MERGERS:
        hint = tree.did_you_mean(name, MERGERS)
        return [f"{what}: got {name!r}, expected one of {sorted(MERGERS)}{hint}"]
    return _unknown_options(where, options, MERGERS[name]) or _failure(
        where, lambda: MERGERS[name](_toy_experts(), **options)
    )


def _toy_experts() -> ExpertSet:
    """The smallest experts, to try options on."""
    pretrained_params = {"kernel": np.eye(2, dtype=np.float32)}
    return ExpertSet.from_trees(pretrained_params, [{"kernel": np.ones((2, 2), np.float32)}])


def _failure(where: str, attempt: Callable[[], Any]) -> list[str]:
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return [f"{where}: {error}"]
    return []


def _unknown_options(where: str, options: Mapping[str, Any], function: Any) -> list[str]:
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _GIVEN_BY_THE_PROGRAM
    ]
    return [
        f"{where}.{name}: unknown, expected some of {known}"
        for name in options
        if name not in known
    ]


def _entries(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    entries = {}
    for name, child in value.items():
        entries.update(_entries(child, f"{prefix}.{name}" if prefix else name))
    return entries
