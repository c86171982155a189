"""Rows of published data sets: shards of parquet, lines of JSON, and what tensorflow-datasets prepared.

Only the rows and columns that are asked for become Python values. Nothing is downloaded.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Table(Protocol):
    """Rows by number; a row is a mapping from column to value."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> list[list[Any]]:
        """The values of each of the named columns, in the order of `rows`."""
        ...


class Rows:
    """A table of rows that lie somewhere as mappings, such as a data source of tensorflow-datasets."""

    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> list[list[Any]]:
        """The values of each of the named columns, in the order of `rows`."""
        chosen = [self._rows[int(row)] for row in rows]
        return [[_plain(row[column]) for row in chosen] for column in columns]


class Parquet:
    """The shards of a split."""

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]):
        """Looks at what the files hold.

        Args:
          paths: the files, in order.
          columns: those that will be asked for.

        Raises:
          ImportError: if pyarrow is not installed.
          ValueError: naming every file that is damaged or lacks a column.
        """
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(
                f"{paths[0]}: needs pip install 'retex_jax[language]' ({error})"
            ) from error
        self._paths, self._columns = paths, list(columns)
        self._length, problems = 0, []
        for path in paths:
            try:
                found = parquet.read_metadata(path)
            except (ValueError, OSError) as error:  # pyarrow's own are of these kinds
                problems.append(f"{path}: {error}")
                continue
            self._length += found.num_rows
            names = found.schema.to_arrow_schema().names
            if missing := [column for column in columns if column not in names]:
                problems.append(f"{path}: has the columns {names}, expected {missing} among them")
        if problems:
            raise ValueError("\n".join(problems))
        self._table: Any = None

    def __len__(self) -> int:
        return self._length

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> list[list[Any]]:
        """The values of each of the named columns, in the order of `rows`.

        Raises:
          ValueError: if a file is damaged.
        """
        if self._table is None:
            self._table = self._read()
        chosen = self._table.take(np.asarray(rows, np.int64))
        return [chosen[column].to_pylist() for column in columns]

    def _read(self) -> Any:
        from pyarrow import concat_tables, parquet

        tables = []
        for path in self._paths:
            try:
                tables.append(parquet.read_table(path, columns=self._columns))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path}: {error}") from error
        return concat_tables(tables, promote_options="permissive")


def read_json_lines(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads files of one JSON object a line.

    Raises:
      ValueError: naming the line that is none.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                rows.append(_object(line, f"{path}:{number}"))
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    """A value as Python has it: tensorflow-datasets gives arrays of no axis, and texts as bytes."""
    value = value.item() if isinstance(value, np.ndarray | np.generic) else value
    return value.decode("utf-8") if isinstance(value, bytes) else value
