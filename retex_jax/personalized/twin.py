"""Twin-Merging (arXiv:2406.15479): a shared expert, compressed exclusive knowledge, and a router.

theta* is Task Arithmetic; v_t = trim(theta_t - theta*) (section 3.3, Eq. 3); theta(x) = theta* + sum_t w_t v_t
with w = softmax(router(features of theta* of x)) for every input (section 3.4, Eqs. 4 and 5). Needs the training
inputs by task, without labels.

What the authors' code does, and what is done here:

- Trim: by SVD, which keeps floor(0.1 * rank) singular values of every matrix at a mask rate of 0.9, or by
  magnitude (see `magnitude`); leaves of one axis are kept whole. The code keeps *none* of fewer than ten values, here
  one is kept; leaves of three or four axes are seen as matrices. Nothing is rescaled.
- The scaling of Task Arithmetic is 0.29 for RoBERTa in the code; 0.3 here.
- The code leaves biases out of the merge and so takes them from the expert of the *true* data set at inference, which
  tells the model the task. Here all leaves that are not excluded from the `ExpertSet` take part.
- Router: see `router`. It reads the mean of the last hidden state in the code; here what heads read
  (`Calibration.features`), which is up to the caller. The code trains on up to 5500 inputs a task, and chooses the
  epoch on the test inputs that it then evaluates, up to 1000 a task: a leak. Here held-out calibration inputs choose.

With a known task `recover` gives theta* + v_t, which is the expert at a mask rate of 0. DTS counts the method's
additional memory as 100% a task; `extra_bytes` counts what is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from retex_jax import tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.personalized import magnitude, router, routing, svd
from retex_jax.typing import Array, Batch, Params, ProgressFn

NEEDS = "training inputs, by task"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwinState:
    """The shared expert, the exclusive knowledge of T experts, and the router.

    Attributes:
      vectors: theta* (`base`) and v_t.
      router: from features of theta* to tasks.
    """

    vectors: svd.SvdState | magnitude.MagnitudeState
    router: router.Router

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.vectors.num_tasks


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    scaling: float = 0.3,
    mask_rate: float = 0.9,
    mask_strategy: Literal["svd", "magnitude"] = "svd",
    router_options: Mapping[str, Any] | None = None,
    group_bytes: int = 1 << 26,
    progress: ProgressFn | None = None,
) -> TwinState:
    """Merges, trims what is left of each expert, and trains the router.

    Args:
      experts: the experts.
      key: typed PRNG key of the router; `jax.random.key(0)` when not given.
      calibration: training inputs by task; `features` and `batches` are read.
      scaling: lambda of Task Arithmetic.
      mask_rate: fraction trimmed away, in [0, 1).
      mask_strategy: "svd" or "magnitude".
      router_options: keywords of `router.fit`.
      group_bytes: see `low_rank.decompose`.
      progress: see `low_rank.decompose`; with "svd" only.

    Returns:
      The state.

    Raises:
      ValueError: if the calibration is missing or does not fit, or an option is out of range.
    """
    calibration = require(calibration, "Twin-Merging", experts.num_tasks)
    problems = []
    if not 0 <= mask_rate < 1:
        problems.append(f"mask_rate: got {mask_rate!r}, expected a fraction in [0, 1)")
    if mask_strategy not in ("svd", "magnitude"):
        problems.append(f"mask_strategy: got {mask_strategy!r}, expected 'svd' or 'magnitude'")
    if problems:
        raise ValueError("\n".join(problems))
    base: dict[str, Any] = {"base": "task_arithmetic", "base_options": {"scaling": scaling}}
    if mask_strategy == "svd":
        vectors: Any = svd.fit(
            experts, rank_ratio=1 - mask_rate, group_bytes=group_bytes, progress=progress, **base
        )
    else:
        vectors = magnitude.fit(experts, density=1 - mask_rate, **base)
    features = routing.calibration_features(calibration, vectors.base)
    key = jax.random.key(0) if key is None else key
    trained = router.fit(features, experts.names, key, **router_options or {})
    return TwinState(vectors, trained)


def mix(state: TwinState, weights: Array) -> Params:
    """theta* + sum_t w_t v_t.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like the pretrained model; sums are float32, then cast to each leaf's dtype.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    if isinstance(state.vectors, svd.SvdState):
        return svd.mix(state.vectors, weights)
    return magnitude.mix(state.vectors, weights)


def recover(state: TwinState, task: int | jax.Array) -> Params:
    """theta* + v_t: the model of a known task, without the router.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `task` is out of range.
    """
    if isinstance(state.vectors, svd.SvdState):
        return svd.recover(state.vectors, task)
    return magnitude.recover(state.vectors, task)


def extra_bytes(state: TwinState) -> int:
    """Bytes beside theta*, for all tasks: the trimmed vectors and the router."""
    vectors = state.vectors
    stored = (
        svd.extra_bytes(vectors)
        if isinstance(vectors, svd.SvdState)
        else magnitude.extra_bytes(vectors)
    )
    return stored + tree.param_bytes(state.router)


def weights(state: TwinState, features: Array) -> jax.Array:
    """What decides: softmax(router(features)).

    Args:
      state: from `fit`.
      features: of theta*, [B, d], float32.

    Returns:
      [B, T], float32, rows of sum 1.
    """
    return router.weights(state.router, features)


def predict(
    state: TwinState, model: routing.ModelFunctions, batch: Batch, *, chunk: int = 8
) -> jax.Array:
    """Features of every input through its own mixture; two passes, the first through theta*.

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
    shared = routing.features(model.features, state.vectors.base, batch)
    return routing.predict(model.features, mix, state, weights(state, shared), batch, chunk=chunk)
