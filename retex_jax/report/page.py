"""Puts the page together: headline numbers, tables, figures, configuration."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from retex_jax import plots
from retex_jax.report.assets import SCRIPT, STYLE
from retex_jax.report.tables import (
    PROTOCOL,
    bytes_or_dash,
    escape,
    method_table,
    name,
    percent,
    plain_table,
    task_table,
    told,
)

_MOST_MERGED = 6  # columns of merged models in the main table


class Section(NamedTuple):
    """A further part of the page: a table and figures.

    Attributes:
      title: its heading.
      text: what it shows.
      columns: headings of the table.
      rows: one value a column: text, a number, or None.
      figures: (title, text, SVG element) of each.
    """

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figures: Sequence[tuple[str, str, str]] = ()


def render(
    results: Mapping[str, Any],
    spectra: Mapping[str, np.ndarray],
    confusion: Sequence[tuple[str, np.ndarray]],
    seconds: Mapping[str, float],
    config_text: str,
    sections: Sequence[Section] = (),
) -> str:
    """Returns the whole page as HTML text; the arguments are those of `retex_jax.report.write`."""
    tasks = [str(task) for task in results["tasks"]]
    rows = list(results["rows"])
    columns = _columns(results, rows)
    meta = " ".join(
        f"<span>{key.replace('_', ' ')} <b>{escape(results[key])}</b></span>"
        for key in ("checkpoint_set", "device", "seed", "expert_seeds", "commit")
        if results.get(key) is not None
    )
    main = _main(rows)
    recovered = f"Recovered is {escape(name(main[0]))}. " if main else ""
    parts = [
        "<h1>Merged and recovered experts</h1>",
        f'<p class="meta"><span><b>{len(tasks)}</b> tasks</span> {meta}</p>',
        _tiles(results, rows),
        "<h2>Accuracy per task</h2>",
        "<p>Percent of the test inputs. Compare each column with Individual, the expert of that "
        f'task alone: cells below 95% of it are tinted <span class="key low"></span>, below 80% '
        f'<span class="key lower"></span>. {recovered}Click a heading to sort.</p>',
        task_table(tasks, columns, results["individual"]),
        "<h2>All methods</h2>",
        "<p>Normalized accuracy is the mean over tasks of accuracy / Individual, and that of the worst "
        "task beside it; ADR the accuracy drop against Individual; AMR the bytes stored per task / the "
        f"bytes of one model.{_seeds(results)}</p>",
        "<p><b>Task known</b>: weights and head of the true task. "
        "<b>Backbone routed, own head</b>: the identifier picks the weights, the head is the true "
        "task's. <b>Nothing known</b>: the identifier picks both, and a wrong task counts as an "
        "error.</p>",
        method_table(rows),
        *(_section(section) for section in sections),
        "<h2>Figures</h2>",
        f'<div class="figures">{_figures(results, columns, spectra, confusion, seconds)}</div>',
    ]
    if len(columns) < len(rows) + len(_references(results)):
        every = _references(results)
        for row in rows:
            _add(every, f"{name(row)}, {told(row)}", row["accuracy"])
        table = task_table(tasks, every, results["individual"])
        parts.append(f"<details><summary>Accuracy per task, every row</summary>{table}</details>")
    if config_text:
        text = f"<pre>{escape(config_text)}</pre>"
        parts.append(f"<details><summary>Configuration</summary>{text}</details>")
    title = f"Merged experts: {results.get('checkpoint_set') or f'{len(tasks)} tasks'}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    figures = "".join(_figure(*figure) for figure in section.figures)
    return (
        f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n"
        f"{plain_table(section.columns, section.rows)}\n"
        + (f'<div class="figures">{figures}</div>' if figures else "")
    )


def _leaf_figures(method: str, leaves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ranks = {kind: of["rank"] for kind, of in leaves.items()}
    lost = {kind: of["residual"] for kind, of in leaves.items()}
    shown = (
        (
            "Ranks",
            ranks,
            False,
            "The rank of each matrix's offsets, the mean over tasks where none is shared",
        ),
        (
            "What is lost",
            lost,
            True,
            "Percent of the offsets' squared energy that is not recovered",
        ),
    )
    return [
        _figure(
            f"{title} of each layer",
            f"{text}: {method}.",
            plots.by_layer(values, title=f"{title} of each layer", percent=percent),
        )
        for title, values, percent, text in shown
    ]


def _seeds(results: Mapping[str, Any]) -> str:
    """Returns what the numbers after a plus-minus sign are, if there are any."""
    rows = results["rows"]
    if results.get("expert_seeds"):
        number = len(results["expert_seeds"])
        return f" Mean \N{PLUS-MINUS SIGN} standard deviation over experts of {number} seeds."
    counts = sorted({len(row["seeds"]) for row in rows if len(row.get("seeds") or ()) > 1})
    if not counts:
        return ""
    number = " or ".join(map(str, counts))
    return f" Of methods that are random: mean \N{PLUS-MINUS SIGN} standard deviation of {number} seeds."


def _tiles(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the headline numbers: (style, what it is, value) for whatever the results hold."""
    individual = [plots.finite(results["individual"].get(task)) for task in results["tasks"]]
    known = [x for x in individual if x is not None]
    mean = percent(sum(known) / len(known) if known else None)
    tiles = [("", "mean accuracy of the individual experts", mean)]
    merged, main = _merged(rows), _main(rows)
    for row in merged[:1]:
        label = f"normalized accuracy, {name(row)}"
        tiles.append(("", label, percent(row.get("normalized_accuracy"))))
    for row in main:
        label = f"normalized accuracy, {name(row)}, {told(row)}"
        kind = "main" if row is main[0] else ""
        tiles.append((kind, label, percent(row.get("normalized_accuracy"))))
    identified = [plots.finite(row.get("identification_accuracy")) for row in main]
    for share in [x for x in identified if x is not None][:1]:
        tiles.append(("", "of the inputs sent to the right task", percent(share)))
    for row in main[:1]:
        amr = plots.finite(row.get("amr"))
        label = "stored per task" + ("" if amr is None else f", {percent(amr)} of one model")
        tiles.append(("", label, bytes_or_dash(row["bytes_per_task"])))
    offsets = results.get("offsets") or {}
    ratio = plots.finite(offsets.get("ratio"))
    if ratio is not None:
        solver = f" ({offsets['solver']} solver)" if offsets.get("solver") else ""
        tiles.append(("", f"residual of the offsets / its optimum{solver}", f"{ratio:.4f}"))
    cells = (
        f'<div class="{kind}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>'
        for kind, label, value in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _figures(
    results: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, Any]],
    spectra: Mapping[str, np.ndarray],
    confusion: Sequence[tuple[str, np.ndarray]],
    seconds: Mapping[str, float],
) -> str:
    tasks, rows = [str(task) for task in results["tasks"]], results["rows"]
    references = list(_references(results))
    merged = [label for label in columns if label.startswith("Merged: ")]
    series = {label: of for label, of in columns.items() if label not in merged[1:]}
    text = "The solid mark is the individual expert"
    if len(references) > 1:
        text += ", the dotted one a linear probe on the pretrained features"
    text += "; a bar that reaches the solid mark has lost nothing."
    svg = plots.accuracy_bars(tasks, series, references=references)
    figures = [_figure("Accuracy of each task", text, svg)]
    read = ("bytes_per_task", "normalized_accuracy")
    if any(all(plots.finite(row.get(key)) is not None for key in read) for row in rows):
        text = (
            "Up and to the left is better; the dashed line is the individual experts. "
            "Points of equal bytes are drawn side by side. Of many methods, Weight Averaging, ReTeX "
            "and those that no other beats at their size are named."
        )
        figures.append(_figure("Accuracy against bytes", text, plots.bytes_accuracy(rows)))
    if plots.families(rows):
        text = "Methods at three or more sizes, with the task known."
        if any(plots.finite(row.get("normalized_accuracy_interval")) for row in rows):
            text += " Bars are 95% confidence intervals of the mean (Student's t)."
        figures.append(_figure("Accuracy against size", text, plots.fronts(rows)))
    if spectra:
        rank = plots.finite((results.get("offsets") or {}).get("rank"))
        rank = int(rank) if rank is not None and rank >= 1 else None
        text = "The faster a curve falls, the smaller the rank that recovers the experts"
        text += f"; what lies to the right of rank {rank} is not stored." if rank else "."
        svg = plots.spectra(spectra, rank=rank)
        figures.append(_figure("Singular spectra of the offsets", text, svg))
    for row in [row for row in rows if row.get("leaves")][-1:]:
        figures += _leaf_figures(name(row), row["leaves"])
    for title, matrix in confusion:
        text = (
            "Each row shows where the inputs of one task were sent; a perfect identifier fills the "
            "diagonal only."
        )
        svg = plots.confusion(matrix, tasks, title=title)
        figures.append(_figure(title, text, svg))
    if seconds:
        total = plots.seconds_text(sum(seconds.values()))
        text = f"Wall-clock time of each phase; {total} in all."
        figures.append(_figure("Time", text, plots.times(seconds)))
    return "\n".join(figures)


