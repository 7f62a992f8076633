"""One self-contained file for a run, or for two side by side, that keeps to a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgpo.observe import credit_log, jsonl
from megatron_dgpo.observe.report import data, html, weights
from megatron_dgpo.observe.report.encode import LADDER, Precision
from megatron_dgpo.observe.report.rows import Pieces, Rows

_PROBES = 24
"""Responses that are encoded to guess which precision fits."""
_MARGIN = 0.98
"""Of the size that may be guessed: a wrong guess costs encoding all responses once more."""
_KEYS = ("a", "b")


@dataclass
class Report:
    """What `build` has made."""

    path: Path
    size: int
    """Bytes."""
    precision: Precision
    samples: int
    """Responses in it."""
    weight_error: float
    """Bound on how far any weight at its step's settings is from the recorded one, relative to itself."""
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, dict[int, int]] = field(default_factory=dict)
    """Run -> step -> responses that did not fit."""


@dataclass
class _Run:
    key: str
    path: Path
    overview: dict[str, Any]
    pieces: Pieces = field(default_factory=Pieces)
    chunks: list[str] = field(default_factory=list)
    weight_error: float = 0.0

    def places(self) -> list[tuple[Path, int]]:
        """(file, row) of each response."""
        samples, files = self.overview["samples"], self.overview["files"]
        return [
            (data.log_path(self.path, files[file]["step"], files[file]["replica"]), row)
            for file, row in zip(samples["file"], samples["row"], strict=True)
        ]


Progress = Callable[[str, int, int], None]
"""(what, done, of how many)"""


def build(
    runs: list[Path], out: Path, *, max_bytes: int, progress: Progress = lambda what, done, total: None
) -> Report:
    """Write the report of one run, or of two for comparison, to `out`, complete or not at all.

    The first precision of `LADDER` with which the file stays within `max_bytes` is taken; if none does,
    whole groups are left out, evenly over the run. Raises as `data.check_run` does; ValueError where
    `max_bytes` does not even hold the page without samples.
    """
    several = [_Run(key, path, data.overview(path)) for key, path in zip(_KEYS, runs, strict=False)]
    total = sum(len(run.places()) for run in several)
    _tell_apart(several)
    precision = _guess(several, max_bytes, progress)
    while True:
        done = 0
        for run in several:
            run.pieces, run.chunks, run.weight_error = Pieces(), [], 0.0
            for n, (rows, row) in enumerate(_responses(run)):
                run.chunks.append(html.chunk(f"{run.key}-{n}", rows.encode(row, precision, run.pieces)))
                run.weight_error = max(run.weight_error, _weight_error(rows, row, precision))
                done += 1
                progress("responses", done, total)
        coarser = LADDER.index(precision) + 1
        if _size(several, precision) <= max_bytes or coarser == len(LADDER):
            break
        precision = LADDER[coarser]
    left_out = _thin(several, precision, max_bytes)
    return _write(several, out, precision, left_out)


def _tell_apart(runs: list[_Run]) -> None:
    """Two folders of one name show their parents' too."""
    if len({run.overview["run"] for run in runs}) < len(runs):
        for run in runs:
            run.overview["run"] = "/".join(run.path.resolve().parts[-2:])


def _responses(run: _Run, only: set[int] | None = None) -> Iterator[tuple[Rows, int]]:
    """Each response's table and row, in the order of the overview; one file is in memory at a time."""
    opened: tuple[Path, Rows] | None = None
    for n, (path, row) in enumerate(run.places()):
        if only is None or n in only:
            if opened is None or opened[0] != path:
                table = credit_log.read(path)
                opened = path, Rows(table, credit_log.settings(table, path))
            yield opened[1], row


def _guess(runs: list[_Run], max_bytes: int, progress: Progress) -> Precision:
    """The first precision that should fit, from a few responses spread over each run."""
    probes: list[tuple[Rows, int]] = []
    tokens = 0
    for run in runs:
        lengths = run.overview["samples"]["length"]
        tokens += sum(lengths)
        if lengths:
            probes += _responses(run, {round(n) for n in np.linspace(0, len(lengths) - 1, _PROBES).tolist()})
    probed = sum(rows.length(row) for rows, row in probes)
    fixed = _size(runs, LADDER[0])
    for place, precision in enumerate(LADDER):
        progress("precision", place + 1, len(LADDER))
        pieces = Pieces()
        size = sum(len(html.chunk("a-0", rows.encode(row, precision, pieces))) for rows, row in probes)
        if fixed + size * tokens / max(1, probed) <= _MARGIN * max_bytes:
            return precision
    return LADDER[-1]


