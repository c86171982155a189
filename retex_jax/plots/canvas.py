"""The blank figure, its way to SVG text, and the words and colours that all figures share.

matplotlib is imported when the first figure is drawn, and nothing of its global state is changed.
The colours are those of Okabe and Ito (2008), which readers with any common colour deficiency can
tell apart.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

WIDTH = 360.0  # points
INK, MUTED, GRID = "#1f2933", "#52606d", "#d9dee4"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A7A7A")
BARS = ("#A3ADB8", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
PROTOCOLS = {  # marker, label, horizontal shift in points: rows of one artefact cost the same bytes
    "known": ("o", "task known", -4.0),
    "head": ("D", "routed, own head", 0.0),
    "none": ("s", "nothing known", 4.0),
}
_KEPT = ("backend", "backend_fallback", "interactive", "toolbar")
_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "retex_jax",
}


def check_available() -> None:
    """Checks that figures can be drawn, so that a program can say so before it starts long work.

    Raises:
      ImportError: if matplotlib cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "figures need matplotlib: pip install 'retex_jax[plots]'"
        raise ImportError(message) from error


def finite(value: Any) -> float | None:
    """Returns a number as a float, and None for whatever else: None, NaN, infinity, text."""
    known = isinstance(value, (int, float, np.number)) and math.isfinite(value)
    return float(value) if known else None


def bytes_text(count: float) -> str:
    """Formats a number of bytes in decimal units (1 MB = 10**6 bytes), such as "1.25 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000.0
    digits = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    text = f"{count:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


def seconds_text(seconds: float) -> str:
    """Formats a duration in seconds: "0.42 s", "12.3 s", "2 min 05 s", "1 h 02 min"."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60:02d} min"


def protocol(row: Mapping[str, Any]) -> str:
    """Says what a row of results.json was told: the task ("known"), only the "head", or "none"."""
    if row.get("task_known"):
        return "known"
    return "head" if row.get("head_known") else "none"


@contextmanager
def figure(height: float) -> Iterator[Any]:
    """Yields a figure of standard width and a height in points, under this module's settings."""
    check_available()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        defaults = matplotlib.rcParamsDefault
        matplotlib.rcParams.update({k: v for k, v in defaults.items() if k not in _KEPT} | _RC)
        fig = Figure((WIDTH / 72, max(height, 60.0) / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(fig)
        fig.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)
        yield fig


def to_svg(fig: Any, title: str) -> str:
    """Returns the figure as one SVG element with ids of its own, without prolog and metadata."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S
    )
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    prefix = "f" + hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
    name = html.escape(title)
    text = text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1).strip()
    return re.sub(r"\n\s*\n+", "\n", text)


def percent_axis(axis: Any) -> None:
    """Labels an axis of fractions with percentages at round numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))


def short(text: str, limit: int = 18) -> str:
    """Cuts a text to `limit` characters, the last of them an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def raise_all(problems: Sequence[str]) -> None:
    """Raises one ValueError that names all problems, if there is any."""
    if problems:
        raise ValueError("; ".join(problems))
