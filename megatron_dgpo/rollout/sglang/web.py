"""HTTP to SGLang servers: an asyncio loop in a thread of its own, and one kind of error for each cause."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from megatron_dgpo import jsontext

T = TypeVar("T")

_KEEP_SECONDS = 2.0


class ServerGone(RuntimeError):
    """Nobody answers at the URL, or the connection broke: the server may be dead."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} does not answer: {reason}")
        self.url = url


class ServerTimeout(ServerGone):
    """The server took the request and did not answer in time."""


class ServerError(RuntimeError):
    """The server answered that it does not do what was asked."""

    def __init__(self, url: str, path: str, status: int, message: str) -> None:
        super().__init__(f"{url}{path} answered {status}: {message[:500]}")
        self.url = url
        self.status = status


class Http:
    """Requests from any thread; `run` and `submit` hand coroutines to the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()
        # SGLang closes connections that have been idle for 5 s, and a request that is on its way on one then
        # is lost: they are not kept that long, and a request that nobody repeats gets one of its own.
        self._kept: aiohttp.ClientSession = self.run(self._open(keepalive_timeout=_KEEP_SECONDS))
        self._fresh: aiohttp.ClientSession = self.run(self._open(force_close=True))

    async def _open(self, **how: Any) -> aiohttp.ClientSession:
        # How many requests run at once is decided by who sends them.
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, **how), trust_env=False)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.submit(coroutine).result()

    def close(self) -> None:
        """End the loop and its thread; requests that are under way are dropped."""
        if self._loop.is_closed():
            return
        self.run(self._kept.close())
        self.run(self._fresh.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def request(
        self,
        url: str,
        path: str,
        payload: dict[str, Any] | None = None,
        *,
        timeout: float,
        method: str = "POST",
        fresh: bool = True,
    ) -> Any:
        """The parsed answer (None where it is no JSON); `fresh`: by a connection of its own.

        Raises ServerGone, ServerTimeout, or ServerError for a status of 400 and above and for
        {"success": false}.
        """
        limit = aiohttp.ClientTimeout(total=timeout)
        session = self._fresh if fresh else self._kept
        try:
            async with session.request(method, url + path, json=payload, timeout=limit) as answer:
                status, body = answer.status, await answer.text(errors="replace")
        except TimeoutError as error:
            raise ServerTimeout(url, f"no answer to {path} in {timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(url, f"{type(error).__name__} {error}") from error
        try:
            value = jsontext.loads(body) if body else None
        except ValueError:
            value = None
        if status >= 400 or (isinstance(value, dict) and value.get("success") is False):
            raise ServerError(url, path, status, body)
        return value
