"""What would stop experts that are snapshots later: tensors and heads that do not fit; for `retex_jax.preflight`."""

from pathlib import Path
from typing import Any

from retex_jax import data, experiment, huggingface
from retex_jax.experiment import Settings


def problems(settings: Settings, model: Any) -> list[str]:
    """Compares names, shapes and dtypes of the snapshots' tensors with the model; of weights only heads are read.

    Args:
      settings: the experiment, whose snapshots are here.
      model: Linen module of the backbone.

    Returns:
      One line each; none where the experts are no snapshots.
    """
    if not experiment.from_snapshots(settings):
        return []
    located = huggingface.locate(settings, offline=True)
    found = []
    try:
        huggingface.open_pretrained(located, model)
    except (ValueError, OSError) as error:
        found += _lines(located.pretrained, error)
    needs_text_tower = False
    for task, folder in located.experts.items():
        try:
            head = huggingface.open_expert(folder, located.pretrained, model).head
        except (ValueError, OSError) as error:
            found += _lines(folder, error)
            continue
        needs_text_tower |= head is None and task not in data.QUESTIONS
        outputs, expected = huggingface.num_outputs(head or {}), data.num_outputs(task)
        if head is not None and expected not in (None, outputs):
            found.append(f"experts: the head of {task} has {outputs} outputs, expected {expected}")
    if needs_text_tower:
        try:
            huggingface.check_zero_shot(located.pretrained)
        except ValueError as error:
            found.append(f"experts: {error}")
    return found


def _lines(folder: Path, error: Exception) -> list[str]:
    return [f"experts: {folder}: {line.strip()}" for line in str(error).splitlines()]
