"""All methods in one table: each is a pair of pure functions, as an optax transformation is.

`fit(experts, *, key, ...) -> state` gives a pytree that can be checkpointed, sized and released;
`recover(state, task) -> params` gives the model that serves a task. A method that needs data says which,
and its `fit` takes a `calibration` of such inputs; none takes a label.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from retex_jax import offsets
from retex_jax.mergers import MERGERS, adamerging, fisher, regmean
from retex_jax.offsets.options import needing_data
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
"""What the fit of a method may need, and the split that those inputs are of."""

SEARCH_NEEDS = "labelled validation inputs"
"""What the choice of a method's options by `retex_jax.search` needs, beside what its fit needs."""

Random = Callable[[Mapping[str, Any]], bool]

Needs = Callable[[Mapping[str, Any]], str]


def _never(options: Mapping[str, Any]) -> bool:
    return False


def _always(options: Mapping[str, Any]) -> bool:
    return True


def _by_base(options: Mapping[str, Any]) -> bool:
    """Of methods that take differences from the model of a merger: DARE is the random one."""
    return options.get("base") == "dare"


def _offset_needs(options: Mapping[str, Any]) -> str:
    defaults = {"task_weights": "equal", "leaf_weights": "equal", "shrinkage": 1}
    given = {name: options.get(name, default) for name, default in defaults.items()}
    return "calibration inputs" if needing_data(**given) else "none"


@dataclass(frozen=True)
class Method:
    """A method and what it needs.

    Attributes:
      fit: (experts, *, key=None, ...) -> state.
      recover: (state, task) -> params, a nested dict like the pretrained model. A static merger
        ignores the task.
      needs: the data that `fit` takes: one of `NEEDS`; by default, where options decide.
      extra_bytes: state -> bytes stored beside one merged model, for all tasks.
      mix: (state, weights [T]) -> params, for methods that can mix experts; else None.
      paper_amr: state -> additional memory rate a task by the paper's own accounting; None where the
        paper has none.
      predict: (state, model, batch) -> features [B, d], float32, for methods that mix by input; `model` has
        the functions of a `Calibration`. None for others.
      leaves: state -> ranks and residuals by kind of leaf and layer, for pictures; None where there are none.
      random: options -> whether `fit` uses its key with them, so that another key gives another state.
      option_needs: options -> the data that `fit` takes with them; None where it is `needs` with any.
    """

    fit: Callable[..., Any]
    recover: Callable[..., Params]
    needs: str
    extra_bytes: Callable[[Any], int]
    mix: Callable[..., Params] | None = None
    paper_amr: Callable[[Any], float] | None = None
    predict: Callable[..., Any] | None = None
    leaves: Callable[[Any], Any] | None = None
    random: Random = _never
    option_needs: Needs | None = None

    def needs_with(self, options: Mapping[str, Any]) -> str:
        """The data that `fit` takes with these options: one of `NEEDS`."""
        return self.needs if self.option_needs is None else self.option_needs(options)


def _static(fit: Callable[..., Params], needs: str = "none", random: Random = _never) -> Method:
    return Method(fit, lambda state, task: state, needs, extra_bytes=lambda state: 0, random=random)


def _personalized(
    module: Any, fit: Callable[..., Any] | None = None, random: Random = _never
) -> Method:
    return Method(
        fit or module.fit,
        module.recover,
        needs=getattr(module, "NEEDS", "none"),
        extra_bytes=module.extra_bytes,
        mix=getattr(module, "mix", None),
        paper_amr=getattr(module, "paper_amr", None),
        predict=getattr(module, "predict", None),
        random=random,
    )


METHODS: dict[str, Method] = {
    **{
        name: _static(fit, random=_always if name == "dare" else _never)
        for name, fit in MERGERS.items()
    },
    "fisher": _static(
        fisher.fit,
        "calibration inputs",
        random=lambda options: options.get("num_samples") is not None,
    ),
    "regmean": _static(regmean.fit, "calibration inputs"),
    "adamerging": _static(adamerging.fit, adamerging.NEEDS),
    "svd": _personalized(svd, random=_by_base),
    "dts_t": _personalized(dts, partial(dts.fit, variant="task")),
    "dts_d": _personalized(dts, partial(dts.fit, variant="difference"), _by_base),
    "emr": _personalized(emr),
    "t_switch": _personalized(t_switch),
    "tall_mask": _personalized(tall_mask),
    "twin": _personalized(twin, random=_always),
    "dawin": _personalized(dawin),
    "smear_frozen": _personalized(smear, random=_always),
    "wemoe": _personalized(wemoe, random=_always),
    "retex": Method(
        offsets.fit,
        offsets.recover,
        needs="none",
        extra_bytes=offsets.offset_bytes,
        mix=offsets.mix,
        leaves=offsets.by_kind,
        random=lambda options: options.get("solver") == "adam" or _by_base(options),
        option_needs=_offset_needs,
    ),
}
