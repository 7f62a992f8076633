"""Worker processes with a time limit that holds: a worker that overruns it is killed and replaced.

The workers are fresh interpreters, not forks, since a fork of a process with torch's threads can
deadlock, and not `multiprocessing` children, which would import the training script again. Each end
speaks JSON, one object a line, over the worker's standard input and output.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_dgpo.progress import progress, watched

START_SECONDS = 120.0
"""Time for a worker to import what it needs, which is not counted as scoring."""


class _Worker:
    """One process, with at most one call in flight."""

    def __init__(self, task: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dgpo.rewards.worker", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.call: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._received = b""

    def send(self, index: int, arguments: dict[str, Any], timeout_seconds: float) -> bool:
        """Hand over a call; False where the worker is gone."""
        line = memoryview(json.dumps(arguments).encode() + b"\n")
        self.call, self.deadline = index, time.monotonic() + timeout_seconds
        try:
            while line:
                line = line[self.stdin.write(line) :]
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """The complete messages that have arrived; None where the worker is gone."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Kill the process and return its exit status (negative: the signal)."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()
        return self.process.returncode


class ProcessPool:
    """Calls one function, named "module:function", in `num_workers` processes.

    The function takes keyword arguments and returns a dict, both of which JSON can carry. Workers
    start with the first call to `map` and end with `close` or with this process, whichever threads call.
    """

    def __init__(self, task: str, num_workers: int, timeout_seconds: float) -> None:
        self.task = task
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        # The kernel ends a worker with the thread that started it (see `worker`), so one thread that lives
        # as long as the workers do starts them all; callers' threads come and go.
        self._starter: ThreadPoolExecutor | None = None

    def map(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any] | str]:
        """For each call, in order, what the function returned, or a string that says why it failed:
        the exception it raised, a time-out, or the death of the worker.

        Raises RuntimeError where workers do not start at all.
        """
        with self._lock:
            return self._map(calls)

    def close(self) -> None:
        """End all workers; a later `map` starts new ones."""
        with self._lock:
            while self._workers:
                self._workers.pop().end()
            if self._starter is not None:
                self._starter.shutdown()
                self._starter = None

    def _map(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any] | str]:
        results: list[dict[str, Any] | str | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        try:
            with progress("scoring", len(calls), "responses", bar=False) as bar:
                while waiting or any(worker.call is not None for worker in self._workers):
                    self._assign(calls, waiting)
                    bar.update(self._collect(results))
        except BaseException:
            # A call in flight would answer into the next map.
            while self._workers:
                self._workers.pop().end()
            raise
        return [result for result in results if result is not None]

    def _assign(self, calls: Sequence[dict[str, Any]], waiting: deque[int]) -> None:
        for worker in list(self._workers):
            if worker.ready and worker.call is None and worker.process.poll() is not None:
                worker.end()  # it died between calls: nobody's fault
                self._workers.remove(worker)
        while len(self._workers) < self.num_workers:
            self._workers.append(self._start())
        for worker in self._workers:
            if waiting and worker.ready and worker.call is None:
                index = waiting.popleft()
                # Where the worker is gone already, its closed pipe tells `_collect`.
                worker.send(index, calls[index], self.timeout_seconds)

    def _start(self) -> _Worker:
        if self._starter is None:
            self._starter = ThreadPoolExecutor(1, thread_name_prefix="reward-workers")
        return self._starter.submit(_Worker, self.task).result()

    def _collect(self, results: list[dict[str, Any] | str | None]) -> int:
        """Wait for some answers and put them where they belong; how many calls are done with."""
        busy = [worker for worker in self._workers if worker.call is not None or not worker.ready]
        calls = sum(worker.call is not None for worker in busy)
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            wait = min(worker.deadline for worker in busy) - time.monotonic()
            answered = [key.data for key, _ in selector.select(max(wait, 0.0))]
        for worker in answered:
            messages = worker.receive()
            if messages is None:
                self._lose(worker, results, None)
                continue
            for message in messages:
                if worker.call is not None:
                    results[worker.call] = message.get("result", message.get("error"))
                    worker.call = None
                worker.ready = True
        now = time.monotonic()
        for worker in busy:
            overdue = worker.call is not None or not worker.ready
            if overdue and now >= worker.deadline and worker in self._workers:
                self._lose(worker, results, f"timed out after {self.timeout_seconds:g} s")
        return calls - sum(worker.call is not None for worker in self._workers)

    def _lose(self, worker: _Worker, results: list[dict[str, Any] | str | None], reason: str | None) -> None:
        """Take a worker out of service; its call, if any, has failed."""
        self._workers.remove(worker)
        status = worker.end()
        if not worker.ready:
            raise RuntimeError(
                f"a worker for {self.task} did not start (exit status {status}); its messages are above"
            )
        if worker.call is not None:
            results[worker.call] = reason or f"the worker process died with exit status {status}"


def call_here(
    function: Callable[..., dict[str, Any]], calls: Sequence[dict[str, Any]]
) -> list[dict[str, Any] | str]:
    """What `ProcessPool.map` gives, in this process and without a time limit."""
    results: list[dict[str, Any] | str] = []
    for arguments in watched(calls, "scoring", len(calls), "responses", bar=False):
        try:
            results.append(function(**arguments))
        except Exception as error:  # whatever it raises is a failure of this one call
            results.append(f"{type(error).__name__}: {error}")
    return results
