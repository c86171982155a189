"""Weights of errors, which are squared with them: of the tasks, and of the leaves where bytes are spent.

Tasks: by energy every task's error counts relative to its own offset. But equal relative errors of parameters leave the
predictions of one task as they were, and change those of another. What should be small is the sum over tasks of K_t,
the mean Kullback-Leibler divergence of the recovered expert's predictions from the expert's own on inputs of task t
(of a head with one output, a regression: under Gaussians of unit variance).
The solvers minimise sum_t w_t^2 E_t, of squared errors E_t; both are stationary at the same point where w_t^2 is in
proportion to dK_t / dE_t, and if all K_t grow by one power of E_t, that is K_t / E_t. Such weights are found by
iterating, from those by energy. As K_t falls steeply with w_t a whole step overshoots: weights go a part of the way,
in logarithms, and the round of the least sum is taken.

Leaves: for small errors K_t is half the sum over a leaf's entries of F_t times the squared error, with F_t the
expert's Fisher information (arXiv:2111.09832, section 3). Of F_t its mean over the leaf is taken, relative to the
mean over all of the leaves, and of these the mean over tasks. The errors of small budgets are far beyond where that
holds, and the differences between leaves smaller than it says, so squared errors count by its square root.

Numerics: logits, gradients and squared errors in float32; divergences and weights in float64.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.calibration import Calibration
from retex_jax.experts import ExpertSet
from retex_jax.mergers.fisher import fisher_diagonal, log_likelihoods
from retex_jax.offsets import differences
from retex_jax.typing import Batch, FlatParams, Params

Rule = Literal["equal", "energy", "divergence"]

LeafRule = Literal["equal", "fisher"]

TASK_NAME = "retex with task_weights = 'divergence'"

LEAF_NAME = "retex with leaf_weights = 'fisher'"

ROUNDS = 3
"""Fits that `by_divergence` tries."""

NUM_INPUTS = 32
"""Of a task, that `by_fisher` takes at least."""

_STEP = 0.4

# Of the mean divergence: what a task counts for that loses less.
_LEAST = 0.01

Recover = Callable[[int], Params]
"""Task -> the recovered expert."""


def needs_data(given: Rule | Sequence[float]) -> bool:
    """Whether the weights are chosen on inputs of every task."""
    return isinstance(given, str) and given == "divergence"


def without_data(experts: ExpertSet, merged: Params, given: Rule | Sequence[float]) -> np.ndarray:
    """The weights that take no inputs; "divergence" begins with those by energy.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      given: a rule, or T positive numbers.

    Returns:
      [T], float64, of mean square 1.
    """
    if not isinstance(given, str):
        return _normalized(np.asarray(given, np.float64))
    if given == "equal":
        return np.ones(experts.num_tasks)
    return _normalized(_inverse_norms(experts, merged))


def by_divergence(
    experts: ExpertSet,
    calibration: Calibration,
    first: np.ndarray,
    solve: Callable[[np.ndarray, int], Recover],
    leaf_weights: Mapping[str, float] | None = None,
) -> np.ndarray:
    """The weights, of those of `ROUNDS` fits, at which the predictions lose least.

    Args:
      experts: the experts; one is held at a time.
      calibration: inputs of every task, `logits` and `heads`.
      first: [T], of mean square 1: of the first fit.
      solve: (weights, number of the round) -> the recovered experts of a fit.
      leaf_weights: that the errors of leaves count with in `solve`, 1 when not given.

    Returns:
      [T], float64, of mean square 1.

    Raises:
      ValueError: if an expert's predictions are not finite.
    """
    predictions = _predictions(calibration)
    tasks = range(experts.num_tasks)
    own = [predictions(experts.expert_params(task), task) for task in tasks]
    if wrong := [experts.names[task] for task in tasks if not np.isfinite(own[task]).all()]:
        raise ValueError(f"calibration.logits: NaN or Inf for the experts of {wrong}")
    tried: list[tuple[float, np.ndarray]] = []
    weights = first
    for number in range(ROUNDS):
        recover = solve(weights, number)
        losses, errors = np.zeros((2, experts.num_tasks))
        for task in tasks:
            params = recover(task)
            losses[task] = divergence(own[task], predictions(params, task))
            errors[task] = squared_error(experts.expert_params(task), params, leaf_weights or {})
        tried.append((float(losses.sum()), weights))
        weights = updated(weights, losses, errors)
    return min(tried, key=lambda one: one[0])[1]


def by_fisher(
    experts: ExpertSet, calibration: Calibration, names: Collection[str]
) -> dict[str, float]:
    """How leaves count where bytes are spent on them, by how far the experts' predictions depend on them.

    Args:
      experts: the experts; one is held at a time, with a gradient.
      calibration: inputs of every task, of which the first `NUM_INPUTS` are used, `logits` and `heads`.
      names: of the leaves.

    Returns:
      Leaf name to its weight; the mean of their fourth powers over all entries is 1. All are 1 where the
      predictions of all experts depend on nothing.

    Raises:
      ValueError: if an expert's Fisher information is not finite.
    """
    total = dict.fromkeys(names, 0.0)
    for task in range(experts.num_tasks):
        own = fisher_diagonal(
            calibration.logits,
            experts.expert_params(task),
            calibration.heads[task],
            _first(calibration.batches[task], NUM_INPUTS),
            variant="batch_sum",
        )
        means = {name: float(x) for name, x in _means({name: own[name] for name in names}).items()}
        mean = np.average(list(means.values()), weights=[own[name].size for name in names])
        if not np.isfinite(mean):
            raise ValueError(
                f"{experts.names[task]}: its Fisher information has values that are NaN or Inf"
            )
        for name in names:
            total[name] += (means[name] / mean if mean > 0 else 1.0) / experts.num_tasks
    return {name: value**0.25 for name, value in total.items()}


def divergence(own: np.ndarray, recovered: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of predictions from the expert's own.

    Args:
      own: of the expert, logarithms of probabilities, [N, C]; of a regression its outputs, [N, 1].
      recovered: of the recovered expert, alike.

    Returns:
      In nats.
    """
    if own.shape[-1] == 1:
        return float(np.mean((own - recovered) ** 2) / 2)
    return float(np.mean(np.sum(np.exp(own) * (own - recovered), axis=-1)))