def _weight_error(rows: Rows, row: int, precision: Precision) -> float:
    credit = rows.credit(row)
    if credit is None or not any(precision.half_steps) or rows.settings.get("tau") is None:
        return 0.0
    return weights.error_bound(*credit, rows.settings, precision.half_steps)


def _thin(runs: list[_Run], precision: Precision, max_bytes: int) -> dict[str, dict[int, int]]:
    """Leave groups out until the file fits; what was left out, by run and step."""
    left_out: dict[str, dict[int, int]] = {}
    share = 1.0
    whole = [(run, dict(run.overview["samples"]), list(run.chunks)) for run in runs]
    while (size := _size(runs, precision)) > max_bytes:
        chunks = sum(len(chunk) for run in runs for chunk in run.chunks)
        if not chunks:
            raise ValueError(
                f"the page without any sample has {size:,} bytes, and it may have {max_bytes:,} of them"
            )
        share *= max(0.0, (max_bytes - (size - chunks)) / chunks) * 0.99
        for run, samples, parts in whole:
            left_out[run.overview["run"]] = _keep(run, samples, parts, share)
    return left_out


def _keep(run: _Run, samples: Mapping[str, list[Any]], chunks: list[str], share: float) -> dict[int, int]:
    """Keep this share of the groups, evenly spaced; returns step -> responses that went."""
    groups = list(dict.fromkeys(zip(samples["file"], samples["prompt"], strict=True)))
    kept = {group for i, group in enumerate(groups) if int((i + 1) * share) > int(i * share)}
    stays = [group in kept for group in zip(samples["file"], samples["prompt"], strict=True)]
    run.overview["samples"] = {
        name: [value for value, stay in zip(column, stays, strict=True) if stay]
        for name, column in samples.items()
    }
    inner = [chunk.partition(">")[2] for chunk, stay in zip(chunks, stays, strict=True) if stay]
    run.chunks = [
        f'<script type="application/octet-stream" id="{run.key}-{n}">{rest}' for n, rest in enumerate(inner)
    ]
    gone: dict[int, int] = {}
    for file, stay in zip(samples["file"], stays, strict=True):
        if not stay:
            step = run.overview["files"][file]["step"]
            gone[step] = gone.get(step, 0) + 1
    run.overview["left_out"] = {"samples": sum(gone.values()), "steps": gone}
    return gone


def _overview(run: _Run, precision: Precision) -> str:
    whole = {**run.overview, "precision": precision.describe(), "pieces": run.pieces.pairs()}
    text = jsonl.dump(whole)
    return html.chunk(f"{run.key}-overview", text.encode("utf-8", "replace"))


def _size(runs: list[_Run], precision: Precision) -> int:
    shell = sum(len(part.encode("utf-8")) for part in html.document(_title(runs), _source(runs)))
    return shell + sum(len(_overview(run, precision)) + sum(map(len, run.chunks)) for run in runs)


def _title(runs: list[_Run]) -> str:
    return " and ".join(run.overview["run"] for run in runs) + " · credit report"


def _source(runs: list[_Run]) -> dict[str, Any]:
    return {"kind": "embedded", "runs": [{} for _ in runs]}


def _write(runs: list[_Run], out: Path, precision: Precision, left_out: dict[str, dict[int, int]]) -> Report:
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            parts = (p for run in runs for p in (_overview(run, precision), *run.chunks))
            for part in html.document(_title(runs), _source(runs), parts):
                file.write(part)
        size = partial.stat().st_size
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return Report(
        path=out,
        size=size,
        precision=precision,
        samples=sum(len(run.chunks) for run in runs),
        weight_error=max(run.weight_error for run in runs),
        warnings=[warning for run in runs for warning in run.overview["warnings"]],
        left_out={name: steps for name, steps in left_out.items() if steps},
    )
