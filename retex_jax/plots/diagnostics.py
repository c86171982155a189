"""Figures of what lies behind the accuracies: spectra of the offsets, identification, time."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from retex_jax.plots.canvas import (
    DASHES,
    INK,
    MUTED,
    PALETTE,
    WIDTH,
    figure,
    raise_all,
    seconds_text,
    short,
    to_svg,
)


def spectra(
    groups: Mapping[str, np.ndarray],
    *,
    rank: int | None = None,
    title: str = "Singular spectra of the offsets",
) -> str:
    """Draws the share of squared energy of each singular direction, both axes logarithmic.

    Args:
      groups: name -> singular values [k], not squared, largest first; each is normalised here by
        the sum of its squares. k may differ between groups. More than 12 groups are drawn as a
        median, a 10-90% band and the range.
      rank: the number of directions that an offset keeps; marked with a vertical line.
      title: the accessible name of the figure.

    Returns:
      The SVG element.

    Raises:
      ValueError: if there is no group, one is not a vector of finite, non-negative, non-increasing
        numbers with a positive sum, or rank is not positive.
    """
    shares, problems = {}, [] if groups else ["groups: expected at least one"]
    for name, values in groups.items():
        array = np.asarray(values, np.float64)
        if array.ndim != 1 or not array.size or not np.all(np.isfinite(array)) or np.any(array < 0):
            problems.append(
                f"groups[{name!r}]: expected finite values >= 0, [k], got shape {array.shape}"
            )
        elif array.max() == 0 or np.any(np.diff(array) > 1e-6 * array.max()):
            problems.append(
                f"groups[{name!r}]: expected singular values, largest first and not all zero"
            )
        else:
            shares[name] = np.square(array) / np.sum(np.square(array))
    if rank is not None and rank < 1:
        problems.append(f"rank = {rank}, expected at least 1")
    raise_all(problems)
    longest = max(len(s) for s in shares.values())
    floor = max(1e-12, min(s[s > 0].min() for s in shares.values()))
    many = len(shares) > 12
    with figure(210 + (14 if many else 14 * math.ceil(len(shares) / 2))) as fig:
        ax = fig.add_subplot()
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        if many:
            padded = np.full((len(shares), longest), floor)
            for i, share in enumerate(shares.values()):
                padded[i, : len(share)] = np.maximum(share, floor)
            at = np.arange(1, longest + 1)
            low, tenth, middle, ninetieth, high = np.quantile(padded, (0, 0.1, 0.5, 0.9, 1), axis=0)
            ax.fill_between(at, low, high, color=PALETTE[0], alpha=0.14, linewidth=0, label="range")
            ax.fill_between(
                at, tenth, ninetieth, color=PALETTE[0], alpha=0.3, linewidth=0, label="10-90%"
            )
            ax.plot(at, middle, color=PALETTE[0], linewidth=1.8, label=f"median of {len(shares)}")
        else:
            for i, (name, share) in enumerate(shares.items()):
                style = {
                    "color": PALETTE[i % len(PALETTE)],
                    "linestyle": DASHES[i // len(PALETTE)],
                }
                kept = np.where(share >= floor, share, np.nan)
                marker = "." if len(share) < 4 else ""
                ax.plot(
                    np.arange(1, len(share) + 1),
                    kept,
                    marker=marker,
                    label=short(name, 28),
                    **style,
                )
        right = max(longest, rank or 1, 2) * 1.1
        ax.set_xlim(0.93, right)
        bottom = 10.0 ** math.floor(math.log10(floor))
        ax.set_ylim(bottom, 1.3)
        ticks = [2**i for i in range(int(math.log2(right)) + 1)]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        decades = -round(math.log10(bottom))
        powers = range(0, -decades - 1, -max(1, math.ceil(decades / 5)))
        ax.set_yticks([10.0**p for p in powers], [_share_text(p) for p in powers])
        ax.minorticks_off()
        ax.grid()
        ax.set_xlabel("singular direction")
        ax.set_ylabel("share of squared energy")
        if rank is not None:
            ax.axvline(rank, color=INK, linewidth=1.0, linestyle=(0, (3, 2)))
            left = rank > math.sqrt(right)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
            where = {
                "xytext": (-4 if left else 4, -3),
                "ha": "right" if left else "left",
                "va": "top",
            }
            xy = {
                "xy": (rank, 1),
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
            }
            ax.annotate(f"rank {rank}", **xy, **where, bbox=box)
        fig.legend(loc="outside upper left", ncols=3 if many else 2)
        return to_svg(fig, title)


def confusion(matrix: np.ndarray, tasks: Sequence[str], *, title: str = "Identified task") -> str:
    """Draws which task the identifier picked for the inputs of each task, in percent of the row.

    Args:
      matrix: counts [T, T], integers or floats; row = true task, column = identified task.
      tasks: T names.
      title: the accessible name of the figure.

    Returns:
      The SVG element. The colour and the number of a cell are its share of the row (empty: none); n
      is the row's count.

    Raises:
      ValueError: if matrix is not [T, T] for T tasks, T is 0, or a count is negative or not finite.
    """
    counts = np.asarray(matrix, np.float64)
    size = len(tasks)
    problems = []
    if not size or counts.shape != (size, size):
        problems.append(f"matrix: shape {counts.shape}, expected ({size}, {size}) for {size} tasks")
    elif not np.all(np.isfinite(counts)) or np.any(counts < 0):
        problems.append("matrix: expected finite, non-negative counts")
    raise_all(problems)
    totals = counts.sum(axis=1)
    share = counts / np.where(totals > 0, totals, 1)[:, None]
    with figure(WIDTH * (0.98 if size > 4 else 0.72)) as fig:
        ax = fig.add_subplot()
        edges = np.arange(size + 1) - 0.5
        cells = {"cmap": "Blues", "vmin": 0, "vmax": 1.1, "edgecolors": "white", "linewidth": 1.5}
        ax.pcolormesh(edges, edges, share, **cells)
        ax.set_aspect("equal")
        ax.invert_yaxis()
        names = [short(t) for t in tasks]
        ax.set_xticks(
            range(size), names, rotation=90 if size > 6 else 45, ha="center" if size > 6 else "left"
        )
        ax.set_yticks(range(size), names)
        ax.tick_params(
            which="both", length=0, top=False, bottom=False, labeltop=True, labelbottom=False
        )
        ax.spines[:].set_visible(False)
        ax.set_xlabel("row: true task; column: identified task; % of the row")
        for i, j in np.ndindex(size, size):
            text = _cell_text(share[i, j]) if totals[i] else "\N{EN DASH}"
            color = "white" if share[i, j] > 0.55 else INK
            ax.text(
                j, i, text, ha="center", va="center", color=color, fontsize=8 if size > 8 else 9
            )
        for i in range(size):
            ax.text(size - 0.35, i, f"n={totals[i]:,.0f}", va="center", fontsize=7.5, color=MUTED)
        return to_svg(fig, title)


def by_layer(
    kinds: Mapping[str, Sequence[float | None]], *, title: str, percent: bool = False
) -> str:
    """Draws one number for each kind of leaf and layer.

    Args:
      kinds: kind of leaf -> its number in each layer, >= 0, None where there is none; not empty. Kinds may
        have different numbers of layers.
      title: the accessible name of the figure.
      percent: whether numbers are shares, shown in percent, rather than plain.

    Returns:
      The SVG element.

    Raises:
      ValueError: if there is no kind or no layer, or a number is negative or not finite.
    """
    problems = [
        f"kinds[{kind!r}]: got {value}, expected a finite number >= 0"
        for kind, values in kinds.items()
        for value in values
        if value is not None and not (math.isfinite(value) and value >= 0)
    ]
    layers = max((len(values) for values in kinds.values()), default=0)
    raise_all(problems if layers else ["kinds: expected at least one kind and layer"])
    table = np.full((len(kinds), layers), np.nan)
    for row, values in enumerate(kinds.values()):
        table[row, : len(values)] = [np.nan if value is None else value for value in values]
    top = 1.0 if percent else max(float(np.nanmax(table, initial=0)), 1.0)
    with figure(17.0 * len(kinds) + 42) as fig:
        ax = fig.add_subplot()
        cells = {"cmap": "Blues", "vmin": 0, "vmax": 1.1 * top, "edgecolors": "white"}
        edges = np.arange(layers + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5
        ax.pcolormesh(*edges, np.ma.masked_invalid(table), linewidth=1.0, **cells)
        ax.invert_yaxis()
        ax.set_yticks(range(len(kinds)), [short(kind, 28) for kind in kinds])
        ax.set_xticks(range(layers))
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("layer")
        for i, j in np.ndindex(*table.shape):
            if np.isfinite(table[i, j]):
                text = f"{100 * table[i, j]:.0f}" if percent else f"{table[i, j]:.0f}"
                color = "white" if table[i, j] > 0.55 * top else INK
                ax.text(j, i, text, ha="center", va="center", color=color, fontsize=7.5)
        return to_svg(fig, title)


def times(seconds: Mapping[str, float], *, title: str = "Wall-clock time of each phase") -> str:
    """Draws one horizontal bar a phase with its wall-clock time.

    Args:
      seconds: phase -> seconds, in the order of the figure; not empty.
      title: the accessible name of the figure.

    Returns:
      The SVG element.

    Raises:
      ValueError: if `seconds` is empty or a time is negative or not finite.
    """
    problems = [
        f"seconds[{k!r}] = {v}, expected a finite number >= 0"
        for k, v in seconds.items()
        if not math.isfinite(v) or v < 0
    ]
    raise_all(problems if seconds else ["seconds: expected at least one phase"])
    longest = max(seconds.values()) or 1.0
    with figure(17.0 * len(seconds) + 12) as fig:
        ax = fig.add_subplot()
        ax.barh(range(len(seconds)), list(seconds.values()), 0.66, color=PALETTE[0])
        ax.set_yticks(range(len(seconds)), [short(name, 24) for name in seconds])
        ax.set_ylim(len(seconds) - 0.4, -0.6)
        ax.set_xlim(0, longest * 1.3)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        for i, value in enumerate(seconds.values()):
            ax.annotate(
                seconds_text(value), (value, i), (4, 0), textcoords="offset points", va="center"
            )
        return to_svg(fig, title)


def _cell_text(share: float) -> str:
    percent = 100 * share
    if percent in (0, 100):
        return "100" if percent else ""
    return "<1" if percent < 1 else ">99" if percent > 99 else f"{percent:.0f}"


def _share_text(power: int) -> str:
    return f"{100 * 10.0**power:.10g}%" if power >= -4 else f"1e{power + 2}%"
