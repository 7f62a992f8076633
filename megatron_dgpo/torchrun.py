"""Ranks and the torchrun above them: how they end with it, and are started again by it (`--max-restarts`).

torchrun's agent, the parent of a machine's ranks, restarts whatever fails, whatever its exit status. A start
that would fail again is prevented by ending the agent: it takes SIGTERM as the wish to stop.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

FOLDER = "failures"
"""In the run's folder: what ended each rank of the present launch, and why no more restarts follow."""
_ENDED = "ended.json"
_SAME_ERRORS = 2
"""An error of the rank's own that occurs so many times in a row after the same step ends the run."""
_SAME_LOSSES = 3
"""The same, for a rank that lost others. What ended those is not known: a machine may fail twice."""
_step: int | None = None


def number() -> int:
    """How many times torchrun has started this machine's ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def left() -> int:
    """How many times it may start them again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - number()


def launch() -> str:
    """Names the agent that started this process, among all that there ever were; "" without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"{socket.gethostname()} {os.getppid()} {start_time(os.getppid())}"


def began_here(lock: Path) -> bool:
    """Whether the present launch began the run whose `claim`ed file this is, so that it goes on with it
    though nobody has said --resume. Ranks other than 0 have their machine's agent, which may not be in the
    file, and go by torchrun's count."""
    if os.environ.get("RANK", "0") != "0":
        return number() > 0
    try:
        return bool(launch()) and lock.read_text() == launch()
    except OSError:
        return False


def end_agent() -> None:
    """Have torchrun end this machine's ranks and itself, where it would start them again otherwise.

    Does nothing where the parent would not notice (it has no handler of SIGTERM, as torchrun's agent has).
    """
    if launch() and left() > 0 and _catches_sigterm(os.getppid()):
        os.kill(os.getppid(), signal.SIGTERM)


def start_time(pid: int) -> str:
    """Of a process; with its number it names that process and no later one. "" where there is none."""
    try:  # the fields after the name, which may hold anything: the 22nd of all, in ticks since the boot
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        return ""


def _catches_sigterm(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


# --- processes that end together ----------------------------------------------------------------------


def end_with_agent() -> None:
    """Get SIGTERM when torchrun dies: a rank that outlives it would write into a folder that a resumed
    run uses. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux" and launch():
        _signal_when_parent_ends(signal.SIGTERM)


def end_with_parent() -> None:
    """Of a process that was forked: end when its parent does, at once where it has already."""
    _signal_when_parent_ends(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def _signal_when_parent_ends(number: int) -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


# --- ranks that find each other ---------------------------------------------------------------------

_MEETING = "megatron_dgpo/meeting"
_POLL_SECONDS = 0.02


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...


def meet(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name for this start of the ranks, new in the store and the same on all of them; collective.

    torchrun's agent keeps one store for all of its starts, and the addresses that earlier ranks left in it
    are dead. Its count of restarts does not do for a name: every machine has its own count. So each rank asks
    under a token of its own, rank 0 answers, and goes on once the rank behind every latest token has its
    answer. What the dead have asked is answered too, and read by nobody.

    Raises:
        TimeoutError: where a rank does not come.
    """
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"{_MEETING}/asks/{rank}", token)
        name = store.get(f"{_MEETING}/answer/{token}").decode()
        store.set(f"{_MEETING}/has/{token}", name)
        return name
    name = f"start_{store.add(f'{_MEETING}/starts', 1)}"
    deadline = time.monotonic() + timeout_seconds
    answered: set[str] = set()
    while missing := [r for r in range(1, world_size) if not _has_met(store, r, name, answered)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} did not come in {timeout_seconds:g} s")
        time.sleep(_POLL_SECONDS)
    return name


def _has_met(store: Store, rank: int, name: str, answered: set[str]) -> bool:
    """Answer a rank's latest token, unless that is done; whether it has the answer."""
    asks = f"{_MEETING}/asks/{rank}"
    if not store.check([asks]):
        return False
    token = store.get(asks).decode()
    if token not in answered:
        store.set(f"{_MEETING}/answer/{token}", name)
        answered.add(token)
    has = f"{_MEETING}/has/{token}"
    return store.check([has]) and store.get(has).decode() == name


# --- what ended the starts before -------------------------------------------------------------------


def reached(step: int) -> None:
    """Note how many steps the run has completed: an error that comes back is told by where it happens."""
    global _step
    _step = step


def forget(folder: Path) -> None:
    """A new launch begins in this run folder."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def ended(folder: Path) -> str:
    """Why the launch is not to start again; "" where it may."""
    try:
        return str(json.loads((folder / FOLDER / _ENDED).read_text())["why"])
    except (OSError, ValueError, KeyError):
        return ""


def failures(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What ended this rank in earlier starts of the launch, oldest first."""
    try:
        return [json.loads(line) for line in _file(folder, rank).read_text().splitlines()]
    except (OSError, ValueError):
        return []


def note_failure(folder: Path, rank: int, error: BaseException, *, lost: bool) -> str:
    """Write down what ends this rank, and give the reason not to start the run again; "" where there is none.

    Args:
        lost: the error says that other ranks are gone, and not what ended them.
    """
    if not launch():
        return ""
    row: dict[str, Any] = {"step": _step, "error": type(error).__name__, "lost": lost}
    rows = [*failures(folder, rank), row | {"message": str(error)[:2000], "time": time.time()}]
    try:
        _file(folder, rank).parent.mkdir(parents=True, exist_ok=True)
        with _file(folder, rank).open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    except OSError:  # a full disk, say, may be what ended it
        return ""
    same = _SAME_LOSSES if lost else _SAME_ERRORS
    if left() <= 0 or len(rows) < same or any(not _matches(r, row) for r in rows[-same:]):
        return ""
    where = "before the first step" if _step is None else f"after step {_step}"
    what = "ranks were lost" if lost else row["error"]
    why = f"{what} {where}, {same} times in a row: torchrun does not start the run again"
    (folder / FOLDER / _ENDED).write_text(json.dumps({"why": why}))
    return why


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank_{rank}.jsonl"


def _matches(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    kind = "lost" if wanted["lost"] else "error"
    return all(row.get(key) == wanted[key] for key in ("step", "lost", kind))
