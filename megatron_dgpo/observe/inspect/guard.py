"""What every request and every answer has to pass: host, method, headers, errors as one sentence."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from megatron_dgpo.observe.inspect.runs import Refused

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]{1,5})?")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, by ETag
}


def is_loopback(host: str) -> bool:
    """Whether a host to listen at is reached from this machine only."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def host_guard(host: str) -> Callable[[str], bool]:
    """Whether a name in a request's Host header may be answered, for a server that listens at `host`.

    A page of the web can make its own name resolve to this machine and have the browser ask here
    (DNS rebinding); the Host header then holds that page's name. Names answered are localhost, `host` and,
    where the server listens at all addresses, this machine's own. An address that is not this server's is
    no name: where it listens beyond loopback, any address is answered, as the machine may have several.
    """
    open_to_all = not is_loopback(host)
    names = {"localhost", host.lower()}
    if open_to_all:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def allowed(name: str) -> bool:
        address = _address(name)
        if address is None:
            return name.lower().removesuffix(".") in names
        return open_to_all or address.is_loopback

    return allowed


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _named(header: str) -> str | None:
    """The name in a Host header, without port; None where it has none."""
    match = _HOST.fullmatch(header)
    return match[1] if match else None


def refusal(status: int, why: str, headers: dict[str, str] | None = None) -> web.Response:
    """An answer of one sentence."""
    body = json.dumps({"error": why}).encode()
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def middleware(host: str) -> Any:
    """Checks every request, and turns every error into a sentence; nobody gets a stack trace."""
    allowed = host_guard(host)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts = request.headers.getall("Host", [])
        name = _named(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            return refusal(400, "the request has no proper Host header")
        if not allowed(name):
            return refusal(403, "the inspector is not called that: open it by the address that it printed")
        if request.method not in ("GET", "HEAD"):
            return refusal(405, "the inspector only reads: GET and HEAD", {"Allow": "GET, HEAD"})
        try:
            return await handler(request)
        except Refused as error:
            return _refused(request, error)
        except web.HTTPException as error:
            return refusal(error.status, f"{error.status}: {error.reason}".replace("\n", " "))
        except FileNotFoundError:
            return refusal(404, "what was asked for went away while it was read")
        except Exception as error:
            # repr: what the client sent cannot begin a line of its own in the log.
            log.error("%s %r: %s: %r", request.method, request.path_qs, type(error).__name__, str(error))
            return refusal(500, "the inspector failed at this; its log says more")

    return guard


def _refused(request: web.Request, error: Refused) -> web.Response:
    if request.path.startswith("/api/"):
        return refusal(error.status, str(error))
    return web.Response(status=error.status, text=f"{error}\n")  # for a person


async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.pop("Server", None)


class OneLine(logging.Formatter):
    """Log records without stack traces."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        text += f": {type(error).__name__}: {error}" if error is not None else ""
        return " ".join(text.split())
