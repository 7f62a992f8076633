"""Stands for SGLang's interpreter: `python -IS warm_python.py PYTHON FOLDER OWNER ARGUMENTS...`

Where the arguments are the launcher's, a fork of `warm_process.py` becomes the server; this process passes
SIGTERM on to it, and each of the two ends with the other. Else this process becomes PYTHON. The first that
needs a fork starts the process that forks, which ends with the process OWNER.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import time
from typing import Any


def start(python: str, address: str, log: str, arguments: list[str]) -> None:
    """Start the process that forks, in nobody's family, and wait until it listens."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if os.fork() == 0:
            os.execv(python, [python, *arguments])
        os._exit(0)
    os.waitpid(child, 0)
    end = time.monotonic() + 600
    while not os.path.exists(address):
        if time.monotonic() > end:
            sys.exit(f"the process that forks servers does not come up; its log: {log}")
        time.sleep(0.05)


def connect(python: str, folder: str, owner: str, launcher: str) -> socket.socket:
    address = os.path.join(folder, "socket")
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address):
            forks = os.path.join(os.path.dirname(os.path.abspath(__file__)), "warm_process.py")
            start(python, address, os.path.join(folder, "log"), [forks, launcher, address, owner])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def main(python: str, folder: str, owner: str, arguments: list[str]) -> int:
    if not arguments or os.path.basename(arguments[0]) != "launcher.py":
        os.execv(python, [python, *arguments])
    connection = connect(python, folder, owner, arguments[0])
    wanted = {"arguments": arguments[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    data = json.dumps(wanted).encode() + b"\n"
    connection.sendall(data[socket.send_fds(connection, [data], [0, 1, 2]) :])
    answers = connection.makefile()
    child = int(answers.readline())

    def pass_on(number: int, frame: Any) -> None:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass

    signal.signal(signal.SIGTERM, pass_on)
    code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code >= 0:
        return code
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], sys.argv[4:]))
