"""The pictures of the papers' tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from retex_jax.plots import canvas

Points = Sequence[tuple[str, float, Any]]
"""(what is said of a curve or row, what the point differs in, row of results.json)."""


def rows(found: Points, x: str | None, title: str) -> str:
    """A mark a row where there is no x, else a curve a label, of normalized accuracies with their intervals."""
    labels = list(dict.fromkeys(label for label, _, _ in found))
    height = 14 * len(labels) + (230 if x else 60)
    with canvas.figure(height) as fig:
        ax = fig.add_subplot()
        reference = ax.axhline if x else ax.axvline
        reference(1.0, color=canvas.INK, linewidth=1.0, linestyle=(0, (3, 2)))
        if x is None:
            _dots(ax, found)
            canvas.percent_axis(ax.xaxis)
            ax.set_xlabel("normalized accuracy")
        else:
            for index, label in enumerate(labels):
                _curve(ax, [(at, row) for of, at, row in found if of == label], x, label, index)
            canvas.percent_axis(ax.yaxis)
            ax.set_ylabel("normalized accuracy")
            ax.set_xlabel("stored per task, of one model" if x == "amr" else x)
            fig.legend(loc="outside upper left", ncols=2)
        ax.grid()
        return canvas.to_svg(fig, title)


def ends(found: Mapping[str, Mapping[str, float]], own: float, title: str) -> str:
    """A line a row, from the worst accuracy to the best."""
    with canvas.figure(14 * len(found) + 60) as fig:
        ax = fig.add_subplot()
        ax.axvline(own, color=canvas.INK, linewidth=1.0, linestyle=(0, (3, 2)))
        for place, by_other in enumerate(found.values()):
            worst_best = [min(by_other.values()), max(by_other.values())]
            ax.plot(worst_best, [place, place], marker="|", color=canvas.PALETTE[0], linewidth=2)
        ax.set_yticks(range(len(found)), [canvas.short(label, 34) for label in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        canvas.percent_axis(ax.xaxis)
        ax.set_xlabel("accuracy, with the worst and the best partner")
        ax.grid()
        return canvas.to_svg(fig, title)


def columns(means: Mapping[str, Mapping[str, float]], title: str, unit: str | None = None) -> str:
    """A curve a row where columns are numbers; else a mark a column on a line a row.

    Args:
      means: what is said of a row, column and number.
      title: of the document.
      unit: what is said of the numbers, which then are on a logarithmic axis; None: they are fractions.
    """
    names = list(dict.fromkeys(column for row in means.values() for column in row))
    curves = all(column.isdecimal() for column in names)
    with canvas.figure(14 * len(means) + (230 if curves else 90)) as fig:
        ax = fig.add_subplot()
        if curves:
            for index, (label, row) in enumerate(means.items()):
                color = canvas.PALETTE[index % len(canvas.PALETTE)]
                at = [int(column) for column in row]
                ax.plot(at, list(row.values()), marker="o", markersize=4, color=color, label=label)
            places = [int(column) for column in names]
            if max(places) > 8 * min(places):
                ax.set_xscale("log")
            ax.set_xticks(places, names)
            ax.minorticks_off()
            canvas.percent_axis(ax.yaxis)
        else:
            for index, column in enumerate(names):
                at = [row.get(column) for row in means.values()]
                color = canvas.PALETTE[index % len(canvas.PALETTE)]
                style = {"linestyle": "", "marker": "os^DvP*"[index % 7], "color": color}
                ax.plot(at, range(len(at)), label=column, **style)
            ax.set_yticks(range(len(means)), [canvas.short(label, 40) for label in means])
            ax.set_ylim(len(means) - 0.5, -0.5)
            if unit is None:
                canvas.percent_axis(ax.xaxis)
            else:
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(numticks=6))
                ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                ax.xaxis.set_minor_locator(NullLocator())
                ax.set_xlabel(unit)
        ax.grid()
        fig.legend(loc="outside upper left", ncols=3)
        return canvas.to_svg(fig, title)


def _dots(ax: Any, found: Points) -> None:
    every = [row for _, _, row in found]
    bars = [row.get("normalized_accuracy_interval") or 0.0 for row in every]
    style = {"fmt": "o", "color": canvas.PALETTE[0], "markersize": 5, "capsize": 2}
    ax.errorbar(
        [row["normalized_accuracy"] for row in every], range(len(every)), xerr=bars, **style
    )
    ax.set_yticks(range(len(every)), [canvas.short(label, 34) for label, _, _ in found])
    ax.set_ylim(len(every) - 0.5, -0.5)


def _curve(ax: Any, points: Sequence[tuple[float, Any]], x: str, label: str, index: int) -> None:
    at = [row["amr"] if x == "amr" else place for place, row in points]
    bars = [row.get("normalized_accuracy_interval") or 0.0 for _, row in points]
    ax.errorbar(
        at,
        [row["normalized_accuracy"] for _, row in points],
        yerr=bars if any(bars) else None,
        color=canvas.PALETTE[index % len(canvas.PALETTE)],
        linestyle=canvas.DASHES[index // len(canvas.PALETTE) % len(canvas.DASHES)],
        marker="o",
        markersize=4,
        linewidth=1.4,
        capsize=2,
        label=label,
    )
    if min(at) > 0 and max(at) > 8 * min(at):
        ax.set_xscale("log")
        if x == "amr":
            ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        else:
            ax.set_xticks(at, [f"{place:g}" for place in at])
            ax.minorticks_off()
