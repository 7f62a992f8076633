"""What a JSON-lines file has that its reader does not know yet."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_dgpo.observe import jsonl

START = "0-00000000"
"""The cursor of who knows nothing."""
_CURSOR = re.compile(r"([0-9]{1,18})-([0-9a-f]{8})")
_MARK = 4096
"""Bytes before a cursor's place by which the file is recognised."""
MOST_BYTES = 8 << 20
"""Of a file that one answer reads; the rest comes with the next."""


@dataclass(frozen=True)
class News:
    """`restart`: what the reader knew is no longer what the file says (a resumed run drops the lines that it
    writes again), and `rows` begin at its beginning. `more`: there is more than these rows. `problems` names
    lines that are left out."""

    rows: list[dict[str, Any]]
    cursor: str
    restart: bool
    more: bool
    problems: list[str]


def read(path: Path, cursor: str) -> News:
    """The rows after a cursor, up to the last whole line: the writer may be in the middle of one.

    A cursor is "offset-checksum": bytes known, up to the end of a line, and the CRC-32 of the last
    4,096 of them. A file that is missing is an empty one.

    Raises ValueError for what is no cursor.
    """
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise ValueError(f"a cursor looks like {START}, not {cursor[:40]!r}")
    offset, known = int(match[1]), match[2]
    try:
        with path.open("rb") as file:
            restart = _checksum(file, offset) != known
            if restart:
                offset = 0
            return _rows(file, path.name, offset, restart)
    except FileNotFoundError:
        return News([], START, restart=offset > 0, more=False, problems=[])


def _rows(file: IO[bytes], name: str, offset: int, restart: bool) -> News:
    file.seek(offset)
    content = file.read(MOST_BYTES)
    end, full = content.rfind(b"\n") + 1, len(content) == MOST_BYTES
    problems = []
    if end == 0 and full:  # a line larger than an answer: it is passed over, piece by piece
        end = len(content)
        problems.append(f"{name}: a line of more than {MOST_BYTES:,} bytes is left out")
        content = b""
    rows = []
    for line in content[:end].split(b"\n")[:-1]:
        row = jsonl.parse(line)
        if row is not None and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            problems.append(f"{name}: a line is left out, since it is no row with a step: {line[:40]!r}")
    size = file.seek(0, os.SEEK_END)
    cursor = _cursor(file, offset + end)
    more = full and size - offset - end > 0
    return News(rows, cursor, restart, more, problems[:20])


def _cursor(file: IO[bytes], offset: int) -> str:
    """One that no file has where it was cut off meanwhile, so that the next answer is a restart."""
    return f"{offset}-{_checksum(file, offset) or 'ffffffff'}"


def _checksum(file: IO[bytes], offset: int) -> str | None:
    """Of the bytes before a place; None where the file has fewer than that."""
    if offset > file.seek(0, os.SEEK_END):
        return None
    start = max(0, offset - _MARK)
    file.seek(start)
    content = file.read(offset - start)
    return f"{zlib.crc32(content):08x}" if len(content) == offset - start else None


def end(path: Path) -> str:
    """The cursor of who knows all whole lines that a file has now."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while size:
                start = max(0, size - _MARK)
                file.seek(start)
                newline = file.read(size - start).rfind(b"\n")
                if newline >= 0:
                    offset = start + newline + 1
                    return _cursor(file, offset)
                size = start
    except FileNotFoundError:
        pass
    return START
