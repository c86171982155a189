"""All methods in one table: each is a pair of pure functions, as an optax transformation is.

`fit(experts, *, key, ...) -> state` gives a pytree that can be checkpointed, sized and released;
`recover(state, task) -> params` gives the model that serves a task. A method that needs data says which,
and its `fit` takes a `calibration` of such inputs; none takes a label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from retex_jax import offsets
from retex_jax.mergers import MERGERS, adamerging, fisher, regmean
from retex_jax.personalized import (
    dawin,
    dts,
    emr,
    smear,
    svd,
    t_switch,
    tall_mask,
    twin,
    wemoe,
)
from retex_jax.typing import Params

NEEDS = {
    "none": None,
    "calibration inputs": "train",
    "training inputs, by task": "train",
    "unlabelled test inputs": "test",
    "unlabelled test inputs, by task": "test",
    "unlabelled test inputs, all experts": "test",
}
"""What a method may need, and the split that those inputs are of."""


@dataclass(frozen=True)
class Method:
    """A method and what it needs.

    Attributes:
      fit: (experts, *, key=None, ...) -> state.
      recover: (state, task) -> params, a nested dict like the pretrained model. A static merger
        ignores the task.
      needs: the data that `fit` takes: one of `NEEDS`.
      extra_bytes: state -> bytes stored beside one merged model, for all tasks.
      mix: (state, weights [T]) -> params, for methods that can mix experts; else None.
      paper_amr: state -> additional memory rate a task by the paper's own accounting; None where the
        paper has none.
      predict: (state, model, batch) -> features [B, d], float32, for methods that mix by input; `model` has
        the functions of a `Calibration`. None for others.
    """

    fit: Callable[..., Any]
    recover: Callable[..., Params]
    needs: str
    extra_bytes: Callable[[Any], int]
    mix: Callable[..., Params] | None = None
    paper_amr: Callable[[Any], float] | None = None
    predict: Callable[..., Any] | None = None


def _static(fit: Callable[..., Params], needs: str = "none") -> Method:
    return Method(fit, lambda state, task: state, needs, extra_bytes=lambda state: 0)


def _personalized(module: Any, fit: Callable[..., Any] | None = None) -> Method:
    return Method(
        fit or module.fit,
        module.recover,
        needs=getattr(module, "NEEDS", "none"),
        extra_bytes=module.extra_bytes,
        mix=getattr(module, "mix", None),
        paper_amr=getattr(module, "paper_amr", None),
        predict=getattr(module, "predict", None),
    )


METHODS: dict[str, Method] = {
    **{name: _static(fit) for name, fit in MERGERS.items()},
    "fisher": _static(fisher.fit, "calibration inputs"),
    "regmean": _static(regmean.fit, "calibration inputs"),
    "adamerging": _static(adamerging.fit, adamerging.NEEDS),
    "svd": _personalized(svd),
    "dts_t": _personalized(dts, partial(dts.fit, variant="task")),
    "dts_d": _personalized(dts, partial(dts.fit, variant="difference")),
    "emr": _personalized(emr),
    "t_switch": _personalized(t_switch),
    "tall_mask": _personalized(tall_mask),
    "twin": _personalized(twin),
    "dawin": _personalized(dawin),
    "smear_frozen": _personalized(smear),
    "wemoe": _personalized(wemoe),
    "retex": Method(
        offsets.fit,
        offsets.recover,
        needs="none",
        extra_bytes=offsets.offset_bytes,
        mix=offsets.mix,
    ),
}
