"""What the alternating solvers share: their settings, and when to stop."""

from collections.abc import Sequence

SWEEPS = 100
TOLERANCE = 1e-5

# Below this fraction of the energy a residual is rounding.
_ROUNDING = 1e-14


def check_settings(sweeps: int = SWEEPS, tolerance: float = TOLERANCE) -> None:
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
