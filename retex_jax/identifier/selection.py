"""The choice of an identifier's layers and options by identification accuracy on validation features."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from retex_jax import search, tree
from retex_jax.identifier.registry import IDENTIFIERS
from retex_jax.typing import Array, ProgressFn

Layer = int | tuple[int, ...]
"""Block after which features are taken, 0 for the pooled output; or several at once."""

FeaturesByLayer = Mapping[int, Sequence[Array]]
"""Layer to T arrays [n_t, d]."""

GRIDS: Mapping[str, search.Grid] = {
    "subspace": {
        "rank": (4, 8, 16, 32, 64),
        "center": (True, False),
        "normalize": (False, True),
        "whiten": (False, True),
    },
    "router": {"kind": ("linear", "mlp")},
    "shared_mahalanobis": {"shrinkage": (0.01, 0.1, 0.3), "normalize": (False, True)},
    "mahalanobis": {"shrinkage": (0.01, 0.1, 0.3), "normalize": (False, True)},
    "neighbors": {"k": (1, 5, 10, 20), "normalize": (False, True)},
}
"""By identifier, what is worth trying."""


def select(
    kind: str,
    calibration: FeaturesByLayer,
    validation: FeaturesByLayer,
    grid: search.Grid | None = None,
    *,
    layers: Sequence[Layer] | None = None,
    key: jax.Array | None = None,
    fixed: Mapping[str, Any] | None = None,
    progress: ProgressFn | None = None,
) -> search.SearchResult:
    """Fits an identifier with every combination of layers and options, and keeps the best.

    The score is the identification accuracy, the mean of the tasks' own. Ties go to the layer from which the merged
    model needs to run the least, then to fewer layers, then to the first in the order of the grid.

    Args:
      kind: name in IDENTIFIERS.
      calibration: what is fitted.
      validation: what is scored, of other inputs; T arrays [n_t, d], or [T, n_t, d], of every expert, where the
        identifier needs the experts.
      grid: option name to the values to try; `GRIDS[kind]` when not given.
      layers: to try; each of `calibration` alone when not given.
      key: typed PRNG key of every fit.
      fixed: further options of every fit.
      progress: called with (candidates done, candidates) after each.

    Returns:
      The best and all trials; "layer" is one of the options. A candidate that cannot be fitted, such as a rank
      that is too large for the inputs, is recorded with its error.

    Raises:
      ValueError: if the identifier, an option or a layer is unknown, the two do not have the same layers and
        tasks, or no candidate can be fitted; all problems are listed.
    """
    if kind not in IDENTIFIERS:
        hint = tree.did_you_mean(kind, IDENTIFIERS)
        raise ValueError(f"kind: got {kind!r}, expected one of {sorted(IDENTIFIERS)}{hint}")
    method = IDENTIFIERS[kind]
    grid = GRIDS[kind] if grid is None else grid
    fixed = {} if fixed is None else fixed
    candidates = sorted(calibration if layers is None else layers, key=_depth)
    problems = [
        f"{what}: {name!r} is no option of {kind!r}, expected some of {list(method.options)}"
        for what, names in (("grid", grid), ("fixed", fixed))
        for name in names
        if name not in method.options
    ]
    known = sorted(set(calibration) & set(validation))
    problems += [
        f"layers: got {layer!r}, expected one or more of {known}"
        for layer in candidates
        if not _blocks(layer) or not set(_blocks(layer)) <= set(known)
    ]
    sizes = {len(tasks) for part in (calibration, validation) for tasks in part.values()}
    if len(sizes) != 1:
        problems.append(f"calibration, validation: got {sorted(sizes)} tasks, expected one number")
    if problems:
        raise ValueError("\n".join(problems))

    def fit(features: Any, *, key: jax.Array | None, layer: Layer, **options: Any) -> Any:
        return layer, method.fit(_stacked(features, layer), key=key, **options)

    def score(fitted: Any) -> list[float]:
        layer, state = fitted
        return [
            float(np.mean(np.asarray(method.scores(state, inputs)).argmax(axis=1) == task))
            for task, inputs in enumerate(_stacked(validation, layer))
        ]

    return search.grid(
        fit,
        calibration,
        {"layer": candidates, **grid},
        score,
        key=key,
        fixed=fixed,
        progress=progress,
    )


def _blocks(layer: Layer) -> tuple[int, ...]:
    return (layer,) if isinstance(layer, int) else tuple(layer)


def _depth(layer: Layer) -> tuple[float, int, tuple[int, ...]]:
    """Sorts by how far the model runs: the pooled output comes after every block."""
    blocks = _blocks(layer)
    deepest = max((block or np.inf for block in blocks), default=0)
    return deepest, len(blocks), blocks


def _stacked(features: FeaturesByLayer, layer: Layer) -> list[np.ndarray]:
    """Features of one layer, [n_t, d], or of several, [n_t, L, d]."""
    if isinstance(layer, int):
        return [np.asarray(task) for task in features[layer]]
    parts = zip(*(features[block] for block in layer), strict=True)
    return [np.stack([np.asarray(part) for part in task], axis=-2) for task in parts]
