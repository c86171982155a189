"""k nearest neighbours among calibration features: the identifier of Auto-Switch.

Auto-Switch stores 100 inputs a task and takes k = 10 for ViT and 5 for RoBERTa, on features of the pretrained
model; its code averages the votes over a batch of one data set, which tells the model that the batch has one
task. Here every input votes for itself.

The search is exact: distances are sums of squared differences, so that equal points are at distance 0. Points
at the distance of the k-th share the votes that are left, so that neither the order of tasks nor that of points
matters. Needs unlabelled calibration inputs whose task is known, and stores them. Float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.identifier import features as common
from retex_jax.typing import Array

Score = Literal["votes", "distance"]

NEEDS = "unlabelled calibration inputs of each task"

_CHUNK = 16  # inputs whose distances are in memory at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Neighbors:
    """The calibration features.

    Attributes:
      points: of all tasks, [N, d], float32.
      task_ids: of the points, [N], int32.
      num_tasks: T.
      k: neighbours that count.
      score: see `fit`.
      normalize: whether features are scaled to unit length first.
    """

    points: jax.Array
    task_ids: jax.Array
    num_tasks: int = field(metadata={"static": True})
    k: int = field(default=10, metadata={"static": True})
    score: Score = field(default="votes", metadata={"static": True})
    normalize: bool = field(default=False, metadata={"static": True})


def fit(
    features_per_task: Sequence[Array],
    *,
    k: int = 10,
    score: Score = "votes",
    normalize: bool = False,
) -> Neighbors:
    """Keeps the calibration features.

    Args:
      features_per_task: T arrays [n_t, d] of calibration features.
      k: neighbours that count.
      score: "votes": the fraction of the k nearest points that are the task's (Auto-Switch). "distance": minus
        the mean distance to the task's own k nearest points, which also tells how far outside an input is.
      normalize: whether to scale every feature to unit length first; the order by distance is then that by
        cosine.

    Returns:
      The points.

    Raises:
      ValueError: if there is no task, the arrays are not [n_t, d] with one d, a value is NaN or Inf, `score`
        is unknown, or `k` is not from 1 to the number of points ("distance": of any task's); all problems
        are listed.
    """
    features, problems = common.to_host(features_per_task)
    problems += option_problems(k=k, score=score)
    sizes = [len(task) for task in features if task.ndim]
    largest = min(sizes, default=0) if score == "distance" else sum(sizes)
    if not problems and k > largest:
        problems.append(f"k: got {k}, expected 1 to {largest} with score={score!r}")
    if problems:
        raise ValueError("\n".join(problems))
    points = np.concatenate([common.unit(task) if normalize else task for task in features])
    task_ids = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return Neighbors(
        jnp.asarray(points, jnp.float32),
        jnp.asarray(task_ids),
        len(sizes),
        int(k),
        score,
        normalize,
    )


def option_problems(*, k: int = 10, score: str = "votes", **_: object) -> list[str]:
    """What is wrong with options of `fit` whatever the features are."""
    problems = []
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        problems.append(f"k: got {k!r}, expected an integer of 1 or more")
    if score not in ("votes", "distance"):
        problems.append(f"score: got {score!r}, expected 'votes' or 'distance'")
    return problems


@jax.jit
def scores(neighbors: Neighbors, features: jax.Array) -> jax.Array:
    """Votes of the nearest points, or minus the distance to each task's.

    Args:
      neighbors: from `fit`.
      features: [B, d], float32.

    Returns:
      [B, T], float32: in [0, 1] and of sum 1, or <= 0; larger is likelier.
    """
    tasks = jnp.arange(neighbors.num_tasks)

    def votes(distances: jax.Array) -> jax.Array:
        last = -jax.lax.top_k(-distances, neighbors.k)[0][-1]
        nearer, at_last = distances < last, distances == last
        weights = nearer + at_last * (neighbors.k - nearer.sum()) / at_last.sum()
        own = neighbors.task_ids[None] == tasks[:, None]
        return jnp.sum(jnp.where(own, weights, 0), axis=1) / neighbors.k

    def own_distance(distances: jax.Array) -> jax.Array:
        def nearest(task: jax.Array) -> jax.Array:
            own = jnp.where(neighbors.task_ids == task, distances, jnp.inf)
            return jnp.mean(jnp.sqrt(-jax.lax.top_k(-own, neighbors.k)[0]))

        return -jax.lax.map(nearest, tasks)

    def one(feature: jax.Array) -> jax.Array:
        distances = jnp.sum((neighbors.points - feature) ** 2, axis=1)
        return votes(distances) if neighbors.score == "votes" else own_distance(distances)

    features = common.on_device(features, neighbors.normalize)
    return jax.lax.map(one, features, batch_size=_CHUNK)


def add(neighbors: Neighbors, features: Array) -> Neighbors:
    """Adds a task's points.

    Args:
      neighbors: from `fit`.
      features: [n, d], of the new task.

    Returns:
      The points of T + 1 tasks, of which the others' are as they were.

    Raises:
      ValueError: as `fit`; there may be fewer than `k` points with "votes".
    """
    k = neighbors.k if neighbors.score == "distance" else 1
    own = fit([features], k=k, score=neighbors.score, normalize=neighbors.normalize)
    return replace(
        neighbors,
        points=jnp.concatenate([neighbors.points, own.points]),
        task_ids=jnp.concatenate([neighbors.task_ids, own.task_ids + neighbors.num_tasks]),
        num_tasks=neighbors.num_tasks + 1,
    )


def take(neighbors: Neighbors, tasks: Sequence[int]) -> Neighbors:
    """The points of some tasks only, in this order; `k` is at most their number."""
    rows = [np.flatnonzero(np.asarray(neighbors.task_ids) == task) for task in tasks]
    task_ids = np.repeat(np.arange(len(rows), dtype=np.int32), [len(own) for own in rows])
    return replace(
        neighbors,
        points=neighbors.points[np.concatenate(rows)],
        task_ids=jnp.asarray(task_ids),
        num_tasks=len(rows),
        k=min(neighbors.k, len(task_ids)),
    )
