"""All methods in one table: each is a pair of pure functions, as an optax transformation is.

`fit(experts, *, key, ...) -> state` gives a pytree that can be checkpointed, sized and released;
`recover(state, task) -> params` gives the model that serves a task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retex_jax import offsets
from retex_jax.mergers import MERGERS
from retex_jax.typing import Params


@dataclass(frozen=True)
class Method:
    """A method and what it needs.

    Attributes:
      fit: (experts, *, key=None, ...) -> state.
      recover: (state, task) -> params, a nested dict like the pretrained model. A static merger
        ignores the task.
      needs: the data that `fit` takes: "none", or a description.
      extra_bytes: state -> bytes stored beside one merged model, for all tasks.
      mix: (state, weights [T]) -> params, for methods that can mix experts; else None.
    """

    fit: Callable[..., Any]
    recover: Callable[..., Params]
    needs: str
    extra_bytes: Callable[[Any], int]
    mix: Callable[..., Params] | None = None


def _static(fit: Callable[..., Params]) -> Method:
    return Method(fit, lambda state, task: state, needs="none", extra_bytes=lambda state: 0)


METHODS: dict[str, Method] = {
    **{name: _static(fit) for name, fit in MERGERS.items()},
    "retex": Method(
        offsets.fit,
        offsets.recover,
        needs="none",
        extra_bytes=offsets.offset_bytes,
        mix=offsets.mix,
    ),
}
