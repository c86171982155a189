"""What experts of seen tasks give on unseen ones: heads, features of every rule, accuracies.

A rule says through which parameters an input of a task runs. Static mergers have one model; ReTeX and DTS mix what they
stored of the seen tasks by weights (arXiv:2606.26902v2; DTS, section 3.3), of each input or of each task. The rule
for a seen task is the same one, so that what it costs there shows.

The backbone of an unseen task has no head of its own: a zero-shot head where the model has a text tower, else the
classes' means over the task's labelled training inputs (Snell et al., arXiv:1703.05175, section 2.3), of features
through the rule under test. Nothing else sees a label, and nothing before `accuracies` one of a test input.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import data, metrics, offsets, recovery
from retex_jax.identifier import weights as seen_weights
from retex_jax.typing import Array, Params

Features = Callable[[str, str], np.ndarray]
"""(task name, split) -> features of the task's inputs, [n, d], float32."""

_CHUNK = 32  # inputs whose mixtures are in memory at a time, a power of two


@dataclass(frozen=True)
class World:
    """The tasks of one split into seen and unseen.

    Attributes:
      model: Linen module.
      batch_size: B.
      seen: names of the tasks whose experts are at hand, in the experts' order.
      unseen: names of the others.
      inputs: task name to split to what the model reads, [n, ...]; no labels.
      labels: task name to split to labels, [n].
      num_classes: by task name.
      heads: of seen tasks; of unseen ones where they need no expert.
    """

    model: Any
    batch_size: int
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    inputs: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
    labels: Mapping[str, Mapping[str, np.ndarray]]
    num_classes: Mapping[str, int]
    heads: Mapping[str, recovery.Head]

    def run(self, params: Params, task: str, split: str) -> np.ndarray:
        """Features of a task's inputs through one model, [n, d]."""
        return recovery.run(self.model, params, self.inputs[task][split], self.batch_size)


