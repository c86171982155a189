"""Figures of how a measure is distributed, for inputs of known tasks and of none."""

import numpy as np

from retex_jax.plots.canvas import INK, PALETTE, figure, finite, raise_all, to_svg

_BINS = 40


def histogram(
    inside: np.ndarray, outside: np.ndarray, *, threshold: float | None = None, title: str
) -> str:
    """Draws the shares of two groups of inputs by a measure.

    Args:
      inside: measures of inputs of known tasks, [n], finite, n > 0.
      outside: of inputs of no known task, [m], m > 0.
      threshold: marked with a vertical line; what is above it is taken as of no known task.
      title: the accessible name of the figure.

    Returns:
      The SVG element.

    Raises:
      ValueError: if a group is empty, not of one axis or not finite, or the threshold is not finite.
    """
    groups = {"known tasks": inside, "unknown task": outside}
    arrays = {name: np.asarray(values, np.float64) for name, values in groups.items()}
    problems = [
        f"{name}: got shape {array.shape}, expected [n] of finite measures, n > 0"
        for name, array in arrays.items()
        if array.ndim != 1 or not array.size or not np.isfinite(array).all()
    ]
    if threshold is not None and finite(threshold) is None:
        problems.append(f"threshold: got {threshold!r}, expected a finite number")
    raise_all(problems)
    everything = np.concatenate([*arrays.values(), [] if threshold is None else [threshold]])
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    with figure(190) as fig:
        ax = fig.add_subplot()
        for color, (name, array) in zip(PALETTE, arrays.items(), strict=False):
            shares = np.histogram(array, edges)[0] / len(array)
            label = f"{name}, n={len(array):,}"
            ax.stairs(shares, edges, color=color, fill=True, alpha=0.35)
            ax.stairs(shares, edges, color=color, linewidth=1.4, label=label)
        if threshold is not None:
            ax.axvline(
                threshold, color=INK, linewidth=1.0, linestyle=(0, (3, 2)), label="threshold"
            )
        ax.set_ylim(bottom=0)
        ax.set_ylabel("share of the inputs")
        ax.set_xlabel("measure: larger is further from the known tasks")
        fig.legend(loc="outside upper left", ncols=3)
        return to_svg(fig, title)
