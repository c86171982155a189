"""Fisher merging (arXiv:2111.09832): the mean of the experts, each entry weighted by its Fisher information.

theta = sum_t c_t F_t theta_t / sum_t c_t F_t (section 3, the closed form of its isotropic-to-diagonal
posterior). F_t is the diagonal of expert t's Fisher information on inputs of its own task, through its own
head; labels are not used, as the expectation over classes is the model's own.

The two codes differ in more than the Fisher itself; a variant follows its code in all of this:

"per_example", as the authors' code (mmatena/model_merging), which is the definition:
- F = mean over examples of sum_c p_c (grad log p_c)^2, with the gradient of one example at a time;
- F is raised to the floor, max(F, floor). (By default that code raises only the first model, its
  "target", and leaves the "donors"; here no task is the target, so all are raised.)
- c_t is divided by ||F_t||_2 over the whole model, before the floor.

"batch_sum", as MergeLM and fusion_bench:
- the gradient of sum_examples sum_c sqrt(p_c) log p_c, with p held fixed, over a whole batch; its square,
  summed over batches and divided by the number of examples. One backward pass a batch, but the square of a
  sum: cross terms of examples and of classes remain, and the result depends on the batch size;
- the floor is added, F + floor;
- c_t is divided by ||F_t||_2 + floor.

Both codes normalise by default in the merging function (MergeLM's command line does not, unless asked).
Entries of F are often far below the floor of 1e-6, which then makes the weights even: the floor is a
hyperparameter, not a safeguard only.

A head with one output is a regression. Its Fisher information, under a unit-variance Gaussian, is
(grad f)^2, which needs no label; MergeLM squares the gradient of the batch's labelled MSE instead.

All classes of all examples cost one forward and backward pass each. With many classes, `num_samples` draws
classes from p instead (an unbiased estimate, as the paper's definition is an expectation).

On two busy cores one gradient of MiniLM-L6 on 32 tokens took 0.08 s, and 0.38 s each when four were batched
by `chunk_size`, whose default is therefore 1; an accelerator may want more (not measured).

Memory: one expert, its F, the running numerator and denominator, and `chunk_size` gradients; not T models.
Float32, norms in float64.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.mergers.average import average
from retex_jax.mergers.consensus import per_task
from retex_jax.mergers.leafwise import merge_leaves
from retex_jax.typing import Batch, FlatParams, Params

Variant = Literal["per_example", "batch_sum"]
VARIANTS = ("per_example", "batch_sum")

Logits = Callable[[Params, Any, Batch], jax.Array]


def log_likelihoods(logits: jax.Array) -> jax.Array:
    """The log-likelihood of every class; of a regression, what has the gradient of a unit-variance Gaussian's.

    Args:
      logits: [B, C], float32.

    Returns:
      [B, C], float32: the logits themselves where C == 1.
    """
    return logits if logits.shape[-1] == 1 else jax.nn.log_softmax(logits, axis=-1)


class _Model(NamedTuple):
    """A model in float32, and a head: what gradients are taken by, and the rest."""

    free: Mapping[str, jax.Array]
    fixed: Mapping[str, jax.Array]
    head: Any


def fisher_diagonal(
    logits: Logits,
    params: Params,
    head: Any,
    batches: Iterable[Batch],
    *,
    variant: Variant = "per_example",
    chunk_size: int = 1,
    num_samples: int | None = None,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The diagonal of a model's Fisher information; see the module's docstring for the variants.

    Args:
      logits: (params, head, batch) -> [B, C], float32. Compiled once for all models and heads of equal shapes, as
        long as it is the same function.
      params: the model; float leaves are taken in float32.
      head: what `logits` reads of the task: a pytree of arrays.
      batches: batches of one shape, at least one.
      variant: "per_example" or "batch_sum".
      chunk_size: how many gradients "per_example" holds at once.
      num_samples: classes that "per_example" draws for each example; None takes all of them.
      key: typed PRNG key of these draws; `jax.random.key(0)` when not given.

    Returns:
      Leaf name of a float leaf to [*shape], float32, >= 0.
    """
    leaves = {name: jnp.asarray(leaf) for name, leaf in tree.flatten(params).items()}
    fixed = {name: leaf for name, leaf in leaves.items() if not tree.is_float(leaf.dtype)}
    free = {name: leaves[name].astype(jnp.float32) for name in leaves.keys() - fixed.keys()}
    model = _Model(free, fixed, head)
    key = jax.random.key(0) if key is None else key
    total = {name: jnp.zeros_like(leaf) for name, leaf in free.items()}
    count = 0
    for number, batch in enumerate(batches):
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        if variant == "batch_sum":
            total = _add_batch(logits, total, model, batch)
        else:
            drawn = jax.random.fold_in(key, number)
            total = _add_examples(logits, total, model, batch, drawn, num_samples, chunk_size)
        count += len(next(iter(batch.values())))
    return {name: sums / count for name, sums in total.items()}


