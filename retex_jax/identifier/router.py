"""The learned router of ReTeX (arXiv:2606.26902, section 4.2 and Eq. 16): cross-entropy of task ids.

It reads standardised features of the merged model, and is trained on as many inputs of each task (the paper: 32
to 1024 a task). The paper leaves its form open: "linear" or "mlp", trained by `personalized.router`, whose
defaults for "mlp" are Twin-Merging's. Tasks are put in an order by their means, so that their own order does
not matter. Needs unlabelled calibration inputs whose task is known, of which a tenth chooses the epoch.
Means and deviations in float64; training and scores in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retex_jax.identifier import features as common
from retex_jax.personalized import router as routers
from retex_jax.typing import Array

NEEDS = "unlabelled calibration inputs of each task"

# Up to this fraction of the largest value a deviation is rounding of float32 features.
_ROUNDING = 1e-6

_RATES = {"linear": (3e-2, 200), "mlp": (5e-4, 50)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterState:
    """A router and the standardisation of what it reads.

    Attributes:
      center: [d], float32.
      scale: one over the standard deviations, 0 where a feature is constant, [d], float32.
      router: from standardised features to tasks.
      normalize: whether features are scaled to unit length first.
    """

    center: jax.Array
    scale: jax.Array
    router: routers.Router
    normalize: bool = field(default=False, metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.router.variables["params"]["out"]["bias"].shape[0]


def fit(
    features_per_task: Sequence[Array],
    *,
    key: jax.Array | None = None,
    kind: routers.Kind = "linear",
    num_inputs: int | None = None,
    normalize: bool = False,
    learning_rate: float | None = None,
    epochs: int | None = None,
    batch_size: int = 1024,
    batch_norm: bool = True,
    dropout: float = 0.5,
    held_out: float = 0.1,
    mesh: Mesh | None = None,
) -> RouterState:
    """Trains a router.

    Args:
      features_per_task: T arrays [n_t, d] of calibration features.
      key: typed PRNG key; `jax.random.key(0)` when not given.
      kind: "linear" or "mlp".
      num_inputs: of each task, drawn; when not given, as many as the task with the fewest has.
      normalize: whether to scale every feature to unit length before it is standardised.
      learning_rate: at the start; 0.03 ("linear") or 5e-4 ("mlp") when not given.
      epochs: passes over the inputs; 200 or 50 when not given.
      batch_size: inputs a step.
      batch_norm: of "mlp".
      dropout: of "mlp", in [0, 1).
      held_out: fraction of each task's inputs that chooses the epoch.
      mesh: as `personalized.router.fit` takes it.

    Returns:
      The router.

    Raises:
      ValueError: if there is no task, the arrays are not [n_t, d] with one d, a value is NaN or Inf, an option
        is out of range, or a task has fewer than 2 inputs or than `num_inputs`; all problems are listed.
    """
    options: dict[str, Any] = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "dropout": dropout,
        "held_out": held_out,
    }
    features, problems = common.to_host(features_per_task)
    problems += option_problems(kind=kind, num_inputs=num_inputs, **options)
    least = max(2, num_inputs or 2)
    problems += [
        f"features_per_task[{task}]: got {len(array)} inputs, expected {least} or more"
        for task, array in enumerate(features)
        if array.ndim == 2 and len(array) < least
    ]
    if problems:
        raise ValueError("\n".join(problems))
    count = num_inputs or min(len(task) for task in features)
    arrays = [(common.unit(task) if normalize else task).astype(np.float32) for task in features]
    order = sorted(range(len(arrays)), key=lambda task: arrays[task].mean(axis=0).tolist())
    names = [f"{order.index(task):09d}" for task in range(len(arrays))]
    draw_key, train_key = jax.random.split(jax.random.key(0) if key is None else key)
    for place, task in enumerate(order):
        drawn = jax.random.permutation(jax.random.fold_in(draw_key, place), len(arrays[task]))
        arrays[task] = arrays[task][np.asarray(drawn[:count])]
    center, scale = _standardization(np.concatenate([arrays[task] for task in order]))
    standardized = [(array - center) * scale for array in arrays]
    trained = routers.fit(
        standardized,
        names,
        train_key,
        kind=kind,
        batch_norm=batch_norm,
        layer_norm=False,
        mesh=mesh,
        **{**options, **_rates(kind, learning_rate, epochs)},
    )
    return RouterState(jnp.asarray(center), jnp.asarray(scale), trained, normalize)


def option_problems(
    *,
    kind: routers.Kind = "linear",
    num_inputs: int | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    batch_size: int = 1024,
    dropout: float = 0.5,
    held_out: float = 0.1,
    **_: object,
) -> list[str]:
    """What is wrong with options of `fit` whatever the features are."""
    problems = routers.option_problems(
        kind=kind,
        dropout=dropout,
        batch_size=batch_size,
        held_out=held_out,
        **_rates(kind, learning_rate, epochs),
    )
    is_integer = isinstance(num_inputs, int | np.integer) and not isinstance(num_inputs, bool)
    if num_inputs is not None and (not is_integer or num_inputs < 2):
        problems.append(f"num_inputs: got {num_inputs!r}, expected None or 2 or more")
    return problems


def _rates(kind: str, learning_rate: float | None, epochs: int | None) -> dict[str, Any]:
    rate, passes = _RATES.get(kind, _RATES["linear"])
    return {
        "learning_rate": rate if learning_rate is None else learning_rate,
        "epochs": passes if epochs is None else epochs,
    }


def _standardization(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and one over the standard deviation of each column of [n, d], float32."""
    features = features.astype(np.float64)
    deviations = features.std(axis=0)
    varies = deviations > _ROUNDING * np.abs(features).max()
    scale = np.where(varies, 1 / np.where(varies, deviations, 1), 0)
    return features.mean(axis=0).astype(np.float32), scale.astype(np.float32)


@jax.jit
def scores(state: RouterState, features: jax.Array) -> jax.Array:
    """Logits over tasks.

    Args:
      state: from `fit`.
      features: [B, d], float32.

    Returns:
      [B, T], float32; larger is likelier.
    """
    features = common.on_device(features, state.normalize)
    with jax.default_matmul_precision("highest"):
        return routers.logits(state.router, (features - state.center) * state.scale)


def take(state: RouterState, tasks: Sequence[int]) -> RouterState:
    """The outputs of some tasks only, in this order."""
    variables = routers.reordered(state.router.variables, np.asarray(tasks))
    return replace(state, router=replace(state.router, variables=variables))
