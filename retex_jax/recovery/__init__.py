"""From a merged model, its offsets and an identifier to predictions.

Grouped recovery (ReTeX, arXiv:2606.26902, section 5.3): the inputs are grouped by task, each task that
occurs is recovered once, and its inputs run through it in batches of constant shape. When the task is
unknown, the merged model's features decide the grouping, and nothing on the path sees a true task. The other
ways of recovery, for batches of mixed tasks, are those of `Recoverer`; see `retex_jax.recovery.modes`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import data, models, sharding
from retex_jax.calibration import Calibration
from retex_jax.identifier import IDENTIFIERS
from retex_jax.recovery.answers import (
    CHOICES,
    choice_logits,
    has_choices,
    run_choices,
    run_choices_grouped,
)
from retex_jax.recovery.modes import MODES, Mode, Recoverer
from retex_jax.typing import Array, Batch, Params

__all__ = [
    "CHOICES",
    "MODES",
    "Examples",
    "Head",
    "Identifier",
    "Mode",
    "Recoverer",
    "apply_head",
    "choice_logits",
    "has_choices",
    "identify",
    "logits",
    "make_calibration",
    "outputs",
    "run",
    "run_choices",
    "run_choices_grouped",
    "run_grouped",
    "run_layers",
    "task_scores",
]

Examples = Mapping[str, np.ndarray]
Head = Mapping[str, Any]
"""A task's own classifier, never merged; empty for a task of questions, whose answers are scored.

