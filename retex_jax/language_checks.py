"""What would stop an experiment on texts later, but for the files of its tasks; for `retex_jax.preflight`."""

from typing import Any

from retex_jax import data, experiment, metrics, tree
from retex_jax.experiment import Settings


def problems(settings: Settings, model: Any) -> list[str]:
    """Looks at what the model and its tokenizer can do, and at settings["language"].

    Args:
      settings: the experiment.
      model: Linen module; nothing is found wrong with one that reads no texts and has no language tasks.

    Returns:
      One line each.
    """
    found = _metric_problems(settings)
    if "input_ids" in model.example_batch():
        found += _model_problems(settings, model)
    if asked := [name for name in settings["tasks"] if name in data.QUESTIONS]:
        found += _question_problems(settings, model, asked)
    return found


def _model_problems(settings: Settings, model: Any) -> list[str]:
    found, length = [], settings["model"]["max_length"]
    if length > model.config.max_length:
        found.append(
            f"model.max_length: got {length}, expected at most the model's {model.config.max_length}"
        )
    try:
        experiment.check_tokenizer(settings)
    except (ValueError, ImportError) as error:
        found.append(str(error))
    return found


def _metric_problems(settings: Settings) -> list[str]:
    found = []
    for name, metric in settings["language"]["metrics"].items():
        if name not in settings["tasks"] or name not in data.LANGUAGE_TASKS:
            found.append(f"language.metrics.{name}: no language task of the experiment")
        if metric not in metrics.METRICS:
            hint = tree.did_you_mean(metric, metrics.METRICS)
            known = list(metrics.METRICS)
            found.append(f"language.metrics.{name}: got {metric!r}, expected one of {known}{hint}")
        elif name in data.LANGUAGE_TASKS and not _suits(metric, name):
            found.append(f"language.metrics.{name}: {metric!r} does not suit the task's labels")
    return found


def _suits(metric: str, name: str) -> bool:
    if name in data.QUESTIONS:
        return metric == "accuracy"
    return (metric in metrics.REGRESSION) == (name in data.WITHOUT_CLASSES)


def _question_problems(settings: Settings, model: Any, asked: list[str]) -> list[str]:
    spec, found = settings["language"], []
    if len(asked) < len(settings["tasks"]):
        found.append(f"tasks: {asked} are questions, expected all tasks or none to be")
    if not experiment.from_snapshots(settings):
        found.append(f"tasks: {asked} are questions, expected experts that are snapshots")
    if not hasattr(model, "prefill") or getattr(model.config, "lm_head", "tied") == "none":
        found.append(f"tasks: {asked} are questions, expected causal language models with a head")
    room = settings["model"]["max_length"] - 1
    if not 1 <= spec["max_answer"] <= room:
        found.append(f"language.max_answer: got {spec['max_answer']}, expected 1 to {room}")
    if spec["shots"] < 0:
        found.append(f"language.shots: got {spec['shots']}, expected 0 or more")
    return found
