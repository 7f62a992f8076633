"""Starts the processes of one split on this machine, and sees to it that they end.

Each rank writes what it prints to a file of its own. The first rank that fails is the one that is
reported: the others mostly fail because it did.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgpo import platform

PRELOAD = ["megatron_dgpo.trainer", "torch._dynamo"]
"""Imported once by the server that forks the ranks, where there is one (the second by torch's optimizers)."""


class RankFailed(RuntimeError):
    """A rank ended without a result; the text says which one and why, `details` has its traceback."""

    def __init__(self, message: str, details: str) -> None:
        self.details = details
        super().__init__(message)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    folder: Path,
    collective_seconds: float,
    limit_seconds: float,
) -> Any:
    """Call fn(*args) on each of `world_size` new processes in one process group; returns rank 0's result.

    Args:
        fn: a function of a module; it and its arguments travel by pickle.
        folder: an empty one, for the ranks' output and results.
        collective_seconds: how long a collective waits for a rank.
        limit_seconds: for everything.

    Raises:
        RankFailed: with the cause from the rank that failed first.
        TimeoutError: when it takes longer than `limit_seconds`.

    No process outlives the call, nor the caller's own death.
    """
    context = rank_context()
    processes = [
        context.Process(target=_rank_main, args=(fn, args, rank, world_size, folder, collective_seconds))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        _wait(processes, folder, limit_seconds)
        return pickle.loads((folder / "result").read_bytes())
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def rank_context() -> Any:
    """How ranks are started: on Linux without a GPU forked from a server that has imported everything,
    seconds less for each. CUDA does not work in a fork, and macOS's own libraries may not."""
    if sys.platform != "linux" or platform.has_gpu():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _wait(processes: Sequence[BaseProcess], folder: Path, limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        ended = multiprocessing.connection.wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            raise TimeoutError(f"ranks {sorted(running.values())} still run after {limit_seconds:.0f} s")
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            if code := processes[rank].exitcode:
                raise _first_failure(folder, rank, code)


def _first_failure(folder: Path, rank: int, code: int) -> RankFailed:
    failures = [pickle.loads(path.read_bytes()) for path in folder.glob("failure*")]
    if failures:
        _, rank, message, trace = min(failures)
        return RankFailed(f"rank {rank}: {message}", trace)
    output = (folder / f"rank{rank}.log").read_text(errors="replace")
    why = f"signal {-code}" if code < 0 else f"status {code}"
    return RankFailed(f"rank {rank} ended with {why}", output[-4000:])


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: Path,
    collective_seconds: float,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (folder / f"rank{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _join_group(rank, world_size, folder, collective_seconds)
        result = fn(*args)
        if rank == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
    except BaseException as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        failure = pickle.dumps((time.time(), rank, message, traceback.format_exc()))
        partial = folder / f"partial{rank}"
        partial.write_bytes(failure)
        partial.rename(folder / f"failure{rank}")
        os._exit(1)  # at once, so that the others' collectives fail instead of waiting
    platform.stop()


def _join_group(rank: int, world_size: int, folder: Path, collective_seconds: float) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    if platform.has_gpu():
        torch.cuda.set_device(platform.device())
    else:
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if platform.has_gpu() else "gloo",
        init_method=f"file://{folder.resolve()}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_seconds),
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a rank"
    parent.join()
    os._exit(1)
