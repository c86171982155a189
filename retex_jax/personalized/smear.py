"""SMEAR over frozen experts ("smear_frozen"), after arXiv:2306.03745.

SMEAR merges the parameters of experts by a router's probabilities, an example at a time, and runs the one merged
expert (section 3): p = softmax(router(v)), W = sum_t p_t W_t, all experts at once, no top-k. Upstream the experts are
adapters, one set and one router in every block, trained *together with* the routers by the task's loss from the
same start. Here experts are given and stay as they are, and there is one router for the whole model, trained
to tell the tasks: another method with SMEAR's forward pass, so it has a name of its own.

The router is upstream's: a layer norm, one linear layer and a softmax (see `router`); its input is there the mean over
tokens of what enters the block, here the pretrained model's features (`Calibration.features`), so that an input costs
one pass through that model and one through its merged expert. Upstream's expert dropout, and the router weights
scaled to a norm, are for joint training and are left out. Needs training inputs by task; the experts are stored
whole, T models beside the pretrained one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from retex_jax import tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.personalized import bank, changes, router, routing
from retex_jax.typing import Array, Batch, FlatParams, Params

NEEDS = "training inputs, by task"

_ROUTER = {"kind": "linear", "learning_rate": 3e-2, "epochs": 200}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmearState:
    """The pretrained model, T whole experts and the router.

    Attributes:
      pretrained: nested dict, theta_0.
      experts: by float leaf, [T, *shape], the leaf's dtype.
      router: from features of the pretrained model to tasks.
    """

    pretrained: Params
    experts: FlatParams
    router: router.Router

    @property
    def num_tasks(self) -> int:
        """T."""
        return bank.num_tasks(self.experts)


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    router_options: Mapping[str, Any] | None = None,
) -> SmearState:
    """Stacks the experts and trains the router.

    Args:
      experts: the experts.
      key: typed PRNG key of the router; `jax.random.key(0)` when not given.
      calibration: training inputs by task; `features` and `batches` are read.
      router_options: keywords of `router.fit`; a linear router, learning rate 0.03 and 200 epochs when not
        given, which are not upstream's.

    Returns:
      The state.

    Raises:
      ValueError: if the calibration is missing or does not fit, or an option is out of range.
    """
    calibration = require(calibration, "SMEAR over frozen experts", experts.num_tasks)
    pretrained = changes.stored_pretrained(experts)
    features = routing.calibration_features(calibration, pretrained)
    key = jax.random.key(0) if key is None else key
    options: dict[str, Any] = {**_ROUTER, **(router_options or {})}
    trained = router.fit(features, experts.names, key, **options)
    return SmearState(pretrained, bank.stack(experts, experts.float_leaves), trained)


def mix(state: SmearState, weights: Array) -> Params:
    """theta_0 + sum_t w_t tau_t, which is sum_t w_t theta_t for weights of sum 1.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like the pretrained model; sums are float32, then cast to each leaf's dtype.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    return bank.mix(state.pretrained, state.experts, weights)


def recover(state: SmearState, task: int | jax.Array) -> Params:
    """The expert of a known task.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `task` is out of range.
    """
    return mix(state, routing.one_hot(task, state.num_tasks))


def extra_bytes(state: SmearState) -> int:
    """Bytes beside the pretrained model, for all tasks: T whole experts and the router."""
    return tree.param_bytes((state.experts, state.router))


def weights(state: SmearState, features: Array) -> jax.Array:
    """What decides: softmax(router(features)).

    Args:
      state: from `fit`.
      features: of the pretrained model, [B, d], float32.

    Returns:
      [B, T], float32, rows of sum 1.
    """
    return router.weights(state.router, features)


def predict(
    state: SmearState, model: routing.ModelFunctions, batch: Batch, *, chunk: int = 8
) -> jax.Array:
    """Features of every input through its own merged expert.

    Args:
      state: from `fit`.
      model: `features` is read.
      batch: arrays [B, ...]; neither tasks nor labels.
      chunk: mixed models in memory at a time.

    Returns:
      [B, d], float32.

    Raises:
      ValueError: if `chunk` is not a positive integer.
    """
    routing.check_chunk(chunk)
    start = routing.features(model.features, state.pretrained, batch)
    return routing.predict(model.features, mix, state, weights(state, start), batch, chunk=chunk)
