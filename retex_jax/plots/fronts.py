"""Figure of what methods reach at several sizes: one curve a method, with confidence intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from retex_jax.plots.canvas import (
    DASHES,
    INK,
    PALETTE,
    figure,
    finite,
    percent_axis,
    protocol,
    raise_all,
    short,
    to_svg,
)

_SIZES = ("rank", "task_rank", "budget", "amr")
_LEAST = 3  # points of a curve


def families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of one method that differ in size only, in the order of their bytes.

    Args:
      rows: rows of results.json.

    Returns:
      By method and its options that are no size: the rows with the task known, three or more, that store
      something and have a normalized accuracy.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        numbers = (finite(row.get("amr")), finite(row.get("normalized_accuracy")))
        if protocol(row) == "known" and None not in numbers and numbers[0]:
            options = str(row.get("variant") or "").split(", ")
            sizes = {option.split("=")[0]: option for option in options}
            rest = [option for name, option in sizes.items() if name not in _SIZES]
            named = [name for name in sizes if name in _SIZES]
            label = f"{row['method']} by {' and '.join(named)}" if named else row["method"]
            found.setdefault(f"{label}, {', '.join(rest)}".removesuffix(", "), []).append(row)
    return {
        name: sorted(family, key=lambda row: row["amr"])
        for name, family in found.items()
        if len(family) >= _LEAST
    }


def fronts(
    rows: Sequence[Mapping[str, Any]], *, title: str = "Accuracy against size, by method"
) -> str:
    """Draws normalised accuracy against the part of a model that a task stores, a curve a family.

    Args:
      rows: rows of results.json with at least one of `families`; read are "method", "variant",
        "task_known", "head_known", "amr", "normalized_accuracy" and, for a bar,
        "normalized_accuracy_interval".
      title: the accessible name of the figure.

    Returns:
      The SVG element.

    Raises:
      ValueError: if there is no family.
    """
    curves = families(rows)
    if not curves:
        raise_all([f"rows: expected {_LEAST} or more sizes of a method"])
    with figure(230 + 14 * len(curves)) as fig:
        ax = fig.add_subplot()
        ax.set_xscale("log")
        for i, (name, family) in enumerate(curves.items()):
            bars = [finite(row.get("normalized_accuracy_interval")) or 0.0 for row in family]
            ax.errorbar(
                [row["amr"] for row in family],
                [row["normalized_accuracy"] for row in family],
                yerr=bars if any(bars) else None,
                color=PALETTE[i % len(PALETTE)],
                linestyle=DASHES[i // len(PALETTE) % len(DASHES)],
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=2,
                label=short(name, 62),
            )
        ax.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (3, 2)))
        percent_axis(ax.yaxis)
        sizes = [row["amr"] for family in curves.values() for row in family]
        ticks = [n * 10.0**d for d in range(-6, 2) for n in (1, 2, 5)]
        shown = [tick for tick in ticks if min(sizes) / 1.5 <= tick <= 1.5 * max(sizes)]
        shown = shown[:: -(-len(shown) // 9)]
        ax.set_xticks(shown, [f"{100 * tick:.3g}%" for tick in shown])
        ax.minorticks_off()
        ax.grid()
        ax.set_xlabel("stored per task, of one model")
        ax.set_ylabel("normalized accuracy")
        fig.legend(loc="outside upper left")
        return to_svg(fig, title)