def _figure(title: str, text: str, svg: str) -> str:
    caption = f"<figcaption><h3>{escape(title)}</h3><p>{escape(text)}</p></figcaption>"
    return f"<figure>{caption}{svg}</figure>"


def _references(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    probe = results.get("linear_probe")
    return {"Individual": results["individual"]} | ({"Linear probe": probe} if probe else {})


def _columns(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Picks the columns of the main table: individual, probe, merged, the main recovered method.

    Of many merged models the first (Weight Averaging) and the best.
    """
    columns = _references(results)
    merged, main = _merged(rows), _main(rows)
    if len(merged) > _MOST_MERGED:
        best = max(merged, key=lambda row: plots.finite(row.get("normalized_accuracy")) or 0.0)
        merged = [merged[0], *([best] if best is not merged[0] else [])]
    heads = {told(row) for row in merged}
    for row in merged:
        more = f", {told(row)}" if len(heads) > 1 else ""
        _add(columns, f"Merged: {name(row)}{more}", row["accuracy"])
    for row in main:
        _add(columns, f"Recovered: {told(row)}", row["accuracy"])
    return columns


def _add(columns: dict[str, Mapping[str, Any]], label: str, of: Mapping[str, Any]) -> None:
    """Adds a column under a label of its own."""
    count = sum(other.split(" #")[0] == label for other in columns)
    columns[f"{label} #{count + 1}" if count else label] = of


def _merged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows of one merged model for all tasks, Weight Averaging first."""
    static = [row for row in rows if not row.get("bytes_per_task")]
    return sorted(static, key=lambda row: row["method"] != "weight_average")


def _main(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows, one a protocol, of the personalised method that the page puts first.

    ReTeX before other methods; of its variants the one with most protocols, then the best accuracy.
    """
    families: dict[tuple[bool, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("bytes_per_task"):
            family = families.setdefault((row["method"] == "retex", name(row)), {})
            family.setdefault(plots.protocol(row), row)

    def merit(key: tuple[bool, str]) -> tuple[bool, int, float]:
        scores = [plots.finite(row.get("normalized_accuracy")) for row in families[key].values()]
        return key[0], len(scores), max(score or 0.0 for score in scores)

    best = families[max(families, key=merit)] if families else {}
    return [best[kind] for kind in PROTOCOL if kind in best]
