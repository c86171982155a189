"""The choice of an identifier's layers and options by identification accuracy on validation features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from retex_jax import search, tree
from retex_jax.identifier.layers import mean_scores, spread_of
from retex_jax.identifier.registry import IDENTIFIERS
from retex_jax.typing import Array, ProgressFn

Layer = int | tuple[int, ...]
"""Block after which features are taken, 0 for the pooled output; or several at once."""

MOST_JOINT = 2304
"""The most features that are tried jointly: a covariance's root takes the cube of them, and its memory the square."""

FeaturesByLayer = Mapping[int, Sequence[Array]]
"""Layer to T arrays [n_t, d]."""

GRIDS: Mapping[str, search.Grid] = {
    "subspace": {
        "rank": (4, 16, 64),
        "center": (True, False),
        "normalize": (False, True),
        "whiten": (False, True),
        "joint": (False, True),
    },
    "router": {"kind": ("linear", "mlp"), "joint": (False, True)},
    "shared_mahalanobis": {
        "shrinkage": (0.01, 0.1, 0.3),
        "normalize": (False, True),
        "joint": (False, True),
    },
    "mahalanobis": {"shrinkage": (0.01, 0.1, 0.3), "normalize": (False, True)},
    "neighbors": {"k": (1, 5, 10, 20), "normalize": (False, True)},
}
"""By identifier, what is worth trying."""


def candidates(blocks: Sequence[int]) -> list[Layer]:
    """The layers that are worth trying: each alone, and the first ones up to each, all of them at last.

    Args:
      blocks: numbers of blocks, and 0 if the pooled output is to be tried, alone.

    Returns:
      Layers, each once.
    """
    inner = sorted(block for block in set(blocks) if block)
    prefixes = [tuple(inner[:size]) for size in range(2, len(inner) + 1)]
    return [*sorted(set(blocks)), *prefixes]


def forward_fraction(layer: Layer, num_layers: int, num_experts: int = 0) -> float:
    """What identification costs, in blocks that are run: 1 is a forward pass of the merged model.

    Args:
      layer: or several; the pooled output takes all blocks.
      num_layers: blocks of the model.
      num_experts: T where the input runs through every expert instead of the merged model, 0 elsewhere.

    Returns:
      Blocks run / blocks, and T times that with experts. The predicted task's own pass is not counted.
    """
    deepest = max(block or num_layers for block in _blocks(layer))
    return max(num_experts, 1) * deepest / num_layers


def best_trial(
    result: search.SearchResult, allowed: Callable[[Layer], bool] = lambda _: True
) -> search.Trial | None:
    """The best trial among those of some layers.

    Args:
      result: from `select`.
      allowed: whether a layer may be taken.

    Returns:
      The trial, ties broken as by `select`; None if none of these layers could be fitted.
    """
    trials = [
        trial
        for trial in result.trials
        if trial.score is not None and allowed(trial.options["layer"])
    ]
    return max(trials, key=lambda trial: trial.score or 0.0, default=None)


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
      that is too large for the inputs, is recorded with its error, and so are joint ones of more than `MOST_JOINT`
      features.

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
    tried = sorted(calibration if layers is None else layers, key=_depth)
    problems = [
        f"{what}: {name!r} is no option of {kind!r}, expected some of {list(method.options)}"
        for what, names in (("grid", grid), ("fixed", fixed))
        for name in names
        if name not in method.options
    ]
    known = sorted(set(calibration) & set(validation))
    problems += [
        f"layers: got {layer!r}, expected one or more of {known}"
        for layer in tried
        if not _blocks(layer) or not set(_blocks(layer)) <= set(known)
    ]
    sizes = {len(tasks) for part in (calibration, validation) for tasks in part.values()}
    if len(sizes) != 1:
        problems.append(f"calibration, validation: got {sorted(sizes)} tasks, expected one number")
    if problems:
        raise ValueError("\n".join(problems))

    of_one: dict[str, tuple[list[np.ndarray], float]] = {}

    def one_layer(block: int, options: Mapping[str, Any]) -> tuple[list[np.ndarray], float]:
        """Validation scores of each task, and their spread; several layers share those of each."""
        name = repr((block, sorted(options.items())))
        if name not in of_one:
            own = stacked(calibration, block)
            state = method.fit(own, **options)
            spread = 1.0 if method.needs_experts else spread_of(method.scores, state, own)
            inputs = stacked(validation, block)
            of_one[name] = [np.asarray(method.scores(state, x)) for x in inputs], spread
        return of_one[name]

    def fit(_: Any, *, key: jax.Array | None, layer: Layer, **options: Any) -> Any:
        if method.random or options.get("joint"):
            width = sum(np.shape(calibration[block][0])[-1] for block in _blocks(layer))
            if options.get("joint") and width > MOST_JOINT:
                raise ValueError(f"joint: got {width} features, expected at most {MOST_JOINT}")
            state = method.fit(stacked(calibration, layer), key=key, **options)
            return [method.scores(state, inputs) for inputs in stacked(validation, layer)]
        each, spreads = zip(*(one_layer(block, options) for block in _blocks(layer)), strict=True)
        return [mean_scores(np.stack(task), np.array(spreads)) for task in zip(*each, strict=True)]

    def score(scores: Any) -> list[float]:
        return [
            float(np.mean(np.asarray(own).argmax(axis=1) == task))
            for task, own in enumerate(scores)
        ]

    return search.grid(
        fit,
        calibration,
        {"layer": tried, **grid},
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


def stacked(features: FeaturesByLayer, layer: Layer) -> list[np.ndarray]:
    """Features of one layer, [n_t, d], or of several, [n_t, L, d]."""
    if isinstance(layer, int):
        return [np.asarray(task) for task in features[layer]]
    parts = zip(*(features[block] for block in layer), strict=True)
    return [np.stack([np.asarray(part) for part in task], axis=-2) for task in parts]
