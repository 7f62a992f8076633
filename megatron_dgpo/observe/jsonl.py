"""JSON lines that survive a killed writer."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dgpo import jsontext

_SURROGATE = re.compile("[\ud800-\udfff]")


def dump(row: dict[str, Any]) -> str:
    """One line of strict JSON with its newline; NaN and infinities become null, and lone surrogates, which no
    file can hold, the replacement character."""
    line = json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n"
    return line if jsontext.lone_surrogate(line) is None else _SURROGATE.sub("\ufffd", line)


def strict(value: Any) -> Any:
    """The same with None for NaN and infinities, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return value


def parse(line: bytes) -> dict[str, Any] | None:
    """A line's object, made `strict`; None for anything else."""
    try:
        row = strict(jsontext.loads(line))
    except (
        ValueError,
        RecursionError,
    ):  # the latter: nested less deep than a parser takes, and still too deep
        return None
    return row if isinstance(row, dict) else None


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file. A last line without a newline was torn by a killed writer and is left out.

    Raises FileNotFoundError, and ValueError, naming file and line, for any other line that is no JSON
    object.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        row = parse(line)
        if row is None:
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:80]!r}")
        rows.append(row)
    return rows


def cut_torn_line(path: Path) -> None:
    """Cut the file off after its last newline; nothing happens where there is no file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end != len(content):
            file.truncate(end)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a whole file such that it exists complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(dump(row))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
