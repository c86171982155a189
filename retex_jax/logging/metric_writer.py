"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases on demand."""

import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retex_jax.logging import terminal
from retex_jax.snapshot import parse_json

FILE = "metrics.jsonl"


class MetricWriter:
    """Appends rows of scalars; process 0 only, elsewhere every call does nothing."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        project: str = "retex_jax",
    ):
        """Opens <workdir>/metrics.jsonl for appending; half a line left by a kill is removed.

        Args:
          workdir: created if missing.
          tensorboard: also write event files to <workdir>/tensorboard, through tensorboardX.
          wandb: also log to Weights & Biases.
          project: its project.

        Raises:
          ImportError: if tensorboardX or wandb is asked for and isn't installed.
        """
        self._path = Path(workdir) / FILE
        self._lead = terminal.is_lead()
        self._board = self._run = None
        if not self._lead:
            return
        board = _import("tensorboardX", "tensorboard") if tensorboard else None
        wandb_module = _import("wandb", "wandb") if wandb else None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(drop=None)
        if board:
            self._board = board.SummaryWriter(str(self._path.parent / "tensorboard"))
        if wandb_module:
            self._run = wandb_module.init(project=project, dir=str(self._path.parent))

    def write(self, step: int, metrics: Mapping[str, Any], *, phase: str) -> None:
        """Writes one row: phase, step, time (Unix seconds), and the metrics.

        Args:
          step: step of the phase.
          metrics: name to scalar (Python, NumPy or jax); the file has null for NaN and infinity.
          phase: part of the run, such as "finetune/mnist".

        Raises:
          ValueError: if a metric isn't a scalar, or is called phase, step or time.
        """
        if not self._lead:
            return
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        row = {"phase": phase, "step": step, "time": round(time.time(), 3), **finite}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            if self._board:
                self._board.add_scalar(f"{phase}/{name}", value, step)
        if self._run:
            named = {f"{phase}/{name}": value for name, value in values.items()}
            self._run.log({**named, f"{phase}/step": step})

    def resume(self, step: int, *, phase: str) -> None:
        """Drops the rows of a phase at or after a step, which the resumed run will write again.

        Args:
          step: first step that will run again; 0 drops the whole phase.
          phase: rows of other phases stay.
        """
        if self._lead:
            self._rewrite(drop=(phase, step))

    def close(self) -> None:
        """Flushes and closes TensorBoard and Weights & Biases."""
        if self._board:
            self._board.close()
        if self._run:
            self._run.finish()
        self._board = self._run = None

    def _rewrite(self, *, drop: tuple[str, int] | None) -> None:
        """Replaces the file by its whole rows, less those to drop; does nothing if all stay."""
        if not self._path.exists():
            return
        lines = self._path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _stays(line, drop)]
        if kept != lines:
            beside = self._path.with_name(f".{FILE}.tmp")
            beside.write_text("".join(kept), "utf-8")
            os.replace(beside, self._path)


def _stays(line: str, drop: tuple[str, int] | None) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        row = parse_json(line)
    except ValueError:
        return False
    if not isinstance(row, dict) or "phase" not in row or not isinstance(row.get("step"), int):
        return False
    return not (drop and row["phase"] == drop[0] and row["step"] >= drop[1])


def _scalar(name: str, value: Any) -> bool | int | float:
    if name in ("phase", "step", "time"):
        raise ValueError(f"metrics: {name!r} is the name of a column already")
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise ValueError(f"metrics: {name!r} is {value!r}, expected a scalar")
    return value


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{extra}=True needs {module}: pip install 'retex_jax[{extra}]'"
        ) from error
