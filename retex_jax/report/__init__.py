"""Writes the report of a run: one HTML page that needs no network and no other file.

The page holds the headline numbers, accuracies per task, every result row, the figures of
`retex_jax.plots` as inline SVG, and the configuration. Its style and its few lines of script
(sorting the tables) are inline, and a content security policy forbids everything else. All text
that comes from the results is escaped.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retex_jax import files
from retex_jax.report.page import Section, render

__all__ = ["Section", "write"]


def write(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    *,
    spectra: Mapping[str, np.ndarray] | None = None,
    confusion: Sequence[tuple[str, np.ndarray]] = (),
    seconds: Mapping[str, float] | None = None,
    config_text: str = "",
    sections: Sequence[Section] = (),
) -> Path:
    """Writes the report of one run as a self-contained HTML page.

    Args:
      path: where the page goes; its folder is made if missing. A page that is there is replaced in
        one step.
      results: the content of results.json, schema 1. "tasks", "individual" and "rows" must be
        there; whatever else is missing, None or not finite is shown as a dash or left out.
      spectra: name of a leaf or group -> singular values of its offsets [k], not squared, largest
        first (see `plots.spectra`).
      confusion: pairs of a title and counts [T, T] (row = true task, column = identified task), in
        the order of results["tasks"].
      seconds: phase -> wall-clock seconds.
      config_text: the configuration as text.
      sections: further parts, before the figures.

    Returns:
      The path of the page.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if the schema is not 1, a key is missing, there is no task, a row has no "method"
        or "accuracy", or a figure's data is malformed. Nothing is written then.
    """
    problems = (
        [] if results.get("schema") == 1 else [f"schema = {results.get('schema')!r}, expected 1"]
    )
    problems += [
        f"results: {key!r} is missing"
        for key in ("tasks", "individual", "rows")
        if key not in results
    ]
    for i, row in enumerate(results.get("rows", ())):
        problems += [
            f"rows[{i}]: {key!r} is missing" for key in ("method", "accuracy") if key not in row
        ]
    if problems:
        raise ValueError("; ".join(problems))
    page = render(results, spectra or {}, confusion, seconds or {}, config_text, sections)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return path
