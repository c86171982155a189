"""What the alternating solvers share: when to stop, and the leaves below two axes."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from retex_jax.experts import ExpertSet
from retex_jax.offsets import exact
from retex_jax.offsets.forms import Form
from retex_jax.offsets.state import FitReport, LeafPlan
from retex_jax.typing import FlatParams

SWEEPS = 100
TOLERANCE = 1e-5

# Below this fraction of the energy a residual is rounding.
_ROUNDING = 1e-14


def check_settings(sweeps: int, tolerance: float) -> None:
    """Checks the settings of an alternating solver.

    Raises:
      ValueError: listing every setting that is out of range.
    """
    problems = []
    if sweeps < 1:
        problems.append(f"sweeps: got {sweeps!r}, expected 1 or more")
    if not 0 <= tolerance < 1:
        problems.append(f"tolerance: got {tolerance!r}, expected 0 to 1")
    if problems:
        raise ValueError("; ".join(problems))


def converged(history: Sequence[float], energy: float, tolerance: float) -> bool:
    """Whether a sweep of two halves took less than this fraction of the residual away."""
    before, now = history[-3], history[-1]
    return now <= _ROUNDING * energy or before - now <= tolerance * before


def add_vectors(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    offsets: dict[str, Form],
    report: FitReport,
) -> None:
    """Enters the leaves below two axes into `offsets` and `report`: each task's own offset, exact."""
    for name in experts.float_leaves:
        if name not in plans:
            vectors = exact.difference_vectors(experts, base, name)
            offsets[name] = exact.elementwise(vectors)
            report.energies[name] = float(jnp.sum(vectors**2))
            report.residuals[name] = report.optima[name] = 0.0
