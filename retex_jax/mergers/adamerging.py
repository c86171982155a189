"""AdaMerging (arXiv:2310.02575): coefficients that minimise the entropy of the merged model's predictions.

theta = theta_0 + sum_t lambda_t tau_t, where the coefficients, one a task or one a task and leaf, minimise
sum_t of the mean entropy of the predictions on unlabelled inputs of task t, by Adam (1e-3, 0.9, 0.999)
from 0.3. The authors take the inputs from the *test* sets on which they then report accuracy: the method is
transductive. AdaMerging++ takes TIES' trimmed task vectors (20%), without the entries that lost the
election of the sign, in place of tau_t.

What the authors' code and fusion_bench do, and the paper does not say:
- "Layer-wise" is one coefficient per parameter tensor, not per block.
- The code takes two batches of 16 a task and step (its loop breaks after the second), fusion_bench one.
  The objective is the sum over them, of which Adam's steps hardly depend on the scale.
- The code clamps the coefficients to [0, 1] in the forward pass only: the raw ones may leave the interval,
  and then have no gradient (but Adam's momentum). fusion_bench does not clamp by default.
- The code takes 500 steps, fusion_bench 1000. Both draw batches at random; here they are taken in the
  calibration's order, again and again, so the caller shuffles.
- A head with one output (regression) has entropy 0 and changes nothing.

The derivative of the entropy by lambda_t of a leaf is <d entropy / d theta, tau_t>. So each step merges once,
adds up the gradient by the merged parameters over the tasks' batches in one donated buffer, and takes inner
products leaf by leaf: nothing is differentiated through the merge, and but for the task vectors no memory
grows with T. They are held (T float32 models), or with `resident=False` read again, a leaf at a time, twice
a step. The pass through the model is compiled once for all heads of a shape. Arithmetic is in float32; while
fitting, the merged parameters are float32 whatever the experts' dtype is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from retex_jax import sharding, tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.mergers import ties
from retex_jax.mergers.leafwise import merge_leaves, sum_over_tasks
from retex_jax.typing import Array, Batch, Params, ProgressFn

NEEDS = "unlabelled test inputs"

Granularity = Literal["task", "layer"]
Variant = Literal["official", "fusion_bench"]


class Protocol(NamedTuple):
    """What the two public implementations do differently."""

    steps: int
    batches_per_step: int
    clamp: bool


PROTOCOLS: dict[str, Protocol] = {
    "official": Protocol(steps=500, batches_per_step=2, clamp=True),
    "fusion_bench": Protocol(steps=1000, batches_per_step=1, clamp=False),
}


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of the softmax distribution, in nats.

    Args:
      logits: [B, C], float32.

    Returns:
      [B], float32.
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)


@jax.jit
def merge_leaf(
    pretrained: jax.Array, task_vectors: jax.Array, coefficients: jax.Array
) -> jax.Array:
    """theta_0 + sum_t lambda_t tau_t.

    Args:
      pretrained: [*shape], float32.
      task_vectors: [T, *shape], float32.
      coefficients: lambda_t, [T], float32.

    Returns:
      [*shape], float32.
    """
    weights = coefficients.reshape(-1, *[1] * pretrained.ndim)
    return pretrained + sum_over_tasks(weights * task_vectors)


@jax.jit
def inner_products(gradient: jax.Array, task_vectors: jax.Array) -> jax.Array:
    """<gradient, tau_t>: the derivative by each task's coefficient.

    Args:
      gradient: by the merged leaf, [*shape], float32.
      task_vectors: [T, *shape], float32.

    Returns:
      [T], float32.
    """
    return jnp.tensordot(task_vectors, gradient, axes=gradient.ndim, precision="highest")


@jax.jit
def agreeing(task_vectors: jax.Array, limits: jax.Array, majority_sign: float) -> jax.Array:
    """Trims each task vector, and zeroes what does not have the elected sign: AdaMerging++.

    Args:
      task_vectors: [T, *shape], float32.
      limits: TIES' thresholds, [T], float32.
      majority_sign: of the whole model, -1 or +1.

    Returns:
      [T, *shape], float32.
    """
    trimmed = ties.trim(task_vectors, limits)
    return jnp.where(trimmed * ties.elect_signs(trimmed, majority_sign) > 0, trimmed, 0.0)


def _readers(
    experts: ExpertSet, plus_plus: bool, density: float, mesh: Mesh | None = None
) -> tuple[Callable[[str], jax.Array], Callable[[str], jax.Array]]:
    """Leaf name to pretrained leaf [*shape], and to the task vectors to merge [T, *shape]; float32."""

    def place(name: str, leaf: jax.Array) -> jax.Array:
        return sharding.place({name: leaf}, mesh, sharding.MODEL_RULES)[name]

    def pretrained(name: str) -> jax.Array:
        return place(name, jnp.asarray(experts.pretrained(name), dtype=jnp.float32))

    if not plus_plus:
        return pretrained, lambda name: place(name, experts.task_vectors(name))
    limits = jnp.asarray(ties.thresholds(experts, density))
    majority_sign = ties.majority_sign(experts, limits)

    def task_vectors(name: str) -> jax.Array:
        return place(name, agreeing(experts.task_vectors(name), limits, majority_sign))

    return pretrained, task_vectors


def _endless(task: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        seen = False
        for batch in batches:
            seen = True
            yield batch
        if not seen:
            raise ValueError(
                f"calibration.batches: those of {task} ran out, expected an iterable that can be "
                "iterated again"
            )


def _check_settings(granularity: str, variant: str, protocol: Protocol, **numbers: float) -> None:
    problems = []
    if granularity not in ("task", "layer"):
        problems.append(f"granularity: got {granularity!r}, expected 'task' or 'layer'")
    if variant not in PROTOCOLS:
        problems.append(f"variant: got {variant!r}, expected one of {sorted(PROTOCOLS)}")
    for name, least in (("steps", 0), ("batches_per_step", 1)):
        value = getattr(protocol, name)
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_integer or value < least:
            problems.append(f"{name}: got {value!r}, expected an integer >= {least}")
    ranges = {
        "init": (np.isfinite, "a finite number"),
        "learning_rate": (lambda value: 0 < value < np.inf, "a positive number"),
        "b1": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
        "b2": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
        "density": (lambda value: 0 < value <= 1, "a fraction in (0, 1]"),
    }
    for name, (is_right, expected) in ranges.items():
        if not is_right(numbers[name]):
            problems.append(f"{name}: got {numbers[name]!r}, expected {expected}")
    if problems:
        raise ValueError("; ".join(problems))


def fit_coefficients(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    granularity: Granularity = "layer",
    plus_plus: bool = False,
    variant: Variant = "official",
    steps: int | None = None,
    batches_per_step: int | None = None,
    clamp: bool | None = None,
    init: float = 0.3,
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    density: float = 0.2,
    resident: bool = True,
    mesh: Mesh | None = None,
    progress: ProgressFn | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Learns the coefficients.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      calibration: batches of unlabelled inputs of each task (the published numbers: 16 test inputs a
        batch, shuffled), heads and logits; the parameters that `logits` gets are the experts' leaves, float32.
      granularity: one coefficient a task ("task"), or one a task and leaf ("layer").
      plus_plus: AdaMerging++: trimmed task vectors without the entries of the sign that lost.
      variant: whose `steps`, `batches_per_step` and `clamp` are taken where they are not given:
        "official" (500, 2, True) or "fusion_bench" (1000, 1, False).
      steps: of Adam; with 0 the coefficients stay at `init`.
      batches_per_step: batches of each task in one step.
      clamp: whether the coefficients are clamped to [0, 1] in the merge.
      init: of all coefficients.
      learning_rate: Adam's.
      b1: Adam's decay of the mean.
      b2: Adam's decay of the squares.
      density: fraction of each task vector that AdaMerging++ keeps, in (0, 1].
      resident: whether to hold all task vectors in memory, or to read each leaf twice a step. The
        answer is the same.
      mesh: of axes "data", over which each batch is divided, "model", over which merged model, task vectors and
        gradient are split, or both; the answer is that of one device, but for the rounding of sums. One device when
        not given.
      progress: called with (steps done, steps) after each step.

    Returns:
      The coefficients as they are merged with, by float leaf: [T], float32 (the same for all leaves where
      granularity is "task"); and the mean entropy of each task's batches before each step, [steps, T],
      float32.

    Raises:
      ValueError: if the calibration does not have batches of every task that can be iterated again, or
        a setting is unknown or out of range; all such settings are listed. If the mesh has other axes.
      FloatingPointError: if an entropy or a derivative is not finite, with the step.
    """
    del key
    default = PROTOCOLS.get(variant, PROTOCOLS["official"])
    protocol = Protocol(
        default.steps if steps is None else steps,
        default.batches_per_step if batches_per_step is None else batches_per_step,
        default.clamp if clamp is None else clamp,
    )
    adam = {"learning_rate": learning_rate, "b1": b1, "b2": b2}
    _check_settings(granularity, variant, protocol, init=init, density=density, **adam)
    if mesh is not None:
        sharding.check_axes(mesh, (sharding.DATA, sharding.MODEL))
    calibration = require(calibration, "AdaMerging", experts.num_tasks)

    names = experts.float_leaves
    pretrained, task_vectors = _readers(experts, plus_plus, density, mesh)
    if resident:
        pretrained = {name: pretrained(name) for name in names}.__getitem__
        task_vectors = {name: task_vectors(name) for name in names}.__getitem__
    entropies_and_gradient = _objective(experts, calibration, protocol.batches_per_step, mesh)
    optimizer = optax.adam(learning_rate, b1=b1, b2=b2)
    rows = 1 if granularity == "task" else len(names)
    raw = jnp.full((rows, experts.num_tasks), init, dtype=jnp.float32)
    opt_state = optimizer.init(raw)
    entropies = np.zeros((protocol.steps, experts.num_tasks), np.float32)

    def coefficients() -> dict[str, np.ndarray]:
        values = np.asarray(jnp.clip(raw, 0.0, 1.0) if protocol.clamp else raw)
        return dict(zip(names, np.tile(values, (len(names) // rows, 1)), strict=True))

    for step in range(protocol.steps):
        params = {
            name: merge_leaf(pretrained(name), task_vectors(name), values)
            for name, values in coefficients().items()
        }
        entropies[step], gradient = entropies_and_gradient(params)
        del params
        slope = jnp.stack(
            [inner_products(gradient.pop(name), task_vectors(name)) for name in names]
        )
        _check_finite(experts, entropies[step], slope, step + 1, learning_rate)
        if granularity == "task":
            slope = slope.sum(axis=0, keepdims=True)
        if protocol.clamp:
            slope = jnp.where((raw >= 0) & (raw <= 1), slope, 0.0)
        updates, opt_state = optimizer.update(slope, opt_state)
        raw = jnp.asarray(optax.apply_updates(raw, updates))
        if progress:
            progress(step + 1, protocol.steps)
    return coefficients(), entropies


def _objective(
    experts: ExpertSet, calibration: Calibration, batches_per_step: int, mesh: Mesh | None
) -> Callable[[dict[str, jax.Array]], tuple[np.ndarray, dict[str, jax.Array]]]:
    """Makes the function from merged float leaves to entropies [T] and the gradient of their sum."""
    buffers = {
        name: experts.pretrained(name)
        for name, spec in experts.leaves.items()
        if not tree.is_float(spec.dtype)
    }
    streams = [
        _endless(name, batches)
        for name, batches in zip(experts.names, calibration.batches, strict=True)
    ]

    @partial(jax.jit, donate_argnames="total")
    def accumulate(
        params: dict[str, jax.Array],
        buffers: dict[str, Array],
        total: dict[str, jax.Array] | None,
        batch: Batch,
        head: Any,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        def mean_entropy(params: dict[str, jax.Array]) -> jax.Array:
            whole = tree.unflatten({**params, **buffers})
            return entropy(calibration.logits(whole, head, batch)).mean()

        value, gradient = jax.value_and_grad(mean_entropy)(params)
        gradient = sharding.constrain(gradient, mesh, sharding.MODEL_RULES)
        return value, gradient if total is None else jax.tree.map(jnp.add, total, gradient)

    def entropies_and_gradient(
        params: dict[str, jax.Array],
    ) -> tuple[np.ndarray, dict[str, jax.Array]]:
        total, entropies = None, []
        for head, stream in zip(calibration.heads, streams, strict=True):
            values = []
            for _ in range(batches_per_step):
                batch = sharding.place(next(stream), mesh, sharding.BATCH_RULES)
                value, total = accumulate(params, buffers, total, batch, head)
                values.append(value)
            entropies.append(jnp.stack(values).mean())
        assert total is not None  # an expert set has a task
        return np.asarray(jnp.stack(entropies)), total

    return entropies_and_gradient


def _check_finite(
    experts: ExpertSet,
    entropies: np.ndarray,
    slope: jax.Array,
    step: int,
    learning_rate: float,
) -> None:
    wrong = [
        name for name, value in zip(experts.names, entropies, strict=True) if not np.isfinite(value)
    ]
    if wrong or not bool(jnp.isfinite(slope).all()):
        what = f"the entropy of {wrong}" if wrong else "the gradient"
        raise FloatingPointError(
            f"AdaMerging: {what} is not finite at step {step}; learning_rate = {learning_rate}"
        )


def merge(
    experts: ExpertSet,
    coefficients: Mapping[str, np.ndarray],
    *,
    plus_plus: bool = False,
    density: float = 0.2,
) -> Params:
    """Merges with given coefficients.

    Args:
      experts: the experts.
      coefficients: from `fit_coefficients`: [T] by float leaf.
      plus_plus: as the coefficients were learned.
      density: as the coefficients were learned.

    Returns:
      The merged model.

    Raises:
      ValueError: if the coefficients are not T numbers for each float leaf.
    """
    wrong = sorted(
        name
        for name in {*coefficients, *experts.float_leaves}
        if name not in coefficients
        or name not in experts.float_leaves
        or np.shape(coefficients[name]) != (experts.num_tasks,)
    )
    if wrong:
        raise ValueError(f"coefficients: those of {wrong} are not {experts.num_tasks} a float leaf")
    pretrained, task_vectors = _readers(experts, plus_plus, density)

    def merge_one(name: str) -> jax.Array:
        values = jnp.asarray(coefficients[name], dtype=jnp.float32)
        return merge_leaf(pretrained(name), task_vectors(name), values)

    return merge_leaves(experts, merge_one)


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    plus_plus: bool = False,
    density: float = 0.2,
    **options: Any,
) -> Params:
    """Learns the coefficients, and merges with them.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      calibration: unlabelled inputs of each task; the published numbers take test inputs.
      plus_plus: AdaMerging++.
      density: of AdaMerging++.
      **options: keywords of `fit_coefficients`.

    Returns:
      The merged model.

    Raises:
      ValueError: as `fit_coefficients`.
      FloatingPointError: as `fit_coefficients`.
    """
    chosen = {"plus_plus": plus_plus, "density": density}
    coefficients, _ = fit_coefficients(
        experts, key=key, calibration=calibration, **chosen, **options
    )
    return merge(experts, coefficients, **chosen)
