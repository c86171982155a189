"""Figures of accuracy: per task, and against the bytes that a further task costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retex_jax.plots.canvas import (
    BARS,
    INK,
    MUTED,
    PALETTE,
    PROTOCOLS,
    bytes_text,
    figure,
    finite,
    percent_axis,
    protocol,
    raise_all,
    short,
    to_svg,
)

_MOST_LABELS = 12  # more are not told apart
_UNNAMED = "#a9b3bd"
_ALWAYS_NAMED = ("weight_average", "retex")


def accuracy_bars(
    tasks: Sequence[str],
    series: Mapping[str, Mapping[str, float | None]],
    *,
    references: Sequence[str] = (),
    title: str = "Accuracy of each task",
) -> str:
    """Draws one group of horizontal bars a task, one bar a series.

    Args:
      tasks: names of the tasks, top to bottom; not empty.
      series: label -> task -> accuracy in [0, 1], or a correlation in [-1, 1]. A missing task, None or NaN
        leaves its bar out.
      references: labels of `series` that are drawn as a mark across the whole group (first: solid,
        next: dotted) rather than as a bar.
      title: the accessible name of the figure.

    Returns:
      The SVG element.

    Raises:
      ValueError: if `tasks` or `series` is empty, `references` names no series, or an accuracy is
        outside [-1, 1].
    """
    problems = [
        f"references: {r!r} is none of {sorted(series)}" for r in references if r not in series
    ]
    if not tasks or not series:
        problems.append(f"tasks and series must not be empty, got {len(tasks)} and {len(series)}")
    values = {label: [finite(of.get(task)) for task in tasks] for label, of in series.items()}
    for label, numbers in values.items():
        problems += [
            f"series[{label!r}][{task!r}] = {x}, expected an accuracy in [-1, 1]"
            for task, x in zip(tasks, numbers, strict=True)
            if x is not None and not -1 <= x <= 1
        ]
    raise_all(problems)
    bars = [label for label in series if label not in references]
    thick, gap = (9.0 if len(bars) < 4 else 7.0), 8.0
    group = max(len(bars), 1) * thick
    with figure(len(tasks) * (group + gap) + 34 + 14 * math.ceil(len(series) / 2)) as fig:
        ax = fig.add_subplot()
        handles = []
        for i, label in enumerate(bars):
            at = [
                (y * (group + gap) + (i + 0.5) * thick, x)
                for y, x in enumerate(values[label])
                if x is not None
            ]
            color = BARS[i % len(BARS)]
            handles.append(
                ax.barh(
                    [y for y, _ in at], [x for _, x in at], 0.86 * thick, color=color, label=label
                )
            )
        for i, label in enumerate(references):
            at = [(y * (group + gap), x) for y, x in enumerate(values[label]) if x is not None]
            top, xs = np.array([y for y, _ in at]), [x for _, x in at]
            style = {"linewidth": 1.3 if i else 1.8, "linestyle": (0, (1, 1)) if i else "-"}
            lines = ax.vlines(xs, top - 2, top + group + 2, colors=INK, label=label, **style)
            handles.insert(i, lines)
        ax.set_yticks(
            [y * (group + gap) + group / 2 for y in range(len(tasks))], [short(t) for t in tasks]
        )
        ax.set_ylim(len(tasks) * (group + gap) - gap / 2, -gap / 2)
        percent_axis(ax.xaxis)
        least = min((x for numbers in values.values() for x in numbers if x is not None), default=0)
        ax.set_xlim(min(0, math.floor(5 * least) / 5), 1)
        ax.set_xlabel("accuracy")
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        fig.legend(handles=handles, loc="outside upper left", ncols=2)
        return to_svg(fig, title)


def bytes_accuracy(
    rows: Sequence[Mapping[str, Any]], *, title: str = "Accuracy against bytes stored per task"
) -> str:
    """Draws normalised accuracy against the bytes that each further task costs.

    Args:
      rows: rows of results.json; read are "method", "variant", "task_known", "head_known",
        "bytes_per_task" and "normalized_accuracy". Rows without a number in the last two are left
        out. One colour a method, one shape a protocol; rows that cost no bytes stand in a strip of
        their own at the left, since the axis is logarithmic. Where there are more than 12 variants,
        only those that `named` picks have a name and a colour.
      title: the accessible name of the figure.

    Returns:
      The SVG element.

    Raises:
      ValueError: if no row has both numbers, or a number of bytes is negative.
    """
    points = []
    for row in rows:
        stored, score = finite(row.get("bytes_per_task")), finite(row.get("normalized_accuracy"))
        if stored is not None and score is not None:
            points.append(
                (
                    str(row.get("method", "")),
                    str(row.get("variant") or ""),
                    protocol(row),
                    stored,
                    score,
                )
            )
    problems = [
        f"bytes_per_task = {p[3]} of {p[0]!r}, expected at least 0" for p in points if p[3] < 0
    ]
    if not points:
        problems.append("rows: expected at least one with bytes_per_task and normalized_accuracy")
    raise_all(problems)
    paid = [p[3] for p in points if p[3] > 0]
    low, high = (min(paid), max(paid)) if paid else (1e3, 1e6)
    left, right = math.floor(math.log10(low)) - 0.3, math.ceil(math.log10(high * 1.05)) + 0.1
    free = left - 0.16 * (right - left)
    with figure(262) as fig:
        ax = fig.add_subplot()
        labels = [f"{p[0]} {p[1]}".strip() for p in points]
        shown = named(points) if len(set(labels)) > _MOST_LABELS else [True] * len(points)
        methods = list(dict.fromkeys(p[0] for p, has in zip(points, shown, strict=True) if has))
        point = 1.1 * (right - free) / 300
        shift = [PROTOCOLS[p[2]][2] * point for p in points]
        xs = [math.log10(p[3]) if p[3] > 0 else free for p in points]
        xy = [(x + dx, p[4]) for x, dx, p in zip(xs, shift, points, strict=True)]
        for (method, _, kind, *_rest), (x, y), has in zip(points, xy, shown, strict=True):
            color = PALETTE[methods.index(method) % len(PALETTE)] if has else _UNNAMED
            fill = color if kind == "known" else "white"
            style = {
                "color": color,
                "markerfacecolor": fill,
                "markersize": 6.5,
                "markeredgewidth": 1.5,
            }
            ax.plot([x], [y], marker=PROTOCOLS[kind][0], zorder=3 if has else 2.5, **style)
        ys = [y for _, y in xy] + [1.0]
        margin = 0.09 * max(max(ys) - min(ys), 0.02)
        ax.set_ylim(min(ys) - 1.4 * margin, max(ys) + 1.4 * margin)
        ax.set_xlim(free - 0.1 * (right - left), right)
        ax.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (3, 2)))
        ax.axvline(left, color=MUTED, linewidth=0.8)
        decades = list(range(math.ceil(left), int(right) + 1))
        decades = decades[:: max(1, math.ceil(len(decades) / 5))]
        ax.set_xticks([free, *decades], ["0", *(bytes_text(10.0**d) for d in decades)])
        percent_axis(ax.yaxis)
        ax.grid()
        ax.set_xlabel("bytes stored per task")
        ax.set_ylabel("normalized accuracy")
        kinds = [k for k in PROTOCOLS if any(p[2] == k for p in points)]
        style = {"color": INK, "linestyle": "", "markersize": 6}
        handles = []
        for kind in kinds:
            fill = INK if kind == "known" else "white"
            handles += ax.plot([], [], marker=PROTOCOLS[kind][0], markerfacecolor=fill, **style)
        fig.legend(handles, [PROTOCOLS[k][1] for k in kinds], loc="outside upper left", ncols=3)
        texts = [label if has else "" for label, has in zip(labels, shown, strict=True)]
        _label_points(fig, ax, [(text, *at) for text, at in zip(texts, xy, strict=True)])
        return to_svg(fig, title)


def named(points: Sequence[tuple[str, str, str, float, float]]) -> list[bool]:
    """Which points of a crowded figure have a name.

    Args:
      points: method, variant, protocol, bytes, score of each.

    Returns:
      For each point whether no other of its protocol is as small and as good, and better in one of these; or it
      is of Weight Averaging or ReTeX. Of points that are equal in both, the first.
    """
    marks = []
    for i, (method, _, kind, stored, score) in enumerate(points):
        beaten = any(
            other == kind
            and size <= stored
            and merit >= score
            and (size < stored or merit > score or j < i)
            for j, (_, _, other, size, merit) in enumerate(points)
            if j != i
        )
        marks.append(not beaten or method in _ALWAYS_NAMED)
    return marks


def _label_points(fig: Any, ax: Any, points: Sequence[tuple[str, float, float]]) -> list[Any]:
    """Writes each distinct label but "" once, near its highest point, clear of all points and labels."""
    fig.draw_without_rendering()
    renderer = fig.canvas.get_renderer()
    frame = ax.get_window_extent(renderer).padded(-2)
    line = ax.transData.transform((0, 1))[1]
    marks = ax.transData.transform([(x, y) for _, x, y in points])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    best: dict[str, tuple[float, float]] = {}
    for (label, _, _), (px, py) in zip(points, marks, strict=True):
        if label and (label not in best or py > best[label][1]):
            best[label] = (px, py)
    texts = []
    for label, (px, py) in sorted(best.items(), key=lambda item: -item[1][1]):
        text = ax.text(0, 0, short(label, 30), fontsize=8, ha="center", va="center")
        text.set_in_layout(False)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        extent = text.get_window_extent(renderer)
        half, tall = extent.width / 2, (extent.height + 1) / 2
        across = np.array([half + 8, -half - 8, 0, half / 2, -half / 2])
        down = np.array([0, *range(9, 200, 3), *range(-9, -200, -3)])
        cx, cy = (grid.ravel() for grid in np.meshgrid(px + across, py + down))
        left, low, right, high = cx - half, cy - tall, cx + half, cy + tall
        cost = np.hypot(np.maximum(0, abs(cx - px) - half), cy - py) + 0.1 * (cx < px)
        cost += 500 * ((low < line) & (line < high))
        for x0, y0, x1, y1 in taken:
            cost += 1000 * ((left < x1) & (x0 < right) & (low < y1) & (y0 < high))
        for beyond in (frame.x0 - left, right - frame.x1, frame.y0 - low, high - frame.y1):
            cost += 200 * np.maximum(0, beyond)
        i = int(np.argmin(cost))
        taken.append((left[i], low[i], right[i], high[i]))
        text.set_position(ax.transData.inverted().transform((cx[i], cy[i])))
        if abs(cy[i] - py) > 2 * tall:
            end = (np.clip(px, left[i], right[i]), low[i] if cy[i] > py else high[i])
            xs, ys = ax.transData.inverted().transform([(px, py), end]).T
            ax.plot(xs, ys, color=MUTED, linewidth=0.7, zorder=1)
        texts.append(text)
    return texts