def make_world(
    model: Any,
    tasks: Sequence[data.Task],
    heads: Mapping[str, recovery.Head],
    unseen: Sequence[str],
    *,
    counts: Mapping[str, int],
    batch_size: int,
) -> World:
    """Parts inputs from labels, and drops the heads of unseen tasks that came from their experts.

    Args:
      model: Linen module.
      tasks: all of them.
      heads: by task name; one that needs no expert is a zero-shot head, with a "projection".
      unseen: names.
      counts: split to how many inputs a task, the first.
      batch_size: B.

    Returns:
      The world; tasks keep their order.

    Raises:
      ValueError: if a class of an unseen task that needs a head is not among its training inputs; all are listed.
    """
    read = model.example_batch()
    parts = {
        task.name: {
            split: {name: array[:count] for name, array in task.splits[split].items()}
            for split, count in counts.items()
        }
        for task in tasks
    }
    world = World(
        model,
        batch_size,
        tuple(task.name for task in tasks if task.name not in unseen),
        tuple(task.name for task in tasks if task.name in unseen),
        {
            task: {
                split: {name: array for name, array in part.items() if name in read}
                for split, part in splits.items()
            }
            for task, splits in parts.items()
        },
        {
            task: {split: part["label"] for split, part in splits.items() if "label" in part}
            for task, splits in parts.items()
        },
        {task.name: task.num_classes for task in tasks},
        {name: head for name, head in heads.items() if name not in unseen or is_zero_shot(head)},
    )
    problems = [
        f"unseen.num_train: class {task.classes[label]!r} of {task.name} has no example among the first "
        f"{counts['train']} training inputs"
        for task in tasks
        if task.name not in world.heads
        for label in sorted({*range(task.num_classes)} - {*world.labels[task.name]["train"]})
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return world


def is_zero_shot(head: recovery.Head) -> bool:
    """Whether a head was made of class names alone."""
    return "projection" in head


def prototype_head(features: Array, labels: np.ndarray, num_classes: int) -> recovery.Head:
    """The head that picks the class whose mean feature is nearest (arXiv:1703.05175, Eqs. 1, 2 and 8).

    -||x - mu_c||^2 / 2 is x mu_c - ||mu_c||^2 / 2 up to what all classes share.

    Args:
      features: [n, d], float32.
      labels: [n], 0 to `num_classes` - 1, each at least once.
      num_classes: C.

    Returns:
      "kernel" [d, C] and "bias" [C], float32; sums in float64.

    Raises:
      ValueError: if a class has no example.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if absent := sorted({*range(num_classes)} - {*labels.tolist()}):
        raise ValueError(f"labels: classes {absent} have no example")
    means = np.stack([features[labels == label].mean(axis=0) for label in range(num_classes)])
    return {
        "kernel": means.T.astype(np.float32),
        "bias": (-0.5 * np.sum(means**2, axis=1)).astype(np.float32),
    }


def predictions(world: World, features: Features, task: str, split: str = "test") -> np.ndarray:
    """Predicts the classes of a task's inputs without their labels, [n].

    Args:
      world: the tasks.
      features: the rule.
      task: with the head of the world, or with one of prototypes.
      split: of the inputs.

    Returns:
      Class indices.
    """
    head = world.heads.get(task) or prototype_head(
        features(task, "train"), world.labels[task]["train"], world.num_classes[task]
    )
    return recovery.logits(head, features(task, split)).argmax(axis=1)


def accuracies(world: World, features: Features) -> dict[str, float]:
    """Test accuracy of a rule on every task: seen ones with their own heads, unseen ones as above."""
    return {
        task: metrics.accuracy(predictions(world, features, task), world.labels[task]["test"])
        for task in (*world.seen, *world.unseen)
    }


def of_params(world: World, params_of: Callable[[str], Params]) -> Features:
    """The rule of one model a task: task name -> params, asked for once while a task is evaluated."""
    kept = lru_cache(maxsize=1)(params_of)
    return lambda task, split: world.run(kept(task), task, split)


def of_inputs(
    world: World, state: offsets.OffsetState, weights_of: Callable[[str, str], Array]
) -> Features:
    """The rule of one mixture an input: (task name, split) -> weights over seen tasks, [n, T]."""
    return lambda task, split: mixed_features(
        world.model, state, weights_of(task, split), world.inputs[task][split]
    )


def mixed_features(
    model: Any, state: offsets.OffsetState, weights: Array, inputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Runs each input through the mixture of its own weights, with factors instead of a model an input.

    A mixture's offset is that of the mixed embedding. So the inputs of a chunk are taken as tasks of their own, whose
    embeddings are the mixtures, and go through factored recovery at once.

    Args:
      model: Linen module, unrolled.
      state: from `offsets.fit`.
      weights: over tasks, [n, T], float32.
      inputs: what the model reads, [n, ...].

    Returns:
      Pooled features [n, d], float32: those of `offsets.mix` with each input's weights.
    """
    weights = jnp.asarray(weights, jnp.float32)
    embeddings = jnp.matmul(weights, state.task_embeddings, precision="highest")
    order = data.by_length(inputs)
    features = np.empty((len(order), model.config.feature_dim), np.float32)
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        filled = np.concatenate([rows, np.repeat(rows[:1], _CHUNK - len(rows))])
        mixtures = replace(state, task_embeddings=embeddings[filled])
        recoverer = recovery.Recoverer(model, mixtures, max_batch=_CHUNK)
        found = recoverer.features(data.take(inputs, filled), np.arange(_CHUNK), "factored")
        features[rows] = found[: len(rows)]
    return features


def routed_features(world: World, state: offsets.OffsetState, scores: Features) -> Features:
    """The rule of hard weights of each input: the expert that its scores pick."""
    recoverer = recovery.Recoverer(world.model, state, max_batch=_CHUNK)

    def features(task: str, split: str) -> np.ndarray:
        ids = scores(task, split).argmax(axis=1)
        return recoverer.features(world.inputs[task][split], ids, "materialized")

    return features


def identify(world: World, state: offsets.OffsetState, identifier: recovery.Identifier) -> Features:
    """(Task name, split) -> scores over seen tasks, [n, T], float32; computed once each."""

    @cache
    def scores(task: str, split: str) -> np.ndarray:
        return recovery.task_scores(
            world.model,
            state.merged,
            identifier,
            world.inputs[task][split],
            world.batch_size,
            lambda index: offsets.recover(state, index),
        )

    return scores


def score_spread(scores: Sequence[Array]) -> float:
    """The unit of temperatures: the root mean square of scores about each input's mean over tasks.

    Args:
      scores: of the inputs of each seen task, T arrays [n_t, T].

    Returns:
      The spread, each task counted the same; 1 where scores do not differ.
    """
    squares = [
        np.mean((found - found.mean(axis=1, keepdims=True)) ** 2)
        for found in (np.asarray(task, np.float64) for task in scores)
    ]
    return float(np.sqrt(np.mean(squares))) or 1.0


def choose_temperature(
    world: World,
    mix: Callable[[jax.Array], Params],
    scores: Features,
    temperatures: Sequence[float],
) -> dict[float, float]:
    """Tries temperatures on seen tasks as if they were unseen: without weight on their own expert.

    Args:
      world: with validation inputs; those of unseen tasks are not read.
      mix: weights [T] -> params.
      scores: from `identify`.
      temperatures: of `weights.soft`, to try on the mean weights of each task's training inputs.

    Returns:
      Temperature to the mean over seen tasks of the validation accuracy with heads made as for unseen tasks.
    """
    made = replace(
        world, heads={name: head for name, head in world.heads.items() if is_zero_shot(head)}
    )
    own = dict(zip(world.seen, np.eye(len(world.seen), dtype=bool), strict=True))

    def accuracy(task: str, temperature: float) -> float:
        others = np.where(own[task], -np.inf, scores(task, "train"))
        params = mix(seen_weights.of_task(seen_weights.soft(others, temperature)))
        found = predictions(made, of_params(made, lambda _: params), task, "val")
        return metrics.accuracy(found, world.labels[task]["val"])

    return {
        temperature: float(np.mean([accuracy(task, temperature) for task in world.seen]))
        for temperature in temperatures
    }


def text_embeddings(
    world: World,
    tasks: Sequence[data.Task],
    pretrained: Params,
    encode: Callable[[list[str]], Mapping[str, np.ndarray]] | None,
) -> dict[str, np.ndarray] | None:
    """Embeds the class names of every task.

    Args:
      world: the model; zero-shot heads are embeddings of class names already.
      tasks: all of them.
      pretrained: parameters of a text model.
      encode: texts -> what the model reads; None where it reads none.

    Returns:
      Task name to [c, d]; None where there is no text tower.
    """
    if all(task.name in world.heads and is_zero_shot(world.heads[task.name]) for task in tasks):
        return {task.name: np.asarray(world.heads[task.name]["kernel"]).T for task in tasks}
    if encode is None:
        return None
    return {
        task.name: recovery.run(
            world.model, pretrained, encode(list(task.classes)), world.batch_size
        )
        for task in tasks
    }
