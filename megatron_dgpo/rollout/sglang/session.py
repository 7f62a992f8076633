"""The calls around a weight update: pause, open, close, resume, at every live server at once.

A server that is gone is marked dead and left out; one that refuses a call is noted in `refusals`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from megatron_dgpo.rollout.sglang.client import ServerError, ServerGone, ServerTimeout, SGLangClient

log = logging.getLogger(__name__)

_NOT_FOUND = 404
_MEMORY = ["kv_cache", "weights"]


class UpdateSession:
    """Of one rank, which speaks for all.

    SGLang asks for begin_weight_update and end_weight_update around an update from release 0.5.21 on;
    older ones do not have them, which the first call finds out.

    Args:
        in_flight: what happens to requests that are being drawn (SyncConfig.in_flight).
    """

    def __init__(
        self, client: SGLangClient, *, in_flight: Literal["retract", "abort"], timeout_seconds: float
    ) -> None:
        self._client = client
        self._in_flight = in_flight
        self._timeout = timeout_seconds
        self._without_sessions: set[str] = set()
        self._resting: set[str] = set()
        self.refusals: dict[str, str] = {}

    def rest(self) -> None:
        """Have servers give up the memory of weights and cache. What was there is lost.

        They are paused until the next update, in the only way that empties SGLang's running batch: a request
        that was ended a moment ago would still take a step, and the scheduler dies of this call while it
        does. Paused, a server keeps a core busy.
        """
        self._pause("retract")
        self._resting = set(self._client.live)
        self._each("/release_memory_occupation", {"tags": _MEMORY}, sorted(self._resting))

    def wake(self) -> None:
        """Have those servers take their memory back; weights have to follow."""
        resting, self._resting = self._resting, set()
        again = [url for url in self._client.live if url in resting]
        self._each("/resume_memory_occupation", {"tags": _MEMORY}, again)

    def pause(self) -> None:
        """Stop drawing. Requests that arrive from now on wait."""
        self._pause(self._in_flight)

    def _pause(self, mode: Literal["retract", "abort"]) -> None:
        self.refusals = {}
        live = self._client.live
        # Releases without sessions die of a flush with a retracted request.
        old = [url for url in live if url in self._without_sessions]
        self._each("/pause_generation", {"mode": "abort"}, old)
        self._each("/pause_generation", {"mode": mode}, [u for u in live if u not in old])

    def begin(self) -> None:
        """Open the update; one that was left open by a failed attempt is closed first."""
        urls = [url for url in self._client.live if url not in self._without_sessions]
        refused = self._each("/begin_weight_update", {"selector": "all"}, urls)
        again = []
        for url, error in refused.items():
            del self.refusals[url]
            if error.status == _NOT_FOUND:
                log.info("%s has no weight-update sessions (a release before 0.5.21)", url)
                self._without_sessions.add(url)
            else:
                again.append(url)
        self._each("/end_weight_update", {}, again)
        self._each("/begin_weight_update", {"selector": "all"}, again)

    def end(self) -> None:
        self._each(
            "/end_weight_update", {}, [u for u in self._client.live if u not in self._without_sessions]
        )

    def resume(self, *, abort: bool = False) -> None:
        """Let every live server draw again; `abort` ends what was in flight, whose weights are gone.

        A server that refuses counts as dead: samples would wait there until they time out.
        """
        if abort:
            self._each("/abort_request", {"abort_all": True}, self._client.live)
        for url, error in self._each("/continue_generation", {}, self._client.live).items():
            self._client.mark_dead(url, str(error))
        self.refusals = {}

    def _each(self, path: str, payload: dict[str, Any], urls: Sequence[str]) -> dict[str, ServerError]:
        asked = [(u, self._client.submit(u, path, payload, timeout=self._timeout)) for u in list(urls)]
        refused = {}
        for url, answer in asked:
            try:
                answer.result()
            except ServerError as error:
                refused[url] = error
                self.refusals[url] = str(error)
            except (ServerGone, ServerTimeout) as error:
                self._client.mark_dead(url, str(error))
        return refused
