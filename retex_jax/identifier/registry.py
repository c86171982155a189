"""All identifiers in one table, as `retex_jax.METHODS` has the methods: each is a pair of pure functions.

`fit(features_per_task, ...) -> state` takes T arrays [n_t, d] of calibration features, or [n_t, L, d] of L layers
(see `layers`); `scores(state, features) -> [B, T]` takes [B, d] or [B, L, d]. Where the experts are needed, task t's
features come from expert t: at inference [T, B, d] or [T, B, L, d].
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.identifier import (
    layers,
    mahalanobis,
    neighbors,
    router,
    shared_mahalanobis,
    subspace,
)
from retex_jax.identifier.layers import Joint, Layered
from retex_jax.typing import Array


@dataclass(frozen=True)
class IdentifierMethod:
    """An identifier and what it needs.

    Attributes:
      module: that has `fit`, `scores`, `take`, `option_problems`, `NEEDS`, and `add` where a task can be added
        without the others' features.
      needs_experts: whether an input has to run through all experts.
    """

    module: ModuleType
    needs_experts: bool = False

    @property
    def needs(self) -> str:
        """The data that `fit` takes, and what inference takes besides."""
        return self.module.NEEDS

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keywords of `fit`, but the key."""
        names = list(inspect.signature(self.module.fit).parameters)
        return (*(name for name in names[1:] if name != "key"), "joint")

    @property
    def random(self) -> bool:
        """Whether `fit` uses its key."""
        return "key" in inspect.signature(self.module.fit).parameters

    def problems(self, options: Mapping[str, Any]) -> list[str]:
        """What is wrong with options of `fit` whatever the features are; unknown ones are."""
        unknown = [
            f"{name}: unknown, expected some of {list(self.options)}"
            for name in options
            if name not in self.options
        ]
        known = {name: value for name, value in options.items() if name in self.options}
        joint = known.pop("joint", False)
        if not isinstance(joint, bool):
            unknown.append(f"joint: got {joint!r}, expected True or False")
        return unknown + self.module.option_problems(**known)

    def fit(
        self,
        features_per_task: Sequence[Array],
        *,
        key: jax.Array | None = None,
        joint: bool = False,
        **options: Any,
    ) -> Any:
        """Fits the identifier.

        Args:
          features_per_task: T arrays [n_t, d] or [n_t, L, d] of calibration features.
          key: typed PRNG key, of what is random; `jax.random.key(0)` when not given.
          joint: whether features of several layers are one vector instead of a state each.
          **options: of the module's `fit`.

        Returns:
          The module's state, a `Layered` of them, or a `Joint` of one.

        Raises:
          ValueError: as the module's `fit`, if the features are not of the same layers, or `joint` is given for
            features of one layer.
        """
        key = jax.random.key(0) if key is None else key

        def fit_one(features: Sequence[Array], layer: int) -> Any:
            keyed = {"key": jax.random.fold_in(key, layer)} if self.random else {}
            return self.module.fit(features, **keyed, **options)

        if not layers.has_layers(features_per_task):
            if joint:
                raise ValueError("joint: the features are of one layer, expected [n, L, d]")
            return fit_one(features_per_task, 0)
        if joint:
            size = np.shape(features_per_task[0])[1]
            flat = [layers.flattened(np.asarray(task), size) for task in features_per_task]
            return Joint(fit_one(flat, 0), size)
        return layers.fit(
            fit_one, self.module.scores, features_per_task, standardize=not self.needs_experts
        )

    def scores(self, state: Any, features: Array) -> jax.Array:
        """How likely each task is.

        Args:
          state: from `fit`.
          features: [B, d] or [B, L, d]; of `needs_experts` [T, B, d] or [T, B, L, d], float32.

        Returns:
          [B, T], float32; larger is likelier.
        """
        if isinstance(state, Layered):
            return layers.combine(self.module.scores, state, features)
        if isinstance(state, Joint):
            flat = layers.flattened(jnp.asarray(features), state.num_layers)
            return self.module.scores(state.state, flat)
        return self.module.scores(state, jnp.asarray(features))

    def bytes(self, state: Any) -> int:
        """Bytes of all arrays of a state, for all tasks."""
        return tree.param_bytes(state)

    def take(self, state: Any, tasks: Sequence[int]) -> Any:
        """The state of some tasks only, in this order."""
        return _map_layers(self.module.take, state, tasks)

    def add(self, state: Any, features: Array) -> Any:
        """Adds a task without the others' features.

        Args:
          state: from `fit`.
          features: of the new task, [n, d] or [n, L, d].

        Returns:
          The state of T + 1 tasks; what it holds of the first T is as it was, and so are spreads.

        Raises:
          ValueError: if this identifier has to be fitted anew, or as the module's `add`.
        """
        module_add = getattr(self.module, "add", None)
        if module_add is None:
            raise ValueError(
                f"identifier: {self.module.__name__.rpartition('.')[2]!r} takes a new task only by a fit "
                "to the features of all tasks"
            )
        if isinstance(state, Joint):
            flat = layers.flattened(features, state.num_layers)
            return replace(state, state=module_add(state.state, flat))
        if not isinstance(state, Layered):
            return module_add(state, features)
        if features.ndim != 3 or features.shape[1] != len(state.states):
            raise ValueError(
                f"features: got shape {features.shape}, expected [n, {len(state.states)}, d]"
            )
        each = (module_add(one, features[:, layer]) for layer, one in enumerate(state.states))
        return replace(state, states=tuple(each))


def _map_layers(function: Callable[..., Any], state: Any, *args: Any) -> Any:
    if isinstance(state, Joint):
        return replace(state, state=function(state.state, *args))
    if not isinstance(state, Layered):
        return function(state, *args)
    return replace(state, states=tuple(function(one, *args) for one in state.states))


IDENTIFIERS: dict[str, IdentifierMethod] = {
    "subspace": IdentifierMethod(subspace),
    "router": IdentifierMethod(router),
    "shared_mahalanobis": IdentifierMethod(shared_mahalanobis),
    "mahalanobis": IdentifierMethod(mahalanobis, needs_experts=True),
    "neighbors": IdentifierMethod(neighbors),
}
