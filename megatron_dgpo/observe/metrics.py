"""Metrics of every step: JSON lines, and TensorBoard and W&B when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from megatron_dgpo.observe import jsonl
from megatron_dgpo.observe.wandb_run import WandbRun

Phase = Literal["train", "eval"]
FILE = "metrics.jsonl"
_MACHINE_PREFIXES = ("time/", "memory/")
_TIMINGS = {"tokens_per_second"}


def is_timing(name: str) -> bool:
    """Whether a metric depends on the machine: `time/...`, `memory/...` and `tokens_per_second`, with
    or without a prefix. All others of two equal runs are equal."""
    return name.startswith(_MACHINE_PREFIXES) or name.rsplit("/", 1)[-1] in _TIMINGS


def without_timings(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what differs between two equal runs."""
    return {name: value for name, value in row.items() if not is_timing(name)}


class MetricsWriter:
    """Appends to `metrics.jsonl` in the run's folder; for one rank only.

    A line is {"step": int, "phase": "train" | "eval", name: number, ...} and carries no wall-clock
    time of its own, so that a resumed run's file equals an uninterrupted one's but for the timings.
    A last line that a killed run tore is cut off on opening.

    Raises ImportError when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool, wandb: WandbRun | None = None) -> None:
        self._wandb = wandb
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / FILE
        self._tensorboard: Any = None
        if tensorboard:
            self._open_tensorboard(purge_step=None)
        jsonl.cut_torn_line(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], phase: Phase = "train") -> None:
        """Append one line and flush it. Values are numbers or one-element tensors; NaN and
        infinities are written as null."""
        row: dict[str, Any] = {"step": step, "phase": phase}
        for name, value in metrics.items():
            if name in ("step", "phase"):
                raise ValueError(f"a metric cannot be named {name!r}: the line's own field has that name")
            row[name] = value if type(value) is int else float(value)
        self._file.write(jsonl.dump(row))
        self._file.flush()
        if self._tensorboard is not None:
            for name in metrics:
                self._tensorboard.add_scalar(f"{phase}/{name}", row[name], step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(phase, step, {name: row[name] for name in metrics})

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Drop the lines that a run which resumes from `step` writes again: those of later steps, and
        the evaluation of `step` itself where that was not `evaluated` yet."""
        self._file.close()
        last = {"train": step, "eval": step if evaluated else step - 1}
        rows = jsonl.read(self._path)
        jsonl.write(self._path, [row for row in rows if row["step"] <= last[row["phase"]]])
        self._file = self._path.open("a", encoding="utf-8")
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._open_tensorboard(purge_step=step + 1)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_tensorboard(self, purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard output was asked for: install the tensorboard package") from error
        self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step)


def read_metrics(path: str | Path, phase: Phase | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file (or of the one in a run's folder), of one phase or all, in order.

    A value that was not finite comes back as NaN. Raises FileNotFoundError or ValueError as
    `jsonl.read` does.
    """
    path = Path(path)
    rows = jsonl.read(path / FILE if path.is_dir() else path)
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in rows
        if phase is None or row["phase"] == phase
    ]
