"""Runs of other programs, each with its log and a limit of time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class RunFailed(Exception):
    """A run that ended badly or took too long; the message names its log."""


def run(
    command: Sequence[str], log: Path, threads: int, timeout: float, more: Mapping[str, str] | None = None
) -> str:
    """Run to the end and return stdout; stderr goes to the log. `more` adds to the environment. Raises
    RunFailed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **(more or {})}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=timeout)
        except BaseException as error:  # an interrupt, too, must not leave the ranks behind
            end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RunFailed(f"took longer than {timeout:.0f} s; see {log}") from None
            raise
    if process.returncode:
        raise RunFailed(f"exit status {process.returncode}; see {log}")
    return out


def end(process: subprocess.Popen[str]) -> None:
    """torchrun ends its ranks, which have sessions of their own, when it is asked to end itself."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
