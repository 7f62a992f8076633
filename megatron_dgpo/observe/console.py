"""What a run shows on the terminal: one line a step, progress of slow phases, a summary."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from megatron_dgpo.progress import Bar, progress

COLUMNS: tuple[tuple[str, str, int, int], ...] = (
    ("reward", "reward", 6, 3),
    ("entropy", "ent", 5, 3),
    ("credit_effective_fraction", "eff", 5, 3),
    ("clip_fraction", "clip", 5, 3),
    ("grad_norm", "grad", 5, 3),
    ("response_length", "len", 5, 1),
    ("truncated", "cut", 4, 2),
    ("tokens_per_second", "tok/s", 6, 0),
    ("time/step", "sec", 4, 2),
)
"""(metric, label, width, most decimals) of a step's line. At 9999 steps it has 120 columns. The loss is not
among them: a group's advantages cancel, so that it is near 0 whatever happens."""


def set_up_logging(quiet: bool, rank: int) -> None:
    """The package's notes from rank 0 (unless quiet), everybody's warnings from every rank."""
    logging.basicConfig(format=f"[rank {rank}] %(message)s" if rank else "%(message)s", level=logging.WARNING)
    logging.getLogger("megatron_dgpo").setLevel(logging.INFO if rank == 0 and not quiet else logging.WARNING)


class Console:
    """Prints on rank 0 only. `quiet` leaves only results (the tables) and alerts."""

    def __init__(self, quiet: bool, rank: int) -> None:
        self._results = rank == 0
        self._chatty = rank == 0 and not quiet

    def log(self, message: str) -> None:
        if self._chatty:
            _print(message)

    def alert(self, message: str) -> None:
        """What must be seen in a log too."""
        if self._results:
            _print(message)

    def step_line(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """One aligned line with the metrics of `COLUMNS`; a metric that is not there shows as "-"."""
        cells = [f"step {step:{len(str(total))}d}/{total}"]
        for name, label, width, decimals in COLUMNS:
            cells.append(f"{label} {_number(metrics.get(name), width, decimals)}")
        self.log("  ".join(cells))

    def phase(
        self, name: str, total: int | None = None, unit: str = "", *, initial: int = 0
    ) -> AbstractContextManager[Bar]:
        """`progress` of a phase of the run; call `.update(n)` of what it gives."""
        return progress(name, total, unit, initial=initial, shown=self._chatty)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A titled table; the columns are the keys of all rows in order of appearance.

        Numbers are right-aligned, floats with four significant digits.
        """
        if not self._results:
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        body = [[_cell(row.get(name)) for name in names] for row in rows]
        widths = [max(map(len, column)) for column in zip(names, *body, strict=True)]
        numeric = [
            all(isinstance(row.get(n), (int, float)) or row.get(n) is None for row in rows) for n in names
        ]
        _print(f"\n{title}")
        for line in (names, ["-" * width for width in widths], *body):
            cells = (
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            )
            _print("  ".join(cells).rstrip())


def _number(value: float | None, width: int, decimals: int) -> str:
    """Right-aligned, with as many decimals as fit; wider where even none does."""
    if value is None:
        return "-".rjust(width)
    texts = (f"{value:.{n}f}" for n in range(decimals, 0, -1))
    return next((t for t in texts if len(t) <= width), f"{value:.0f}").rjust(width)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(text: str) -> None:
    tqdm.write(text, file=sys.stdout)  # keeps a progress bar below the text
    sys.stdout.flush()
