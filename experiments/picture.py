"""The picture of README.md: accuracy of the recovered experts against the bytes that each takes.

It is written by experiments/readme.py. The file ends in a fingerprint of what is drawn: a check compares that, as
another version of matplotlib writes other SVG.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

PATH = "experiments/docs/pictures/accuracy_bytes.svg"
MARKERS = "os^DvP*"

Points = Mapping[str, Mapping[str, list[tuple[float, float]]]]
"""Suite to curve to (bytes a task as a part of the model, normalized accuracy); 0 bytes are drawn as a line."""


def fingerprint(points: Points) -> str:
    """Of all numbers, to six digits."""
    rounded = {
        suite: {
            name: [[f"{x:.6g}" for x in point] for point in curve] for name, curve in of.items()
        }
        for suite, of in points.items()
    }
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]


def is_current(path: Path, points: Points) -> bool:
    """Whether the file was drawn from these points."""
    return path.is_file() and path.read_text().endswith(_seal(points))


def _seal(points: Points) -> str:
    return f"<!-- points {fingerprint(points)} -->\n"


def draw(path: Path, points: Points) -> None:
    """One panel a suite, one curve a method."""
    from retex_jax.plots.canvas import INK, MUTED, PALETTE, figure, percent_axis, to_svg

    with figure(400) as fig:
        axes = fig.subplots(len(points), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (suite, curves) in zip(axes, points.items(), strict=True):
            paid = [(name, curve) for name, curve in curves.items() if curve[0][0] > 0]
            for (name, curve), marker, color in zip(paid, MARKERS, PALETTE, strict=True):
                style = {"color": color, "marker": marker, "markersize": 6, "linewidth": 1.5}
                ax.plot(*zip(*curve, strict=True), label=name, **style)
            for name, curve in curves.items():
                if curve[0][0] == 0:
                    ax.axhline(
                        curve[0][1], color=MUTED, linestyle=(0, (1, 1.2)), label=f"{name}, 0 bytes"
                    )
            ax.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (3, 2)), label="the experts")
            ax.set(xscale="log", ylabel="normalized accuracy")
            ax.set_title(suite, loc="left", fontsize=9)
            percent_axis(ax.yaxis)
            ax.grid()
        ticks = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15)
        ax.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("stored per task, of one model")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        svg = to_svg(fig, "Accuracy of the recovered experts against bytes a task")
    start = svg.index(">", svg.index("<svg")) + 1
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    path.write_text(f"{svg[:start]}{white}{svg[start:]}\n{_seal(points)}", encoding="utf-8")
