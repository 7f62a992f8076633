"""python -m megatron_dgpo.observe.inspect RUNS_DIR [--host 127.0.0.1] [--port 8080]

Shows the runs below a folder in the browser, those under way as they go on: curves, advisories, and where the
credit of recorded responses went. It only reads, listens at this machine's own address unless told
otherwise, and hands out nothing outside of the folder. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from aiohttp import web

from megatron_dgpo.observe.inspect import guard
from megatron_dgpo.observe.inspect.runs import RunsFolder
from megatron_dgpo.observe.inspect.server import Inspector

_END_SECONDS = 2.0
"""How long answers under way may take when the server is told to end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM; then 0. 2 where it cannot start, after one line that says why."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dgpo.observe.inspect", description="\n".join(lines[2:])
    )
    parser.add_argument("runs", metavar="RUNS_DIR", help="folder with runs in it, a few levels deep")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8080, help="0: any free one (default: %(default)s)")
    options = parser.parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(guard.OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        inspector = Inspector(RunsFolder(options.runs))
        listener = _listen(options.host, options.port)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not guard.is_loopback(options.host):
        logging.getLogger(__name__).warning(
            "--host %s: whoever reaches this machine can read the runs' prompts and responses", options.host
        )
    asyncio.run(_serve(inspector, listener, options.host, options.runs))
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: 0 to 65535")
    return int(text)


def _listen(host: str, port: int) -> socket.socket:
    """Raises ValueError where nobody can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host}: no address of this machine: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            why = f"port {port} of {host} is in use; choose another one with --port, or 0 for any free one"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = f"--host {host}: no address of this machine"
        else:
            why = f"cannot listen at port {port} of {host}: {error.strerror or error}"
        raise ValueError(why) from None
    return listener


async def _serve(inspector: Inspector, listener: socket.socket, host: str, runs: str) -> None:
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)
    runner = web.AppRunner(
        inspector.app(host), access_log=None, handle_signals=False, shutdown_timeout=_END_SECONDS
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        name = f"[{host}]" if ":" in host else host
        print(f"runs in {runs}: http://{name}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        await end.wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    sys.exit(main())
