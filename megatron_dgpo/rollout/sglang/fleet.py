"""The servers of a run: started on rank 0's machine, or given by URL; the same list on every rank."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_dgpo import platform
from megatron_dgpo.config import SGLangConfig
from megatron_dgpo.rollout.sglang.servers import (
    ServerFailed,
    ServerProcess,
    check_nccl,
    check_server,
    stop_servers,
    workers_of_router,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

_ASK_SECONDS = 5.0
"""How long a server that was dropped may take to say what it serves; all ranks wait."""


class FleetLost(RuntimeError):
    """No server is left, or one cannot be started; the same on every rank."""


class Fleet:
    """Built, changed and closed by all ranks together; rank 0 acts and tells the others.

    Args:
        model_path: Hugging Face folder that managed servers start from, and given ones must match.
        dtype: of managed servers: the trainer's.
        log_folder: where managed servers' logs go.

    Raises:
        FleetLost: on every rank, where a server does not come up or serves another model.
    """

    def __init__(
        self,
        config: SGLangConfig,
        groups: platform.Groups,
        *,
        model_path: Path,
        dtype: str,
        log_folder: Path,
    ) -> None:
        self._config = config
        self._groups = groups
        self._model_path = model_path
        self._dtype = dtype
        self._log_folder = log_folder
        self._managed = config.managed
        self._processes: dict[int, ServerProcess] = {}
        self._restarts_left = config.launch.max_restarts
        self._dropped: dict[str, int] = {}
        """Servers given by URL that were dropped, and how often they may still come back; on every rank."""
        self.id: str
        """Different for every run, so that process groups of two runs have different names."""
        self.ranks: dict[str, int]
        """URL of each server -> its tensor-parallel size."""
        self.id, self.ranks = self._everywhere(lambda: (uuid.uuid4().hex[:8], self._open()))

    def exited(self) -> dict[str, str]:
        """Managed servers whose process has ended, by URL; on rank 0."""
        return {p.url: p.death() for p in self._processes.values() if not p.is_alive()}

    def replace(self, dead: Mapping[str, str]) -> None:
        """Start managed servers again, drop the others. `dead`: URL -> why; the same on every rank.

        Raises FleetLost on every rank when none is left.
        """
        before = set(self.ranks)
        self.ranks = self._everywhere(lambda: self._replaced(dead))
        if not self._managed:
            for url in before - set(self.ranks):
                self._dropped.setdefault(url, self._config.launch.max_restarts)

    def take_back(self) -> list[str]:
        """Of the servers given by URL that were dropped, those that answer again and serve the model: they
        are in `ranks` from now on, and have to be given weights. The same on every rank.

        Behind a router none comes back: it was taken out there.
        """
        if self._config.router or not any(self._dropped.values()):
            return []
        back = self._everywhere(self._back)
        for url in back:
            self._dropped[url] -= 1
        self.ranks |= back
        return list(back)

    def _back(self) -> dict[str, int]:
        found = {}
        for url in [u for u, left in self._dropped.items() if left and u not in self.ranks]:
            try:
                found[url] = check_server(url, self._model_path, timeout=_ASK_SECONDS)
            except ServerFailed as error:
                log.info("SGLang server %s stays dropped: %s", url, error)
            else:
                log.warning("SGLang server %s answers again, and gets the weights", url)
        return found

    def close(self) -> None:
        """End the servers that this process started."""
        stop_servers(self._processes.values())
        self._processes.clear()

    def _everywhere(self, action: Callable[[], T]) -> T:
        """What the action gives on rank 0, on every rank; its failure too."""
        outcome: tuple[Any, str | None] | None = None
        cause: Exception | None = None
        if self._groups.rank == 0:
            try:
                outcome = action(), None
            except Exception as error:
                self.close()
                outcome, cause = (None, str(error)), error
        value, message = platform.gather_objects(outcome, self._groups.world)[0]
        if message is not None:
            raise FleetLost(message) from cause
        return value

    def _open(self) -> dict[str, int]:
        if self._config.router or self._config.urls:
            urls = workers_of_router(self._config.router) if self._config.router else self._config.urls
            return {url: check_server(url, self._model_path) for url in urls}
        numbers = range(self._config.launch.count)
        for n in numbers:
            self._start(n)
        if platform.has_gpu() and not self._config.colocate:  # while they load
            check_nccl(self._config.launch.python, ".".join(map(str, torch.cuda.nccl.version())))
        return dict(self._ready(n) for n in numbers)

    def _start(self, number: int) -> None:
        """A server's process; its number chooses devices and log file."""
        self._processes[number] = ServerProcess(
            self._model_path,
            self._config.launch,
            number=number,
            dtype=self._dtype,
            log_file=self._log_folder / f"server_{number}.log",
            colocate=self._config.colocate,
        )

    def _ready(self, number: int) -> tuple[str, int]:
        """URL and tensor-parallel size, once it answers."""
        process, launch = self._processes[number], self._config.launch
        process.wait_ready(launch.startup_timeout_seconds)
        check_server(process.url, self._model_path)
        return process.url, launch.tensor_parallel_size

    def _started_again(self, numbers: Sequence[int]) -> tuple[dict[str, int], list[str]]:
        """Of these servers, started side by side, those that came up; and why the others did not."""
        failures: dict[int, str] = {}
        for n in numbers:
            try:
                self._start(n)
            except ServerFailed as error:
                failures[n] = str(error)
        up: dict[str, int] = {}
        for n in numbers:
            if n in failures:
                continue
            try:
                up |= [self._ready(n)]
            except ServerFailed as error:
                failures[n] = str(error)
                self._processes.pop(n).stop()
        return up, list(failures.values())

    def _replaced(self, dead: Mapping[str, str]) -> dict[str, int]:
        left = {url: size for url, size in self.ranks.items() if url not in dead}
        again = []
        ended = {n: process for n, process in self._processes.items() if process.url in dead}
        stop_servers(ended.values())
        for n, process in ended.items():
            del self._processes[n]
            if self._restarts_left:
                self._restarts_left -= 1
                log.warning("starting SGLang server %s again (%s)", process.url, dead[process.url])
                again.append(n)
            else:
                log.warning("SGLang server %s stays dead: no restarts are left", process.url)
        for url in dead:
            if not self._managed:
                log.warning("SGLang server %s is dropped until it answers again (%s)", url, dead[url])
        up, failures = self._started_again(again)
        left |= up
        if not left:
            reasons = "; ".join([*(f"{url}: {reason}" for url, reason in dead.items()), *failures])
            raise FleetLost(f"no SGLang server is left ({reasons})")
        for failure in failures:
            log.warning("a server could not be started again; %d are left: %s", len(left), failure)
        return left
