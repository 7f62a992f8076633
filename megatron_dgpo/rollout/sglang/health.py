"""Which servers are well, as their answers and their health checks say.

SGLang's /health draws a token when nothing else comes from the scheduler: it answers after a second at the
earliest, gives up by itself after 20 s, and does not come back at all from a server that a sync has paused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from megatron_dgpo.rollout.sglang.web import Http, ServerError, ServerGone

log = logging.getLogger(__name__)

_TRIES = 3
_TRY_SECONDS = 25.0
"""Of one health check: longer than SGLang's own patience."""
_PAUSE_SECONDS = 0.5


class Health:
    """What one rank knows of the servers' health; used from the client's loop alone.

    Args:
        drawing: returns at once, or once the servers are not paused any more.
        most_late: samples in a row that a server may be late with, while nothing else comes from it.
    """

    def __init__(self, http: Http, drawing: Callable[[], Awaitable[None]], most_late: int) -> None:
        self._http = http
        self._drawing = drawing
        self._most_late = most_late
        self._checks: dict[str, asyncio.Task[Exception | None]] = {}
        self._answered: dict[str, float] = {}
        """When a server last answered a sample, on the clock of time.monotonic."""
        self._late: Counter[str] = Counter()
        """Samples in a row that a server did not answer in time."""

    def answered(self, url: str) -> None:
        self._answered[url] = time.monotonic()
        self._late[url] = 0

    def hangs(self, url: str, sent: float, count: int) -> bool:
        """Whether a server that did not answer a sample in time has to be given up, and not the sample alone:
        nothing has come from it since, and it was not the only one, or the sample is late again.

        Args:
            sent: when it was, on the clock of time.monotonic.
            count: how many times this sample has been late.
        """
        self._late[url] += 1
        silent = self._answered.get(url, float("-inf")) < sent
        return silent and (count > 1 or self._late[url] > self._most_late)

    def check(self, url: str) -> asyncio.Task[Exception | None]:
        """A health check, the one that is under way if there is one: why the server is not well, or None."""
        task = self._checks.get(url)
        if task is None or task.done():
            task = self._checks[url] = asyncio.create_task(self._check(url))
        return task

    async def sick(self, urls: Sequence[str]) -> dict[str, Exception]:
        """Those that are not well, and why."""
        found = await asyncio.gather(*(asyncio.shield(self.check(url)) for url in urls))
        return {url: reason for url, reason in zip(urls, found, strict=True) if reason is not None}

    async def _check(self, url: str) -> Exception | None:
        tries, reason = 0, None
        while tries < _TRIES:
            await self._drawing()
            began = time.monotonic()
            try:
                await self._http.request(url, "/health", timeout=_TRY_SECONDS, method="GET")
                return None
            except (ServerGone, ServerError) as error:
                reason = error
            tries += 1
            log.info(
                "health check %d of %d, after %.1f s: %s", tries, _TRIES, time.monotonic() - began, reason
            )
            await asyncio.sleep(_PAUSE_SECONDS)
        return reason