Linear: "kernel" [d, num_classes] and, with some, "bias" [num_classes]. A zero-shot head has a
"projection" besides (a kernel; its output is L2-normalised). The heads of BERT and RoBERTa have a layer
before the last, with tanh between: "pooler" and "classifier", or "dense" and "out_proj".
"""


@dataclass(frozen=True)
class Identifier:
    """A fitted identifier, and where its features come from.

    Attributes:
      state: of the identifier.
      layer: block after which the mean token is taken, 1 to num_layers; 0 means the pooled output. Several
        for a state of several layers.
      kind: name in `IDENTIFIERS`.
    """

    state: Any
    layer: int | tuple[int, ...]
    kind: str = "subspace"


@partial(jax.jit, static_argnums=(0, 3))
def _apply(model: Any, params: Params, batch: Examples, num_layers: int | None) -> models.Features:
    return model.apply({"params": params}, batch, num_layers=num_layers)


def run(
    model: Any,
    params: Params,
    examples: Examples,
    batch_size: int,
    *,
    layer: int | tuple[int, ...] = 0,
) -> np.ndarray:
    """Runs a model over examples in batches of one shape.

    Where the parameters lie on a mesh (`sharding.place`), so do the batches, which its axis "data" divides.

    Args:
      model: Linen module that returns `models.Features`.
      params: its parameters.
      examples: input arrays [n, ...]; labels and the like are left out.
      batch_size: B.
      layer: 0 for the pooled output, i for the mean token after block i; the rest of the model is not run.
        Several are taken in one pass.

    Returns:
      Features [n, d], or [n, L, d] of L layers, float32.
    """
    blocks = layer if isinstance(layer, tuple) else (layer,)
    features = run_layers(model, params, examples, batch_size, blocks)
    if not isinstance(layer, tuple):
        return features[layer]
    return np.stack([features[block] for block in layer], axis=1)


def run_layers(
    model: Any, params: Params, examples: Examples, batch_size: int, layers: Sequence[int]
) -> dict[int, np.ndarray]:
    """As `run`, with a width of its own for each layer: the pooled output may be wider or narrower than blocks.

    Args:
      model: Linen module that returns `models.Features`.
      params: its parameters.
      examples: input arrays [n, ...].
      batch_size: B.
      layers: 0 for the pooled output, i for the mean token after block i; what comes after them is not run.

    Returns:
      Layer to features [n, d], float32.
    """
    depth = None if 0 in layers else max(layers)
    names = model.example_batch()
    inputs = {name: array for name, array in examples.items() if name in names}
    order = data.by_length(inputs)
    outputs: dict[int, list[np.ndarray]] = {block: [] for block in layers}
    mesh = sharding.mesh_of(params)
    for batch, valid in data.padded_batches(data.take(inputs, order), batch_size):
        placed = sharding.place(data.trim(batch), mesh, sharding.BATCH_RULES)
        features = _apply(model, params, placed, depth)
        for block, parts in outputs.items():
            chosen = features.layers[block - 1] if block else features.pooled
            parts.append(np.asarray(chosen)[valid])
    places = np.argsort(order)
    return {block: np.concatenate(parts)[places] for block, parts in outputs.items()}


def apply_head(head: Head, features: Array) -> jax.Array:
    """Classifies features by a task's head.

    Args:
      head: see `Head`.
      features: pooled, [n, d], float32.

    Returns:
      [n, num_classes], float32.
    """
    x = jnp.asarray(features)
    if "projection" in head:
        x = models.l2_normalize(_affine(head["projection"], x))
    for hidden, last in (("pooler", "classifier"), ("dense", "out_proj")):
        if hidden in head:
            return _affine(head[last], jnp.tanh(_affine(head[hidden], x)))
    return _affine(head, x)


def _affine(layer: Mapping[str, Array], x: jax.Array) -> jax.Array:
    y = jnp.matmul(x, layer["kernel"], precision="highest")
    return y + layer["bias"] if "bias" in layer else y


def logits(head: Head, features: Array) -> np.ndarray:
    """`apply_head` on the host: [n, num_classes], float32."""
    return np.asarray(apply_head(head, features))


def outputs(
    model: Any, params: Params, head: Head, examples: Examples, batch_size: int
) -> np.ndarray:
    """What a task is measured by: its head's outputs, or the scores of the answers to its questions.

    Args:
      model: Linen module.
      params: its parameters.
      head: the task's; not read for questions.
      examples: arrays [n, ...].
      batch_size: B.

    Returns:
      [n, C], float32.
    """
    if has_choices(examples):
        return run_choices(model, params, examples, batch_size)
    return logits(head, run(model, params, examples, batch_size))


def make_calibration(
    model: Any, batches: Sequence[Iterable[Batch]], heads: Sequence[Head]
) -> Calibration:
    """What methods that need data are given, of a model of `retex_jax.models`.

    Args:
      model: Linen module that returns `models.Features`.
      batches: of unlabelled inputs, arrays [B, ...] that the model reads, and `CHOICES` of questions: one iterable a
        task, which can be iterated again; all batches of one shape.
      heads: one a task.

    Returns:
      The inputs, and the model as functions of its parameters.
    """

    def features(params: Params, batch: Batch) -> jax.Array:
        return model.apply({"params": params}, batch).pooled

    def head_logits(params: Params, head: Head, batch: Batch) -> jax.Array:
        if has_choices(batch):
            return choice_logits(model, params, batch)
        return apply_head(head, features(params, batch))

    def linear_inputs(params: Params, batch: Batch) -> dict[str, jax.Array]:
        return models.linear_inputs(model, params, batch)

    return Calibration(batches, features, head_logits, heads, linear_inputs)


def task_scores(
    model: Any,
    merged: Params,
    identifier: Identifier,
    examples: Examples,
    batch_size: int,
    recover: Callable[[int], Params] | None = None,
) -> np.ndarray:
    """How likely each example is of each task.

    Args:
      model: Linen module.
      merged: the merged parameters.
      identifier: its state, its layers and its kind.
      examples: input arrays [n, ...].
      batch_size: B.
      recover: task id -> parameters of the expert; for identifiers that need the experts.

    Returns:
      [n, T], float32; larger is likelier.

    Raises:
      ValueError: if the identifier needs the experts and there is no `recover`.
    """
    method, layer = IDENTIFIERS[identifier.kind], identifier.layer
    if not method.needs_experts:
        features = run(model, merged, examples, batch_size, layer=layer)
        return np.asarray(method.scores(identifier.state, features))
    if recover is None:
        raise ValueError(f"recover: got None, but {identifier.kind!r} needs every expert")
    features = [
        run(model, recover(task), examples, batch_size, layer=layer)
        for task in range(identifier.state.num_tasks)
    ]
    return np.asarray(method.scores(identifier.state, np.stack(features)))


def identify(
    model: Any,
    merged: Params,
    identifier: Identifier,
    examples: Examples,
    batch_size: int,
    recover: Callable[[int], Params] | None = None,
) -> np.ndarray:
    """Picks each example's task by `task_scores`: task ids [n], int32."""
    scores = task_scores(model, merged, identifier, examples, batch_size, recover)
    return scores.argmax(axis=1).astype("i4")


def run_grouped(
    model: Any,
    recover: Callable[[int], Params],
    examples: Examples,
    task_ids: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Runs each example through the expert of its task id, one recovery a task that occurs.

    Args:
      model: Linen module.
      recover: task id -> parameters.
      examples: input arrays [n, ...].
      task_ids: [n], integers.
      batch_size: B.

    Returns:
      Pooled features [n, d], float32, in the order of the examples.
    """
    features = np.empty((len(task_ids), model.config.feature_dim), np.float32)
    for task in np.unique(task_ids):
        members = np.flatnonzero(task_ids == task)
        features[members] = run(model, recover(int(task)), data.take(examples, members), batch_size)
    return features
