"""All methods in one table: each is a pair of pure functions, as an optax transformation is.

`fit(experts, *, key, ...) -> state` gives a pytree that can be checkpointed, sized and released;
`recover(state, task) -> params` gives the model that serves a task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from retex_jax import offsets
from retex_jax.mergers import MERGERS
from retex_jax.personalized import dts, emr, svd, t_switch, tall_mask
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
      paper_amr: state -> additional memory rate a task by the paper's own accounting; None where the
        paper has none.
    """

    fit: Callable[..., Any]
    recover: Callable[..., Params]
    needs: str
    extra_bytes: Callable[[Any], int]
    mix: Callable[..., Params] | None = None
    paper_amr: Callable[[Any], float] | None = None


def _static(fit: Callable[..., Params]) -> Method:
    return Method(fit, lambda state, task: state, needs="none", extra_bytes=lambda state: 0)


def _personalized(module: Any, fit: Callable[..., Any] | None = None) -> Method:
    return Method(
        fit or module.fit,
        module.recover,
        needs="none",
        extra_bytes=module.extra_bytes,
        mix=getattr(module, "mix", None),
        paper_amr=getattr(module, "paper_amr", None),
    )


METHODS: dict[str, Method] = {
    **{name: _static(fit) for name, fit in MERGERS.items()},
    "svd": _personalized(svd),
    "dts_t": _personalized(dts, partial(dts.fit, variant="task")),
    "dts_d": _personalized(dts, partial(dts.fit, variant="difference")),
    "emr": _personalized(emr),
    "t_switch": _personalized(t_switch),
    "tall_mask": _personalized(tall_mask),
    "retex": Method(
        offsets.fit,
        offsets.recover,
        needs="none",
        extra_bytes=offsets.offset_bytes,
        mix=offsets.mix,
    ),
}
