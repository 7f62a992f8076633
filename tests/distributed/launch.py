"""Starts the project's entry points under torchrun, as a user does, and ends them: for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240.0


class Launch:
    """`torchrun --nproc-per-node n -m module words...`, its output in a file."""

    def __init__(self, module: str, nproc: int, words: Sequence[object], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc), "-m", module, *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """The ranks, once torchrun has started them."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """The exit status. Ends everything and raises AssertionError after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-4000:]}") from None

    def succeed(self) -> Launch:
        status = self.wait()
        assert status == 0, f"exit status {status}:\n{self.output[-6000:]}"
        return self

    def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended, or waited in vain:\n{self.output[-4000:]}")
            time.sleep(0.02)

    def terminate_workers(self) -> None:
        """SIGTERM to every rank, as a cluster's scheduler sends it."""
        for worker in self.workers():
            worker.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to torchrun and everything under it, at once."""
        family = []
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()
        psutil.wait_procs(family, timeout=30)
