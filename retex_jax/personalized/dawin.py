"""DaWin (arXiv:2410.03782): experts weighed by their entropy on each input, without training.

Multi-task form: w = softmax_t(-H_t(x)), H_t the entropy of expert t on x, and
theta(x) = theta_0 + scaling * T * sum_t w_t tau_t with scaling 0.3, so that equal weights give Task Arithmetic.
Robust form, of two models: theta(x) = (1 - l) theta_1 + l theta_2, l = e^-H_2 / (e^-H_1 + e^-H_2), each model's
logits divided by a temperature (0.9576 and 0.9733 for ViT-B/32 in the authors' code, tuned on validation data of
ImageNet). Upstream the two are the zero-shot and the fine-tuned model: give an `ExpertSet` whose first
expert is the pretrained model.

`variant`:

- "per_sample": the definition, one merge an input.
- "mixture": what the authors' multi-task code does in effect: one merge for each data set, with one
  set of weights for it. The code fits a Dirichlet mixture to the weights of the whole test set and takes its first
  component, of which there is to be one; in a toy run that was the mean of the weights, which is what is used here.
  `fit` needs each task's inputs for that, and `recover(state, task)` is the merge of the task's data set. In `predict`,
  which knows no tasks, the batch as it is takes the data set's place: batches of one task each would tell it.
- "robust": the robust form, for T = 2. The code's offset adjustment (a bias from the entropies' spread over the
  test set) and its mixture of three Beta distributions are not done.

Whose head: the code measures every expert's entropy with the head of the *true* data set, at test time. `weights` and
`predict` know no data set and take each expert's own head. Entropies of heads with different numbers of classes are
compared as they are: a head of fewer classes has an advantage. For "mixture", `heads="data_set"` gives the code's
weights of a known data set.

Needs unlabelled test inputs and all experts, which are stored whole: T models beside the pretrained one. An
input costs T + 1 passes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.mergers.adamerging import entropy
from retex_jax.mergers.leafwise import check_finite_number
from retex_jax.personalized import bank, changes, routing
from retex_jax.typing import Array, Batch, FlatParams, Params

NEEDS = "unlabelled test inputs, all experts"

Variant = Literal["per_sample", "mixture", "robust"]
Heads = Literal["own", "data_set"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DawinState:
    """The pretrained model and T whole experts.

    Attributes:
      pretrained: nested dict, theta_0.
      experts: by float leaf, [T, *shape], the leaf's dtype.
      coefficient: what the weighted task vectors are multiplied by: scaling * T, or 1; [], float32.
      temperatures: that each expert's logits are divided by, [T], float32.
      set_weights: of "mixture": mean weights of each task's inputs, [T (data set), T], float32.
      variant: see the module's docstring.
    """

    pretrained: Params
    experts: FlatParams
    coefficient: jax.Array
    temperatures: jax.Array
    set_weights: jax.Array | None
    variant: Variant = field(metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return bank.num_tasks(self.experts)


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    variant: Variant = "per_sample",
    scaling: float = 0.3,
    temperatures: Sequence[float] | None = None,
    heads: Heads = "own",
) -> DawinState:
    """Stacks the experts; "mixture" measures each data set's weights as well.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      calibration: unlabelled test inputs by data set; of "mixture" only, the others take their inputs in
        `predict`. `logits`, `heads` and `batches` are read.
      variant: see the module's docstring.
      scaling: of Task Arithmetic; "robust" has none.
      temperatures: T numbers above 0; 1 when not given.
      heads: of "mixture": whose head measures an expert's entropy in `set_weights`, the expert's own or
        that of the data set.

    Returns:
      The state.

    Raises:
      ValueError: if an option is unknown or out of range, or "mixture" has no calibration that fits.
    """
    del key
    count = experts.num_tasks
    scales = [1.0] * count if temperatures is None else list(temperatures)
    problems = []
    if variant not in ("per_sample", "mixture", "robust"):
        problems.append(f"variant: got {variant!r}, expected 'per_sample', 'mixture' or 'robust'")
    if variant == "robust" and count != 2:
        problems.append(f"experts: got T = {count}, expected 2 for variant 'robust'")
    if heads not in ("own", "data_set"):
        problems.append(f"heads: got {heads!r}, expected 'own' or 'data_set'")
    if len(scales) != count or not all(0 < scale < math.inf for scale in scales):
        problems.append(f"temperatures: got {temperatures!r}, expected {count} numbers above 0")
    if problems:
        raise ValueError("\n".join(problems))
    check_finite_number("scaling", scaling)
    if variant == "mixture":
        calibration = require(calibration, "the mixture of DaWin", count)
    state = DawinState(
        changes.stored_pretrained(experts),
        bank.stack(experts, experts.float_leaves),
        jnp.float32(1.0 if variant == "robust" else scaling * count),
        jnp.asarray(scales, jnp.float32),
        None,
        variant,
    )
    if variant != "mixture" or calibration is None:
        return state
    set_weights = _set_weights(state, calibration, heads)
    return DawinState(
        state.pretrained,
        state.experts,
        state.coefficient,
        state.temperatures,
        jnp.asarray(set_weights, jnp.float32),
        variant,
    )


def _set_weights(state: DawinState, calibration: Calibration, heads: Heads) -> np.ndarray:
    """Mean weights of each task's inputs: [T, T], float64; one expert in memory at a time."""
    count = state.num_tasks
    entropies: list[list[np.ndarray]] = []
    for expert in range(count):
        params = expert_params(state, expert)
        entropies.append([])
        for task, batches in enumerate(calibration.batches):
            head = calibration.heads[expert if heads == "own" else task]
            parts = [
                np.asarray(
                    _entropy(
                        routing.logits(calibration.logits, params, head, batch),
                        state.temperatures[expert],
                    )
                )
                for batch in batches
            ]
            entropies[-1].append(np.concatenate(parts))
    means = []
    for task in range(count):
        negative = -np.stack([entropies[expert][task] for expert in range(count)], axis=1)
        powers = np.exp(negative.astype(np.float64) - negative.max(axis=1, keepdims=True))
        means.append((powers / powers.sum(axis=1, keepdims=True)).mean(axis=0))
    return np.stack(means)


