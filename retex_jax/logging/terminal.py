"""Messages on stderr and tables on stdout."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 200  # columns of a table that isn't shown on a terminal

# Both look up sys.stderr and sys.stdout anew at each print.
stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def is_lead() -> bool:
    """Tells whether this is process 0, without starting a backend before jax.distributed has."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def info(message: str) -> None:
    """Writes a message to stderr, above a progress bar if there is one."""
    if is_lead():
        stderr.print(Text(message), soft_wrap=True)


def warning(message: str) -> None:
    """Writes a message to stderr, marked as a warning."""
    if is_lead():
        stderr.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def format_value(value: Any) -> str:
    """Returns floats (and scalar arrays) with three decimals or digits, None as "-"."""
    if value is None:
        return "-"
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = value.item()
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table to stdout, in plain ASCII lines when piped.

    Args:
      title: shown above.
      columns: headings.
      rows: one value a column; columns of numbers are right-aligned, None is shown as "-".

    Raises:
      ValueError: if a row has another number of values than there are columns.
    """
    wrong = [index for index, row in enumerate(rows) if len(row) != len(columns)]
    if wrong:
        raise ValueError(f"rows: {wrong} don't have one value for each of the columns {columns}")
    if not is_lead():
        return
    piped = not stdout.is_terminal
    box = rich.box.ASCII2 if piped else rich.box.ROUNDED
    grid = Table(title=Text(title), title_justify="left", box=box)
    for index, column in enumerate(columns):
        values = [row[index] for row in rows if row[index] is not None]
        numeric = bool(values) and all(isinstance(v, int | float | np.number) for v in values)
        grid.add_column(Text(column), justify="right" if numeric else "left")
    for row in rows:
        grid.add_row(*(Text(format_value(value)) for value in row))
    console = Console(highlight=False, width=PIPED_WIDTH) if piped else stdout
    console.print(grid)
