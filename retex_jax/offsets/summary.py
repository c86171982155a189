"""What a fit made of each leaf, by kind of leaf and layer: for tables and pictures."""

import re
from typing import Any

from retex_jax.offsets.forms import Extended, OwnForm, Separate
from retex_jax.offsets.state import OffsetState

_NUMBER = re.compile(r"_\d+(?=/|$)|(?<=/)\d+(?=/)")


def kind_of(name: str) -> str:
    """A leaf's name without the number of its layer."""
    return _NUMBER.sub("", name)


def by_kind(state: OffsetState) -> dict[str, dict[str, list[Any]]]:
    """Ranks and residuals of the matrix leaves.

    Args:
      state: from `fit`.

    Returns:
      Kind of leaf (its name without the number of the layer) to "rank", of each layer in order: r, or
      the mean over tasks where no factor is shared, 0 without an offset; and "residual": the part of the
      leaf's energy that is lost, from 0 to 1, None without energy.
    """
    kinds: dict[str, dict[str, list[Any]]] = {}
    report = state.report
    for name in sorted(report.residuals, key=_layer):
        rank = _rank(state.form(name) if name in state.offsets else None)
        if rank is None:
            continue
        energy = report.energies[name]
        kind = kinds.setdefault(kind_of(name), {"rank": [], "residual": []})
        kind["rank"].append(rank)
        kind["residual"].append(report.residuals[name] / energy if energy > 0 else None)
    return kinds


def _layer(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _rank(form: OwnForm | None) -> float | None:
    """None below two axes."""
    while isinstance(form, Extended):
        form = form.base
    if form is None:
        return 0
    if isinstance(form, Separate):
        return sum(form.ranks) / len(form.ranks)
    shared = getattr(form, "shared", None)
    return shared.shape[0] if shared is not None and len(shared.shape) == 2 else None
