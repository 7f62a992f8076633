"""Starts the project's entry points under torchrun, as a user does, and ends them: for tests."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from patience import patience, until
from split_ranks import rank_context

ROOT = Path(__file__).resolve().parents[2]


class Launch:
    """`torchrun --nproc-per-node n --max-restarts m -m module words...`, its output in a file.

    `cold`: by torchrun's command line, each process of which imports everything anew, for ten seconds of a
    core. Without, torchrun's agent and its ranks are forks of a process that has done so. Such agents may
    stand for several `machines`, which meet at an address.
    """

    def __init__(
        self,
        module: str,
        nproc: int,
        words: Sequence[object],
        log: Path,
        *,
        cold: bool = False,
        max_restarts: int = 0,
        machines: int = 1,
        meeting: str = "localhost:0",
    ) -> None:
        self.log = log
        given = module, list(map(str, words))
        if machines == 1 and (cold or rank_context().get_start_method() == "spawn"):
            self.process: Any = _command_line(nproc, max_restarts, *given, log)
        else:
            self.process = _Forked((nproc, max_restarts, machines, meeting, *given, log, dict(os.environ)))

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """The ranks, once torchrun has started them."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> int:
        """The exit status. Ends everything and raises AssertionError where patience ends first."""
        try:
            return self.process.wait(patience())
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {patience()} s:\n{self.output[-4000:]}") from None

    def succeed(self) -> Launch:
        status = self.wait()
        assert status == 0, f"exit status {status}:\n{self.output[-6000:]}"
        return self

    def wait_until(self, condition: Callable[[], bool]) -> None:
        try:
            until(lambda: condition() or self.process.poll() is not None)
            assert condition(), "it has ended"
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}:\n{self.output[-4000:]}") from None

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
        self.process.wait(patience())
        psutil.wait_procs(family, timeout=patience())


def _command_line(
    nproc: int, max_restarts: int, module: str, words: list[str], log: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), "--max-restarts", str(max_restarts), "-m", module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


class _Forked:
    """What the tests use of `subprocess.Popen`, of a fork of the server that forks ranks."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        given[-2].touch()  # the log
        self._process = rank_context().Process(target=_agent, args=given)
        self._process.start()
        self.pid: int = self._process.pid
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("torchrun", seconds)
        return int(self._process.exitcode)


def _agent(
    nproc: int,
    max_restarts: int,
    machines: int,
    meeting: str,
    module: str,
    words: list[str],
    log: Path,
    environment: Mapping[str, str],
) -> None:
    """What torchrun's command line does once it has read its words."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=nproc,
        run_id=f"{os.getpid()}" if machines == 1 else meeting,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting,
        local_addr=None if machines == 1 else "127.0.0.1",
        max_restarts=max_restarts,
        start_method="fork",
    )
    elastic_launch(config, _rank)(module, words)


def _rank(module: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
