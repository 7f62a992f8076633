"""The servers of a run: started on every machine, or given by URL; the same list on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
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
    answers,
    check_nccl,
    check_server,
    stop_servers,
    workers_of_router,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

_ANY_ADDRESS = "192.0.2.1"
"""Of no machine (RFC 5737): the way there is the default route."""
_ASK_SECONDS = 5.0
"""How long a server that was dropped may take to say what it serves; all ranks wait."""


class FleetLost(RuntimeError):
    """No server is left, or one cannot be started; the same on every rank."""


class Fleet:
    """Built, changed and closed by all ranks together; a rank that acts tells the others.

    The first rank of each machine starts, watches and ends the managed servers there. Servers given by URL
    are rank 0's.

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
        self._acts = first_of_its_machine(groups.rank) if config.managed else groups.rank == 0
        self._machine = int(os.environ.get("GROUP_RANK", 0))
        machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        self.address = own_address(config.address, machines if config.managed else 1)
        """Where servers, and other machines, reach this one."""
        self._processes: dict[int, ServerProcess] = {}
        self._restarts_left = config.launch.max_restarts
        self._dropped: dict[str, int] = {}
        """Servers given by URL that were dropped, and how often they may still come back; on every rank."""
        self.id: str
        """Different for every run, so that process groups of two runs have different names."""
        self.ranks: dict[str, int]
        """URL of each server -> its tensor-parallel size."""
        opened = self._everywhere(lambda: (uuid.uuid4().hex[:8], self._open()))
        self.id = opened[0][0]
        self.ranks = {url: size for _, ranks in opened for url, size in ranks.items()}
        if len(opened) > 1:
            self._everywhere(self._reach_all)

    def exited(self) -> dict[str, str]:
        """Managed servers that this rank has started and whose process has ended, by URL."""
        return {p.url: p.death() for p in self._processes.values() if not p.is_alive()}

    def replace(self, dead: Mapping[str, str]) -> None:
        """Start managed servers again, drop the others. `dead`: URL -> why; the same on every rank.

        Raises FleetLost on every rank when none is left.
        """
        left = {url: size for url, size in self.ranks.items() if url not in dead}
        parts = self._everywhere(lambda: self._replaced(dead))
        for up, _ in parts:
            left |= up
        failures = [failure for _, failed in parts for failure in failed]
        if not left:
            self.close()
            reasons = "; ".join([*(f"{url}: {reason}" for url, reason in dead.items()), *failures])
            raise FleetLost(f"no SGLang server is left ({reasons})")
        for failure in failures if self._groups.rank == 0 else ():
            log.warning("a server could not be started again; %d are left: %s", len(left), failure)
        if not self._managed:
            for url in set(self.ranks) - set(left):
                self._dropped.setdefault(url, self._config.launch.max_restarts)
        self.ranks = left

    def take_back(self) -> list[str]:
        """Of the servers given by URL that were dropped, those that answer again and serve the model: they
        are in `ranks` from now on, and have to be given weights. The same on every rank.

        Behind a router none comes back: it was taken out there.
        """
        if self._config.router or not any(self._dropped.values()):
            return []
        (back,) = self._everywhere(self._back)
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

    def _everywhere(self, action: Callable[[], T]) -> list[T]:
        """What the action gives on each rank that acts, in their order, on every rank; its failures too."""
        outcome: tuple[Any, str | None] | None = None
        cause: Exception | None = None
        if self._acts:
            try:
                outcome = action(), None
            except Exception as error:
                outcome, cause = (None, str(error)), error
        outcomes = [o for o in platform.gather_objects(outcome, self._groups.world) if o is not None]
        if messages := [message for _, message in outcomes if message is not None]:
            self.close()
            raise FleetLost("; ".join(dict.fromkeys(messages))) from cause
        return [value for value, _ in outcomes]

    def _reach_all(self) -> None:
        """Raises ServerFailed where another machine's server does not answer here."""
        for url in self.ranks:
            if not answers(url + "/model_info", timeout=_ASK_SECONDS):
                raise ServerFailed(
                    f"rollout.sglang.address: machine {self._machine} does not reach {url}, which another "
                    "machine has started; give each machine the address at which the others reach it"
                )

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
        """A server's process; its number on this machine chooses devices and log file."""
        self._processes[number] = ServerProcess(
            self._model_path,
            self._config.launch,
            number=number,
            dtype=self._dtype,
            log_file=self._log_folder / f"server_{self._machine * self._config.launch.count + number}.log",
            host=self.address,
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

    def _replaced(self, dead: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
        """Of this rank's servers, those that were started again; and why others were not."""
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
        for url in dead if not self._managed else ():
            log.warning("SGLang server %s is dropped until it answers again (%s)", url, dead[url])
        return self._started_again(again)


def first_of_its_machine(rank: int) -> bool:
    """Whether this rank is the first that torchrun started on its machine; without torchrun, of all."""
    return os.environ.get("LOCAL_RANK", str(rank)) == "0"


def own_address(setting: str, machines: int) -> str:
    """Where servers and other machines reach this one.

    Args:
        setting: rollout.sglang.address. Its default stands for one machine alone; on several, the address
            with which this one reaches torchrun's MASTER_ADDR, or else the default route, takes its place.
        machines: that have a part in it.
    """
    if setting == "hostname":
        return socket.gethostname()
    if machines == 1 or setting != SGLangConfig.model_fields["address"].default:
        return setting
    for towards in (os.environ.get("MASTER_ADDR", ""), _ANY_ADDRESS):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))  # sends nothing
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
    raise ServerFailed(
        "rollout.sglang.address: this machine has no address at which other machines reach it but "
        f"{setting}; name one"
    )