def _scores(logits: Logits, model: _Model, batch: Batch) -> jax.Array:
    params = tree.unflatten({**model.free, **model.fixed})
    return log_likelihoods(logits(params, model.head, batch))


@partial(jax.jit, static_argnames=("logits", "num_samples", "chunk_size"), donate_argnames="total")
def _add_examples(
    logits: Logits,
    total: FlatParams,
    model: _Model,
    batch: Batch,
    key: jax.Array,
    num_samples: int | None,
    chunk_size: int,
) -> FlatParams:
    """Adds p_c (grad log p_c)^2 of every example and class."""
    pairs = _pairs(_scores(logits, model, batch), num_samples, key, chunk_size)

    def one_score(free: Mapping[str, jax.Array], example: Batch, index: jax.Array) -> jax.Array:
        single = {name: x[None] for name, x in example.items()}
        return _scores(logits, model._replace(free=free), single)[0, index]

    def add_chunk(total: FlatParams, chunk: tuple[jax.Array, ...]) -> tuple[FlatParams, None]:
        examples, classes, weights = chunk
        chosen = {name: x[examples] for name, x in batch.items()}
        gradients = jax.vmap(jax.grad(one_score), (None, 0, 0))(model.free, chosen, classes)
        return {
            name: sums + jnp.sum(_column(weights, sums.ndim) * gradients[name] ** 2, axis=0)
            for name, sums in total.items()
        }, None

    return jax.lax.scan(add_chunk, total, pairs)[0]


@partial(jax.jit, static_argnames="logits", donate_argnames="total")
def _add_batch(logits: Logits, total: FlatParams, model: _Model, batch: Batch) -> FlatParams:
    """Adds the square of the gradient of the sum over examples and classes of sqrt(p_c) log p_c."""

    def objective(free: Mapping[str, jax.Array]) -> jax.Array:
        values = _scores(logits, model._replace(free=free), batch)
        return jnp.sum(jax.lax.stop_gradient(jnp.sqrt(_weights(values))) * values)

    gradients = jax.grad(objective)(model.free)
    return {name: sums + gradients[name] ** 2 for name, sums in total.items()}


def _weights(values: jax.Array) -> jax.Array:
    """The probability of every class, [B, C]; 1 where there is one output."""
    return jnp.exp(values) if values.shape[-1] > 1 else jnp.ones_like(values)


def _column(weights: jax.Array, ndim: int) -> jax.Array:
    return weights.reshape(-1, *[1] * ndim)


