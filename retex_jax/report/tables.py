"""Sortable HTML tables, and the words and numbers in their cells."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from retex_jax import plots

DASH = "\N{EN DASH}"
PROTOCOL = {"known": "task known", "head": "backbone routed, own head", "none": "nothing known"}


def task_table(
    tasks: Sequence[str], columns: Mapping[str, Mapping[str, Any]], individual: Mapping[str, Any]
) -> str:
    """Returns the accuracies in percent, one row a task, tinted by accuracy / individual."""
    body, foot = [], ["<th>Mean</th>"]
    for task in tasks:
        reference = plots.finite(individual.get(task))
        cells = [_cell(task, task, "text", tag="th")]
        for of in columns.values():
            value = plots.finite(of.get(task))
            ratio = value / reference if value is not None and reference else 1.0
            tint = "lower" if ratio < 0.8 else "low" if ratio < 0.95 else ""
            cells.append(_cell(value, percent(value, sign=""), tint))
        body.append(cells)
    for of in columns.values():
        values = [x for task in tasks if (x := plots.finite(of.get(task))) is not None]
        mean = sum(values) / len(values) if values and len(values) == len(tasks) else None
        foot.append(f"<td>{percent(mean, sign='')}</td>")
    return _table(["Task", *columns], {0}, body, foot)


def method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of all result rows: what each was told, needs, reaches and costs."""
    numbers = (
        ("Normalized accuracy", "normalized_accuracy", lambda x: percent(x, digits=2)),
        ("Worst task", "worst_normalized_accuracy", lambda x: percent(x, digits=2)),
        ("ADR", "adr", lambda x: percent(x, digits=2)),
        ("Bytes per task", "bytes_per_task", plots.bytes_text),
        ("AMR", "amr", lambda x: percent(x, digits=2)),
        ("Identified", "identification_accuracy", percent),
        ("Fit time", "seconds_fit", plots.seconds_text),
        ("Peak memory", "peak_rss_bytes", plots.bytes_text),
    )
    body = []
    for row in rows:
        words = (told(row), str(row.get("needs") or DASH))
        cells = [_cell(name(row), name(row), "text", tag="th")]
        cells += [_cell(word, word, "text") for word in words]
        for _, key, show in numbers:
            number = plots.finite(row.get(key))
            text = DASH if number is None else show(number)
            if key == "normalized_accuracy" and text != DASH:
                text += _spread(row)
            cells.append(_cell(number, text))
        body.append(cells)
    return _table(["Method", "Known", "Needs", *(n[0] for n in numbers)], {0, 1, 2}, body)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table of words and numbers; floats have three decimals, None is a dash."""
    body = []
    for row in rows:
        cells = []
        for place, value in enumerate(row):
            is_word = isinstance(value, str)
            number = None if is_word else plots.finite(value)
            text = f"{number:.3f}" if isinstance(value, float) and number is not None else value
            shown = DASH if number is None and not is_word else str(text)
            kind, tag = ("text" if is_word else ""), ("th" if place == 0 else "td")
            cells.append(_cell(value if is_word else number, shown, kind, tag=tag))
        body.append(cells)
    text = {place for place in range(len(columns)) if any(isinstance(r[place], str) for r in rows)}
    return _table(columns, text, body)


def name(row: Mapping[str, Any]) -> str:
    """Returns the method and its variant."""
    return " ".join(str(x) for x in (row["method"], row.get("variant")) if x)


def told(row: Mapping[str, Any]) -> str:
    """Says what a row was told; one merged model for all tasks can only miss the head."""
    kind = plots.protocol(row)
    if not row.get("bytes_per_task") and kind != "none":
        return "own head"
    return PROTOCOL[kind]


def _spread(row: Mapping[str, Any]) -> str:
    """Returns the standard deviation of the normalized accuracy over seeds, if there is one."""
    spread = plots.finite(row.get("normalized_accuracy_std"))
    return "" if spread is None else f" \N{PLUS-MINUS SIGN} {percent(spread, digits=2, sign='')}"


def percent(value: Any, *, digits: int = 1, sign: str = "%") -> str:
    """Formats a fraction as a percentage, and what is no number as a dash."""
    number = plots.finite(value)
    return DASH if number is None else f"{100 * number:.{digits}f}{sign}"


def bytes_or_dash(value: Any) -> str:
    """Formats a number of bytes, and what is no number as a dash."""
    number = plots.finite(value)
    return DASH if number is None else plots.bytes_text(number)


def escape(value: Any) -> str:
    """Returns the value as text that is safe in HTML and in quoted attributes."""
    return html.escape(str(value))


def _table(
    heads: Sequence[str], text: set[int], body: Sequence[Sequence[str]], foot: Sequence[str] = ()
) -> str:
    top = ""
    for i, head in enumerate(heads):
        kind = "text" if i in text else ""
        button = f'<button type="button">{escape(head)}</button>'
        top += f'<th scope="col" class="{kind}">{button}</th>'
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    end = f"<tfoot><tr>{''.join(foot)}</tr></tfoot>" if foot else ""
    table = f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody>{end}</table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _cell(value: Any, text: str, kind: str = "", *, tag: str = "td") -> str:
    data = "" if value is None else escape(value)
    scope = ' scope="row"' if tag == "th" else ""
    return f'<{tag}{scope} class="{kind}" data-value="{data}">{escape(text)}</{tag}>'
