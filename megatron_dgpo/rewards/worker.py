"""The process at the other end of `pool`: calls come on standard input, results go to standard output."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import queue
import resource
import signal
import sys
import threading

MEMORY_BYTES = 4 << 30
"""Address space of a worker: a response such as 9^9^9^9 must not take the machine's memory with it."""


def main(task: str) -> None:
    """Serve calls of "module:function" until standard input ends.

    A function `prepare_worker` of the module, where it has one, runs first.
    """
    _end_with_trainer()
    # Results go to the pipe alone: what libraries print belongs to standard error.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with contextlib.suppress(ValueError):  # where a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    module, _, function = task.partition(":")
    home = importlib.import_module(module)
    call = getattr(home, function)
    if hasattr(home, "prepare_worker"):
        home.prepare_worker()

    calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            calls.put(line)
        os._exit(0)  # the trainer is gone, perhaps in the middle of a call that would never end

    threading.Thread(target=read, daemon=True).start()
    results.write(json.dumps({"ready": True}) + "\n")
    while True:
        arguments = json.loads(calls.get())
        try:
            answer = {"result": call(**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        results.write(json.dumps(answer) + "\n")


def _end_with_trainer() -> None:
    """A long computation can keep the reading thread from seeing that standard input has ended; on
    Linux the kernel ends the worker instead. It does so when the thread that started the worker ends, not
    the process: `pool` starts workers in a thread that lives as long as they may."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