@jax.jit
def _entropy(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Of softmax(logits / temperature): [B, C] to [B], float32."""
    return entropy(logits.astype(jnp.float32) / temperature)


def entropy_weights(logits: Sequence[Array], temperatures: Array) -> jax.Array:
    """softmax_t(-H_t).

    Args:
      logits: T arrays [B, C_t], each expert's.
      temperatures: [T].

    Returns:
      [B, T], float32, rows of sum 1.
    """
    entropies = [
        _entropy(jnp.asarray(expert), jnp.asarray(temperature))
        for expert, temperature in zip(logits, temperatures, strict=True)
    ]
    return jax.nn.softmax(-jnp.stack(entropies, axis=1), axis=1)


@jax.jit
def expert_params(state: DawinState, task: int | jax.Array) -> Params:
    """One whole expert, as a nested dict."""
    flat = tree.flatten(state.pretrained)
    return tree.unflatten(flat | {name: leaf[task] for name, leaf in state.experts.items()})


def weights(state: DawinState, model: routing.ModelFunctions, batch: Batch) -> jax.Array:
    """What decides: softmax_t(-H_t(x)), each expert with its own head; one expert in memory at a time.

    Args:
      state: from `fit`.
      model: `logits` and `heads` are read.
      batch: arrays [B, ...].

    Returns:
      [B, T], float32; of "mixture", every row is the batch's mean.
    """
    logits = [
        routing.logits(model.logits, expert_params(state, task), head, batch)
        for task, head in enumerate(model.heads)
    ]
    each = entropy_weights(logits, state.temperatures)
    if state.variant == "mixture":
        return jnp.broadcast_to(each.mean(axis=0), each.shape)
    return each


def mix(state: DawinState, weights: Array) -> Params:
    """theta_0 + scaling * T * sum_t w_t tau_t; "robust": sum_t w_t theta_t, for weights of sum 1.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like the pretrained model; sums are float32, then cast to each leaf's dtype.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    return bank.mix(state.pretrained, state.experts, state.coefficient * jnp.asarray(weights))


def recover(state: DawinState, task: int | jax.Array) -> Params:
    """The model of a known task.

    "mixture": the one merge of the task's data set. The others: one-hot weights, theta_0 + scaling * T * tau_t,
    which is the expert only where scaling * T is 1 and in "robust"; the expert itself is `expert_params`.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `task` is out of range.
    """
    own = routing.one_hot(task, state.num_tasks)
    return mix(state, own if state.set_weights is None else state.set_weights[task])


def extra_bytes(state: DawinState) -> int:
    """Bytes beside the pretrained model, for all tasks: T whole experts, and a few numbers."""
    return tree.param_bytes(
        (state.experts, state.coefficient, state.temperatures, state.set_weights)
    )


def predict(
    state: DawinState, model: routing.ModelFunctions, batch: Batch, *, chunk: int = 8
) -> jax.Array:
    """Features of every input through its own mixture; of "mixture", through the one of the batch.

    Args:
      state: from `fit`.
      model: `features` and `logits` are read.
      batch: arrays [B, ...]; neither tasks nor labels.
      chunk: mixed models in memory at a time.

    Returns:
      [B, d], float32.

    Raises:
      ValueError: if `chunk` is not a positive integer.
    """
    routing.check_chunk(chunk)
    deciding = weights(state, model, batch)
    if state.variant == "mixture":
        return jnp.asarray(routing.features(model.features, mix(state, deciding[0]), batch))
    return routing.predict(model.features, mix, state, deciding, batch, chunk=chunk)