def _pairs(
    values: jax.Array, num_samples: int | None, key: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients that a batch needs: examples, classes and weights, [chunks, chunk_size] each."""
    batch, num_classes = values.shape
    if num_samples is None or num_classes == 1:
        examples = jnp.repeat(jnp.arange(batch), num_classes)
        classes = jnp.tile(jnp.arange(num_classes), batch)
        weights = _weights(values).reshape(-1)
    else:
        examples = jnp.tile(jnp.arange(batch), num_samples)
        classes = jax.random.categorical(key, values, shape=(num_samples, batch)).reshape(-1)
        weights = jnp.full(batch * num_samples, 1 / num_samples, jnp.float32)
    extra = -len(weights) % chunk_size  # of weight 0
    examples, classes, weights = (
        jnp.pad(x, (0, extra)).reshape(-1, chunk_size) for x in (examples, classes, weights)
    )
    return examples, classes, weights


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    variant: Variant = "per_example",
    scaling: float | Sequence[float] = 1.0,
    floor: float = 1e-6,
    normalize: bool = True,
    chunk_size: int = 1,
    num_samples: int | None = None,
) -> Params:
    """Merges by Fisher-weighted averaging.

    Args:
      experts: the experts.
      key: typed PRNG key, used with `num_samples` only; folded by the expert's name.
      calibration: inputs of every task, and `logits` and `heads`. The paper and its followers take 256 to 2048
        examples a task.
      variant: "per_example" or "batch_sum"; see the module's docstring.
      scaling: c_t, one number or T of them, >= 0, not all 0. Only their ratios matter; the paper
        searches them on validation data, MergeLM's default is even.
      floor: least weight of an entry, >= 0. Where all weights are 0 the plain mean is taken.
      normalize: whether c_t is divided by the norm of F_t.
      chunk_size: how many gradients "per_example" computes and holds at once; each is as large as the
        model.
      num_samples: classes that "per_example" draws for each example; None takes all of them.

    Returns:
      The merged model.

    Raises:
      ValueError: if the calibration does not fit (see `calibration.require`), a keyword is out of its
        range, or a Fisher information is not finite; all keywords are listed.
    """
    problems = []
    if variant not in VARIANTS:
        suggestion = tree.did_you_mean(str(variant), VARIANTS)
        problems.append(f"variant: got {variant!r}, expected one of {list(VARIANTS)}{suggestion}")
    if not (floor >= 0 and np.isfinite(floor)):
        problems.append(f"floor: got {floor!r}, expected a finite number >= 0")
    counts = {"chunk_size": chunk_size} | (
        {"num_samples": num_samples} if num_samples is not None else {}
    )
    for name, count in counts.items():
        is_count = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if not is_count or count < 1:
            problems.append(f"{name}: got {count!r}, expected an integer >= 1")
    if variant == "batch_sum" and num_samples is not None:
        problems.append(f"num_samples: got {num_samples!r}, but variant='batch_sum' draws nothing")
    try:
        coefficients = np.asarray(per_task("scaling", scaling, experts.num_tasks), np.float64)
        if not coefficients.any():
            problems.append(f"scaling: got {scaling!r}, expected one that is not 0")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    calibration = require(calibration, "fisher", experts.num_tasks)
    key = jax.random.key(0) if key is None else key

    numerators: dict[str, jax.Array] = {}
    denominators: dict[str, jax.Array] = {}
    for task, expert in enumerate(experts.names):
        params = experts.expert_params(task)
        fisher = fisher_diagonal(
            calibration.logits,
            params,
            calibration.heads[task],
            calibration.batches[task],
            variant=variant,
            chunk_size=chunk_size,
            num_samples=num_samples,
            key=jax.random.fold_in(key, zlib.crc32(expert.encode())),
        )
        norm = _norm(fisher, expert)
        if normalize:
            norm += floor if variant == "batch_sum" else 0.0
        # Where there is no information at all, or less than float32 holds, the floor decides.
        divisor = norm if normalize and norm >= np.finfo(np.float32).tiny else 1.0
        flat = tree.flatten(params)
        for name, values in fisher.items():
            least = values + floor if variant == "batch_sum" else jnp.maximum(values, floor)
            weights = coefficients[task] * (least / divisor)
            weighted = weights * jnp.asarray(flat[name], jnp.float32)
            numerators[name] = numerators.get(name, 0.0) + weighted
            denominators[name] = denominators.get(name, 0.0) + weights

    def merge_leaf(name: str) -> jax.Array:
        total = denominators.pop(name)
        mean = average(experts, name)
        return jnp.where(total > 0, numerators.pop(name) / jnp.where(total > 0, total, 1.0), mean)

    return merge_leaves(experts, merge_leaf)


def _norm(fisher: dict[str, jax.Array], expert: str) -> float:
    """The L2 norm over all leaves, in float64.

    Raises:
      ValueError: if it is not finite.
    """
    total = sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in fisher.values())
    if not np.isfinite(total):
        raise ValueError(f"{expert}: its Fisher information has values that are NaN or Inf")
    return total**0.5
