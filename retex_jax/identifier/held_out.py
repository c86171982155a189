"""How well inputs of no known task are told: tasks are held out, and an identifier of the others meets them.

As ReTeX's Table 7 and Fig. 15 (arXiv:2606.26902, appendix D.1), of the entropy and of the residual. The identifier
is fitted to the other tasks alone. The paper does not say how its threshold is chosen; here nothing of the held-out
tasks is used: temperature and threshold come from validation inputs of the known tasks, of which a given fraction must
stay below the threshold. AUROC and AUPR need neither threshold nor target.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from retex_jax import metrics
from retex_jax.identifier import out_of_distribution as ood
from retex_jax.identifier.registry import IDENTIFIERS
from retex_jax.typing import Array

MEASURES = ("entropy", "residual")


class Detection(NamedTuple):
    """How one measure tells inputs of known tasks from others.

    Attributes:
      unseen: ids of the tasks that were held out.
      measure: "entropy" or "residual".
      figures: "threshold", "temperature" (of the entropy; None for the residual), and of test inputs, where an input of
        a held-out task is positive, "accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "aupr".
      inside: measures of test inputs of known tasks, [n].
      outside: of held-out tasks, [m].
    """

    unseen: tuple[int, ...]
    measure: str
    figures: dict[str, float | None]
    inside: np.ndarray
    outside: np.ndarray


def detect(
    kind: str,
    options: Mapping[str, Any],
    calibration: Sequence[Array],
    validation: Sequence[Array],
    test: Sequence[Array],
    unseen: Sequence[int],
    *,
    target: float = 0.95,
    key: jax.Array | None = None,
) -> list[Detection]:
    """Holds tasks out and measures test inputs of all.

    Args:
      kind: name in IDENTIFIERS.
      options: of its fit.
      calibration: T arrays [n_t, d] or [n_t, L, d]; those of `unseen` are not used.
      validation: as many, or [T, n_t, ...], of every expert, where the identifier needs the experts; those of
        `unseen` are not used.
      test: like `validation`.
      unseen: ids of the tasks to hold out, fewer than T.
      target: the fraction of validation inputs that must be taken as of a known task.
      key: typed PRNG key of the fit.

    Returns:
      One detection a measure.

    Raises:
      ValueError: if `unseen` is empty, is all tasks, repeats a task or names none, or as the identifier's fit and
        `out_of_distribution.threshold`.
    """
    held_out, size = list(unseen), len(calibration)
    if not 0 < len(set(held_out)) == len(held_out) < size or not set(held_out) <= set(range(size)):
        raise ValueError(f"unseen: got {held_out}, expected some tasks of 0 to {size} - 1, not all")
    method = IDENTIFIERS[kind]
    seen = [task for task in range(size) if task not in held_out]
    state = method.fit([calibration[task] for task in seen], key=key, **options)

    def scores(features: Array) -> np.ndarray:
        return np.asarray(
            method.scores(state, features[seen] if method.needs_experts else features)
        )

    known = [scores(validation[task]) for task in seen]
    ids = np.repeat(np.arange(len(seen)), [len(part) for part in known])
    temperature = ood.fit_temperature(np.concatenate(known), ids)
    inside = np.concatenate([scores(test[task]) for task in seen])
    outside = np.concatenate([scores(test[task]) for task in held_out])
    found = []
    for name in MEASURES:
        parts = (np.concatenate(known), inside, outside)
        measured = [
            np.asarray(ood.entropy(part, temperature) if name == "entropy" else ood.residual(part))
            for part in parts
        ]
        threshold = ood.threshold(measured[0], target=target)
        figures = {
            "threshold": threshold,
            "temperature": temperature if name == "entropy" else None,
            **_figures(measured[1], measured[2], threshold),
        }
        found.append(Detection(tuple(held_out), name, figures, measured[1], measured[2]))
    return found


def _figures(inside: np.ndarray, outside: np.ndarray, threshold: float) -> dict[str, float | None]:
    measured = np.concatenate([inside, outside])
    labels = np.arange(len(measured)) >= len(inside)
    taken = measured > threshold
    return {
        "accuracy": metrics.accuracy(taken, labels),
        "balanced_accuracy": metrics.balanced_accuracy(taken, labels),
        "precision": metrics.precision(taken, labels),
        "recall": metrics.recall(taken, labels),
        "f1": metrics.f1(taken, labels),
        "auroc": metrics.auroc(measured, labels),
        "aupr": metrics.aupr(measured, labels),
    }