def updated(weights: np.ndarray, losses: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Goes a part of the way to weights whose squares are in proportion to losses / errors.

    Args:
      weights: w_t, [T], of mean square 1.
      losses: K_t, [T].
      errors: E_t, [T], those of the fit with these weights; a task without error keeps its weight.

    Returns:
      [T], of mean square 1.
    """
    if not losses.max() > 0:
        return weights
    known = errors > 0
    counted = np.maximum(losses, _LEAST * losses.mean())
    aim = _normalized(np.sqrt(counted / np.where(known, errors, 1.0)))
    moved = weights ** (1 - _STEP) * aim**_STEP
    return _normalized(np.where(known, moved, weights))


@jax.jit
def squared_error(
    expert: Params, recovered: Params, leaf_weights: Mapping[str, float]
) -> jax.Array:
    """E_t: the squares of all float leaves' errors, each leaf's times the square of its weight, or of 1; float32."""
    others, total = tree.flatten(recovered), jnp.zeros(())
    for name, leaf in tree.flatten(expert).items():
        if tree.is_float(leaf.dtype):
            error = jnp.asarray(leaf, jnp.float32) - jnp.asarray(others[name], jnp.float32)
            total += leaf_weights.get(name, 1.0) ** 2 * jnp.sum(error**2)
    return total


@jax.jit
def _means(leaves: FlatParams) -> dict[str, jax.Array]:
    return {name: jnp.mean(leaf) for name, leaf in leaves.items()}


def _inverse_norms(experts: ExpertSet, merged: Params) -> np.ndarray:
    base, energies = tree.flatten(merged), np.zeros(experts.num_tasks)
    for name in experts.float_leaves:
        for task in range(experts.num_tasks):
            energies[task] += float(
                (differences.vectors(experts.take([task]), base, name) ** 2).sum()
            )
    # A task without an offset needs nothing, whatever its weight.
    return 1 / np.sqrt(np.where(energies > 0, energies, energies.max() or 1.0))


def _normalized(values: np.ndarray) -> np.ndarray:
    return values / np.sqrt(np.mean(values**2))


def _first(batches: Iterable[Batch], num_inputs: int) -> Iterator[Batch]:
    """The first batches that have so many inputs between them, or all."""
    count = 0
    for batch in batches:
        yield batch
        count += len(next(iter(batch.values())))
        if count >= num_inputs:
            return


def _predictions(calibration: Calibration) -> Callable[[Params, int], np.ndarray]:
    """(params, task) -> what `divergence` takes of all of the task's inputs, [N, C_t], float64."""

    @jax.jit
    def of_batch(params: Params, head: Any, batch: Batch) -> jax.Array:
        return log_likelihoods(calibration.logits(params, head, batch))

    def predictions(params: Params, task: int) -> np.ndarray:
        params, head = jax.device_put((params, calibration.heads[task]))
        found = [np.asarray(of_batch(params, head, batch)) for batch in calibration.batches[task]]
        return np.concatenate(found).astype(np.float64)

    return predictions
