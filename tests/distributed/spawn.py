"""Runs a function on several gloo ranks of this machine: for tests."""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from patience import patience
from split_ranks import rank_context


def _rank_main(
    fn: Callable[..., Any], rank: int, world: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        result = fn(rank, world, *args)
        torch.save(result, Path(folder, f"result{rank}"))
    except BaseException as error:
        failure = (time.time(), error, traceback.format_exc())
        try:
            data = pickle.dumps(failure)
            pickle.loads(data)
        except Exception:
            # Some exceptions cannot travel; their text can.
            data = pickle.dumps((failure[0], RuntimeError(f"{type(error).__name__}: {error}"), failure[2]))
        partial = Path(folder, f"partial{rank}")
        partial.write_bytes(data)
        partial.rename(Path(folder, f"error{rank}"))
        os._exit(1)
    dist.destroy_process_group()


def _raise_first(folder: str, exit_codes: dict[int, int]) -> None:
    """Raise what the rank that failed first raised: the others often fail because it did."""
    failures = []
    for path in Path(folder).glob("error*"):
        when, error, trace = pickle.loads(path.read_bytes())
        failures.append((when, int(path.name.removeprefix("error")), error, trace))
    if failures:
        _, rank, error, trace = min(failures, key=lambda f: f[:2])
        error.add_note(f"on rank {rank}:\n{trace}")
        raise error
    raise RuntimeError(f"ranks ended without a result: exit codes {exit_codes}")


def ranks_of(
    fn: Callable[..., Any], world_size: int, folder: str, timeout: float, *args: Any
) -> list[BaseProcess]:
    """The processes of `run_ranks`, not started yet; `folder` is an empty one for their results."""
    # Not daemons, which may not have children: Megatron's checkpoint writer is one.
    return [
        rank_context().Process(target=_rank_main, args=(fn, rank, world_size, folder, timeout, args))
        for rank in range(world_size)
    ]


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float | None = None) -> list[Any]:
    """Call fn(rank, world_size, *args) on each of `world_size` new processes, in a gloo group.

    fn and args travel by pickle, so fn is a module-level function. Returns what each rank returned,
    in rank order. Raises the exception of the rank that failed first, or TimeoutError after `timeout`
    seconds (none: patience); no process outlives the call.
    """
    timeout = patience() if timeout is None else timeout
    with tempfile.TemporaryDirectory() as folder:
        processes = ranks_of(fn, world_size, folder, timeout, *args)
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            running = {process.sentinel: rank for rank, process in enumerate(processes)}
            codes: dict[int, int] = {}
            while running:
                ended = multiprocessing.connection.wait(list(running), max(0.0, deadline - time.monotonic()))
                if not ended:
                    raise TimeoutError(f"ranks {sorted(running.values())} still run after {timeout} s")
                for sentinel in ended:
                    rank = running.pop(sentinel)
                    processes[rank].join()
                    codes[rank] = processes[rank].exitcode or 0
                if any(codes.values()):
                    _raise_first(folder, codes)
            return [torch.load(Path(folder, f"result{r}"), weights_only=False) for r in range(world_size)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
