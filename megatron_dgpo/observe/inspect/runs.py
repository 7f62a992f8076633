"""Which runs a folder holds, how far they are, and which paths of it may be read."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_dgpo.observe import jsonl, metrics

T = TypeVar("T")

DEPTH = 6
"""Levels below the runs folder that are looked at; a run of the quick start is three below."""
MOST_FOLDERS = 20_000
"""Folders that are looked at in one search: somebody may give the root of a disk."""
_TAIL = 1 << 16
"""Bytes of a metrics file's end in which its last rows are looked for; a row has about 2,000."""
_LATELY = 60.0
"""Seconds since the last line of metrics after which a run that holds no lock to be seen counts as
stopped; three times its last step's where that is longer."""
_LONGEST_NAME = 1000


class Refused(Exception):
    """What a client asked for is not handed out; `status` is HTTP's."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Found:
    """A run's place: `name` is its path below the runs folder, "." for that folder itself."""

    name: str
    folder: Path


class RunsFolder:
    """The folder that the inspector shows; nothing outside of it is read.

    Raises ValueError where it is no folder or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            self.root = Path(folder).resolve(strict=True)
            next(os.scandir(self.root), None)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ValueError(f"{folder}: not a folder of runs: {why}") from None

    def search(self) -> tuple[list[Found], bool]:
        """All runs (folders with config.toml and metrics.jsonl), and whether the search was cut short
        after `MOST_FOLDERS` folders. Links are not followed, nor are runs looked for inside of runs."""
        found: list[Found] = []
        level, looked = [self.root], 0
        for _ in range(DEPTH + 1):
            below: list[Path] = []
            for folder in level:
                looked += 1
                if looked > MOST_FOLDERS:
                    return found, True
                if _is_run(folder):
                    name = folder.relative_to(self.root).as_posix()
                    if _can_be_sent(name):
                        found.append(Found(name, folder))
                else:
                    below += _folders_in(folder)
            level = below
        return found, False

    def run(self, name: str) -> Found:
        """The run of a name that a client sent.

        Raises Refused: 400 for what no run can be named, 403 for a path that leads out, 404 where no run is.
        """
        if len(name) > _LONGEST_NAME:
            raise Refused(400, f"run: a name has at most {_LONGEST_NAME} characters, not {len(name)}")
        if not name or not _can_be_sent(name) or any(ord(c) < 32 for c in name):
            raise Refused(400, "run: the path of a run below the runs folder is wanted")
        parts = name.split("/") if name != "." else []
        if name.startswith("/") or ".." in parts:
            raise Refused(403, "run: a path that leads out of the runs folder")
        # "a//b" and "a/./b" name no run: every run has one name.
        if any(part in ("", ".") for part in parts) or len(parts) > DEPTH:
            raise Refused(404, f"run: there is no run {name!r}")
        folder = self.root.joinpath(*parts)
        missing = f"run: there is no run {name!r}"
        try:
            self.inside(folder, missing)
            found = _is_run(folder)
        except OSError:
            found = False
        if not found:
            raise Refused(404, missing)
        return Found(name, folder)

    def inside(self, path: Path, missing: str = "it is not there") -> Path:
        """The path, if what it names lies in the runs folder with no link on the way.

        Raises Refused with status 403, or 404, saying `missing`, where there is nothing."""
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle
            raise Refused(404, missing) from None
        if real != path:
            raise Refused(403, f"{path.name}: links are not followed")
        return path


def _can_be_sent(name: str) -> bool:
    """Whether a name is text (file names may be any bytes) that the page can send back."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name and "\\" not in name


def _is_run(folder: Path) -> bool:
    return all(_is_plain(folder / name) for name in ("config.toml", metrics.FILE))


def _is_plain(path: Path) -> bool:
    """A regular file that is no link: opening it neither blocks nor leaves the folder."""
    return path.is_file() and not path.is_symlink()


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                folder / entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
    except OSError:  # gone meanwhile, or not ours to read
        return []


# --- how far a run is -------------------------------------------------------------------------------


def summary(run: Found, held: set[tuple[int, int]], now: float | None = None) -> dict[str, Any]:
    """A run's line in the list.

    Args:
        held: Of `held_locks`.
        now: Seconds since the epoch; the present by default.

    Returns:
        name; state ("running", "finished" or "stopped"); updated (seconds since the epoch); step, steps
        (those it is to make), reward and evaluation (each None where there is none); problem (None, or
        what cannot be read).

    Raises OSError where the run is gone.
    """
    path = run.folder / metrics.FILE
    updated = path.stat().st_mtime
    rows, problem = _last_rows(path)
    train = next((row for row in rows if row.get("phase") == "train"), {})
    evaluation = next((row for row in rows if row.get("phase") == "eval"), {})
    steps, trouble = _steps(run.folder / "config.toml")
    step = max((row["step"] for row in rows), default=None)
    pause = max(_LATELY, 3 * _number(train, "time/step", 0.0))
    if _is_held(run.folder / ".lock", held):
        state = "running"
    elif steps is not None and step is not None and step >= steps:
        state = "finished"
    else:
        state = "running" if (time.time() if now is None else now) - updated < pause else "stopped"
    scores = [name for name in evaluation if name.startswith("avg@")]
    return {
        "name": run.name,
        "state": state,
        "updated": updated,
        "step": step,
        "steps": steps,
        "reward": _number(train, "reward", None),
        "evaluation": {n: v for n in scores if (v := _number(evaluation, n, None)) is not None} or None,
        "problem": trouble or problem,
    }


def _number(row: dict[str, Any], name: str, otherwise: T) -> float | T:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else otherwise


def _last_rows(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The rows at the end of a metrics file, the last one first, and what is wrong with a line there."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
        file.seek(start)
        lines = file.read(_TAIL).split(b"\n")
    # The first piece may be the end of a row, and the last one is the beginning of the next.
    pieces = lines[1 if start else 0 : -1]
    rows, problem = [], None
    for line in reversed(pieces):
        row = jsonl.parse(line)
        if row is not None and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            problem = f"{metrics.FILE} has a line that is no row of metrics"
    return rows, problem


def _steps(path: Path) -> tuple[int | None, str | None]:
    try:
        steps = tomllib.loads(path.read_text(encoding="utf-8")).get("train", {}).get("steps")
    except (ValueError, AttributeError, RecursionError) as error:
        return None, f"{path.name} cannot be read: {str(error).splitlines()[0]}"
    return (steps, None) if isinstance(steps, int) else (None, None)


def held_locks() -> set[tuple[int, int]]:
    """(device, inode) of the files that a process of this machine holds an exclusive flock on.

    They are read from the kernel's table: to try a lock would be to hold it for a moment, in which a
    run that starts would be refused its own folder. The set is empty where there is no such table, and
    lacks the locks of other machines and containers.
    """
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return set()
    return set(_parse_locks(lines))


def _parse_locks(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Of lines such as `1: FLOCK  ADVISORY  WRITE 26667 fe:00:2785766 0 EOF`."""
    for line in lines:
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK" or words[3] != "WRITE":  # "->" marks one that waits
            continue
        major, minor, inode = words[5].split(":")
        yield os.makedev(int(major, 16), int(minor, 16)), int(inode)


def _is_held(lock: Path, held: set[tuple[int, int]]) -> bool:
    try:
        status = lock.stat(follow_symlinks=False)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in held
