"""A process that has imported SGLang and forks a server whenever `warm_python.py` asks for one.

`python warm_process.py LAUNCHER SOCKET OWNER` by SGLang's interpreter. The imports of a server take most of
its start, and the tests start thirty. A fork runs the launcher's own `main` with the environment, the working
directory and the standard streams of the process that asked, in a session of its own, and ends when that
one does. This process ends with the process OWNER.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import selectors
import signal
import socket
import sys
import threading
from types import ModuleType


def load(launcher: str) -> ModuleType:
    """The launcher as a module, and all that a server imports."""
    spec = importlib.util.spec_from_file_location("launcher", launcher)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.models.registry  # noqa: F401

    return module


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """What is asked for, on one line, and the standard streams for it."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        if not (more := connection.recv(1 << 16)):
            raise EOFError("the process that asked is gone")
        data += more
    return json.loads(data), streams


def become(wanted: dict, streams: list[int], connection: socket.socket) -> None:
    """In the fork: take the place of the process that asked, and end with it."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    random.seed()  # SGLang draws ports

    def watch() -> None:
        while connection.recv(1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def tell(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:  # whoever asked has been killed, and the fork ends by itself
        pass


def serve(address: str, owner: int) -> list[str] | None:
    """Answer requests until the owner ends; in a fork, the words of its command line."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".partial")
    listener.listen(16)
    os.rename(address + ".partial", address)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    end = os.pidfd_open(owner)
    waiting.register(end, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fd == end:
                return None
            if key.fileobj is not listener:  # a fork that has ended
                connection, child = key.data
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                tell(connection, os.waitpid(child, 0)[1])
                connection.close()
                continue
            connection, _ = listener.accept()
            try:
                wanted, streams = receive(connection)
            except (EOFError, OSError):
                connection.close()
                continue
            child = os.fork()
            if child == 0:
                listener.close()
                become(wanted, streams, connection)
                return wanted["arguments"]
            for stream in streams:
                os.close(stream)
            tell(connection, child)
            waiting.register(os.pidfd_open(child), selectors.EVENT_READ, (connection, child))


if __name__ == "__main__":
    launcher = load(sys.argv[1])
    gc.freeze()  # else a collection in a fork touches, and so copies, all of it
    arguments = serve(sys.argv[2], int(sys.argv[3]))
    if arguments is not None:
        launcher.main(arguments)
