"""Samples from SGLang servers: token ids in, token ids and log-probs out.

One request a sample, so that a failed one is drawn again alone; a prompt's samples share its prefix in
the server's cache. Requests go to the least loaded server, or to a router in front of the servers. A
server that fails is left out, and what it had not finished is drawn by the others.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

from megatron_dgpo.config import RESERVED_POSITIONS
from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.sglang.answers import BadAnswer, Response, log_probs, request
from megatron_dgpo.rollout.sglang.health import Health
from megatron_dgpo.rollout.sglang.router import RouterFailed, take_out
from megatron_dgpo.rollout.sglang.web import Http, ServerError, ServerGone, ServerTimeout
from megatron_dgpo.types import Group, Prompt, Sample

log = logging.getLogger(__name__)

__all__ = [
    "BadAnswer",
    "RouterFailed",
    "SGLangClient",
    "SampleLate",
    "ServerError",
    "ServerGone",
    "ServerTimeout",
]

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 4.0
_ASK_SECONDS = 5.0
"""For what does not matter much, or comes at once."""
_POLL_SECONDS = 0.2
_SERVER_ERROR = 500
_BUSY = (408, 429)
"""A router had no time or no room."""
_MAX_ABORTS = 20
"""A sample that a sync aborts is drawn again; one that is aborted this often has another problem."""


class SampleLate(RuntimeError):
    """A sample did not come in time, twice, while others do from servers that are well."""


class SGLangClient:
    """What one rank asks of the servers.

    Args:
        urls: of the servers, which control calls go to.
        generate_url: of a router in front of the servers, where samples are drawn instead.
        max_concurrency: samples in flight at a server, from this client.
        request_timeout: seconds after which a sample is given up and sent once more, to another server if
            there is one. Its server counts as dead where it fails its health check, or nothing came from
            it meanwhile and more than `retries` samples were late there, or this one was again.
        retries: how many times one request that failed is sent to a server again, until the server counts
            as dead.
        decode: token ids to text.
        vocab_size, max_positions: of the model. An id beyond the vocabulary would end the server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        generate_url: str | None = None,
        max_concurrency: int,
        request_timeout: float,
        retries: int,
        decode: Callable[[Sequence[int]], str],
        vocab_size: int,
        max_positions: int,
    ) -> None:
        self._http = Http()
        self._router = generate_url
        self._max_concurrency = max_concurrency
        self._timeout = request_timeout
        self._retries = retries
        self._decode = decode
        self._vocab_size = vocab_size
        self._max_positions = max_positions
        self._live: list[str] = []
        self._dead: dict[str, str] = {}
        self.version = -1
        """Of the weights that the servers draw with, as the last sync left them."""
        self.own_names: dict[str, int] = {}
        """What servers call weights that no sync gave them, and the versions these count as."""
        self._loads: Counter[str] = Counter()
        """Requests in flight by URL; not reset, since requests outlive a server's death."""
        self._longest: dict[str, int] = {}
        """Prompt and response together, in tokens, of servers that have said it."""
        self._in_flight: set[str] = set()
        self._changed = asyncio.Condition()
        self._held = False
        self._released = float("-inf")
        """When `release` was last called, on the clock of time.monotonic."""
        self._health = Health(self._http, self._drawing, retries)
        self.set_servers(urls)

    # --- servers ----------------------------------------------------------------------------------

    @property
    def live(self) -> list[str]:
        """URLs of the servers that answer, as far as is known."""
        return list(self._live)

    @property
    def dead(self) -> dict[str, str]:
        """Servers that were found dead since `set_servers`, and why."""
        return dict(self._dead)

    def set_servers(self, urls: Sequence[str]) -> None:
        """Start afresh with these servers."""
        self._live, self._dead = list(urls), {}
        self._longest = {url: n for url, n in self._longest.items() if url in self._live}
        self._wake()

    def mark_dead(self, url: str, reason: str) -> None:
        """Send this server nothing any more, neither directly nor through the router."""
        if url in self._live:
            self._live.remove(url)
            self._dead[url] = reason
            log.warning("SGLang server %s counts as dead: %s", url, reason)
            self._wake()
            if self._router:
                self._http.submit(take_out(self._http, self._router, url))

    def hold(self) -> None:
        """Send no new samples' requests until `release`; those that are in flight go on."""
        self._held = True

    def release(self) -> None:
        self._held, self._released = False, time.monotonic()
        self._wake()

    async def _drawing(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._held)

    def close(self) -> None:
        self._http.close()

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._http.submit(notify())

    # --- control ----------------------------------------------------------------------------------

    def submit(
        self,
        url: str,
        path: str,
        payload: dict[str, Any] | None = None,
        *,
        timeout: float,
        method: str = "POST",
    ) -> Future[Any]:
        """A control call; its result is the parsed answer, its exceptions those of `Http.request`."""
        return self._http.submit(self._http.request(url, path, payload, timeout=timeout, method=method))

    def log_probs(self, url: str, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences by one server, at temperature 1: entry t is of token t + 1 after tokens 0..t.

        Raises BadAnswer, ServerError, ServerGone; ValueError for ids outside the vocabulary, and for its
        last one, in whose place SGLang scores token 0 (it takes it for a placeholder of an image).
        """
        for k, ids in enumerate(token_ids):
            self._check_tokens(ids, f"sequence {k}")
            if self._vocab_size - 1 in ids:
                raise ValueError(f"sequence {k}: SGLang does not score the last id of the vocabulary")
        payload = dict(
            input_ids=[list(ids) for ids in token_ids],
            sampling_params={"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
        )
        answers = self.submit(url, "/generate", payload, timeout=self._timeout).result()
        if not isinstance(answers, list) or len(answers) != len(token_ids):
            raise BadAnswer(f"{url} scored {answers!r:.200} for {len(token_ids)} sequences")
        out = []
        for ids, answer in zip(token_ids, answers, strict=True):
            # The first token comes after nothing, and has none.
            entries = (answer.get("meta_info") or {}).get("input_token_logprobs") or []
            out.append(log_probs(url, "the probe", list(ids[1:]), entries[1:]))
        return out

    # --- drawing ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], object] | None = None,
        on_group: Callable[[Group], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Group | None]:
        """See `Engine.generate`; the callbacks come from the client's thread.

        Raises:
            EnginesLost: no server is left; it has the groups that are complete.
            RouterFailed: samples do not come back through the router, and no server is to blame.
            SampleLate: a sample did not come in time, twice, and no server is to blame.
            BadAnswer: an answer without log-probs, with ones that are not finite, of other weights, or cut
                short.
            ValueError: for a prompt that is empty, outside the vocabulary, or too long for the model or for a
                server.
        """
        self._http.run(self._ask_longest())
        self._check(prompts, params)
        return self._http.run(_Draw(self, prompts, params, on_progress, on_group).run(should_stop))

    async def draw(self, prompt: Prompt, index: int, params: SamplingParams, call: str) -> Sample:
        """One sample, whatever fails on the way; raises NoServer when none is left."""
        for count in range(1, _MAX_ABORTS + 1):
            sample = Response(prompt, index, params)
            while sample.finish_reason is None:
                before = self.version
                url, answer = await self._ask(request(sample), call)
                sample.add(url, answer, (before, self.version), self.own_names)
            if sample.finish_reason != "abort":
                return sample.finished(self._decode)
            await _pause(count)
        raise BadAnswer(
            f"{url}, prompt {prompt.id!r}, sample {index}: aborted {_MAX_ABORTS} times; the last time: "
            f"{sample.abort_message}"
        )

    async def _ask(self, payload: dict[str, Any], call: str) -> tuple[str, Any]:
        """Who answered, and the answer. A request that fails stays with its server until one of the two is
        given up: then the server's other requests are not counted against it."""
        url, failures, late, avoided = "", 0, 0, ""
        while True:
            before, url = url, await self._acquire(url, avoided)
            failures, sent = failures if url == before else 0, time.monotonic()
            # Never the same twice: a server may not have noticed that the one before was given up.
            rid = f"{call}-{uuid4().hex}"
            self._in_flight.add(rid)
            try:
                answer = await self._http.request(
                    url, "/generate", {**payload, "rid": rid}, timeout=self._timeout, fresh=False
                )
                self._health.answered(url)
                return url, answer
            except (ServerGone, ServerError) as error:
                if isinstance(error, ServerError) and not _may_be_repeated(error):
                    raise
                failure = error
            finally:
                self._in_flight.discard(rid)
                await self._release(url)
            failures += 1
            if self._router:
                failures = await self._failed_through_router(rid, failure, failures)
            elif isinstance(failure, ServerTimeout):
                self._http.submit(self.abort([rid]))
                if not self._held and self._released < sent:  # a sync would have taken its time
                    late += 1
                    self._late(url, sent, late, failure)
                url, avoided = "", url
                continue
            elif failures > self._retries:
                self.mark_dead(url, str(failure))
                continue
            else:
                await self._check_health([url], failure)
            log.info("%s; again after a pause", failure)
            await _pause(failures)

    def _late(self, url: str, sent: float, count: int, error: ServerTimeout) -> None:
        """What a sample's lateness says of its server. Raises SampleLate where that is nothing, again."""
        if self._health.hangs(url, sent, count):
            self.mark_dead(url, str(error))
        elif count > 1:
            raise SampleLate(
                f"{error}, for the second time, while the server answers other samples: raise "
                "rollout.sglang.request_timeout_seconds (or lower min_tokens_per_second), or lower "
                "rollout.sglang.max_concurrent_requests or rollout.max_new_tokens"
            )
        else:
            log.warning("%s; the sample is drawn again", error)
            self._http.submit(self._check_health([url], error))

    async def _failed_through_router(self, rid: str, error: ServerGone | ServerError, failures: int) -> int:
        """Find out who is to blame for a request's failure; how many are left to explain.

        Raises RouterFailed where no server is, too often. A request that took too long is sent once more
        only: the other ranks wait.
        """
        slow = isinstance(error, ServerTimeout)
        if slow or _is_duplicate(error):
            await self.abort([rid])  # a worker still draws what nobody waits for
        if await self._check_health(self.live, error):
            return 0
        if failures > (min(self._retries, 1) if slow else self._retries):
            raise RouterFailed(
                f"router {error}; sent {failures} times (rollout.sglang.retries, "
                f"request_timeout_seconds), while its workers are well: {', '.join(self.live)}"
            )
        return failures

    async def _check_health(self, urls: Sequence[str], error: Exception) -> bool:
        """Whether any of these servers is dead, as their health checks say; those are marked."""
        sick = await self._health.sick(urls)
        for url, reason in sick.items():
            self.mark_dead(url, f"{error}; then {reason}")
        return bool(sick)

    async def _ask_longest(self) -> None:
        """How long a sequence servers take; one that does not say is found out by its answers."""
        urls = [url for url in self._live if url not in self._longest]
        calls = [self._http.request(url, "/server_info", timeout=_ASK_SECONDS, method="GET") for url in urls]
        for url, info in zip(urls, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            longest = info.get("max_req_input_len") if isinstance(info, dict) else None
            if isinstance(longest, int):
                self._longest[url] = longest

    async def abort(self, rids: Sequence[str]) -> None:
        """End requests, wherever they are; failures do not matter."""
        calls = [
            self._http.request(url, "/abort_request", {"rid": rid}, timeout=_ASK_SECONDS)
            for url in self._live
            for rid in rids
        ]
        await asyncio.gather(*calls, return_exceptions=True)

    def in_flight(self, call: str) -> list[str]:
        """Requests of a call that servers have and have not answered."""
        return [rid for rid in self._in_flight if rid.startswith(call)]

    async def _acquire(self, wanted: str, avoided: str = "") -> str:
        """Where to send a request, once there is room: the router, else the wanted server if it lives,
        else the least loaded one, and not the avoided one if there are others."""
        async with self._changed:
            while True:
                if not self._live:
                    raise NoServer
                if not self._held:
                    room = self._max_concurrency
                    if self._router:
                        url, room = self._router, room * len(self._live)
                    elif wanted in self._live:
                        url = wanted
                    else:
                        others = [u for u in self._live if u != avoided] or self._live
                        url = min(others, key=lambda u: (self._loads[u], random.random()))
                    if self._loads[url] < room:
                        self._loads[url] += 1
                        return url
                await self._changed.wait()

    async def _release(self, url: str) -> None:
        async with self._changed:
            self._loads[url] -= 1
            self._changed.notify_all()

    # --- checks -----------------------------------------------------------------------------------

    def _check_tokens(self, tokens: Sequence[int], who: str) -> None:
        if not len(tokens):
            raise ValueError(f"{who} has no tokens")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{who} has token id {wrong}, outside the vocabulary of {self._vocab_size}")

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        m = self._max_positions
        limits = {f"the model's {m} positions, of which SGLang keeps some free": m - RESERVED_POSITIONS}
        for url, n in self._longest.items():
            limits[f"the {n} of {url} (by its context_length and max_total_tokens)"] = n
        what = min(limits, key=limits.__getitem__)
        for prompt in prompts:
            self._check_tokens(prompt.token_ids, f"prompt {prompt.id!r}")
            if len(prompt.token_ids) + params.max_new_tokens > limits[what]:
                raise ValueError(
                    f"prompt {prompt.id!r}: {len(prompt.token_ids)} tokens and max_new_tokens "
                    f"{params.max_new_tokens} exceed {limits[what]}: {what}"
                )


def _may_be_repeated(error: ServerError) -> bool:
    return error.status >= _SERVER_ERROR or error.status in _BUSY or _is_duplicate(error)


def _is_duplicate(error: Exception) -> bool:
    """Whether a worker had the request already: a router sends one again, under its own id, whose worker it
    lost the connection to."""
    return isinstance(error, ServerError) and error.status == 400 and "Duplicate request ID" in str(error)


async def _pause(count: int) -> None:
    """Before the next try, after `count` that failed."""
    longest = min(_FIRST_PAUSE_SECONDS * 2 ** (count - 1), _LONGEST_PAUSE_SECONDS)
    await asyncio.sleep(longest * random.uniform(0.5, 1.5))


class NoServer(RuntimeError):
    """Every server counts as dead."""


class _Draw:
    """All samples of one call."""

    def __init__(
        self,
        client: SGLangClient,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        on_progress: Callable[[int], object] | None,
        on_group: Callable[[Group], object] | None,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._params = params
        self._on_progress = on_progress
        self._on_group = on_group
        self._groups: list[Group | None] = [None] * len(prompts)
        self._found: list[list[Sample | None]] = [[None] * params.n for _ in prompts]
        self._call = uuid4().hex[:8]

    async def run(self, should_stop: Callable[[], bool] | None) -> list[Group | None]:
        pairs = [(k, i) for k in range(len(self._prompts)) for i in range(self._params.n)]
        tasks = [asyncio.create_task(self._one(k, i)) for k, i in pairs]
        try:
            await self._wait(set(tasks), should_stop)
        finally:
            rids = self._client.in_flight(self._call)
            for task in tasks:
                task.cancel()
            # All of them: of several that failed, only the first one's error has been raised.
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.abort(rids)
        return self._groups

    async def _one(self, k: int, i: int) -> None:
        self._found[k][i] = await self._client.draw(self._prompts[k], i, self._params, self._call)
        if self._on_progress is not None:
            self._on_progress(1)
        samples = [s for s in self._found[k] if s is not None]
        if len(samples) == self._params.n:
            group = self._groups[k] = Group(self._prompts[k], samples)
            if self._on_group is not None:
                self._on_group(group)

    async def _wait(self, left: set[asyncio.Task[None]], should_stop: Callable[[], bool] | None) -> None:
        """Until all is done, should_stop says so, or something fails."""
        while left:
            done, left = await asyncio.wait(
                left,
                timeout=None if should_stop is None else _POLL_SECONDS,
                return_when=asyncio.FIRST_EXCEPTION,
            )
            errors = [e for task in done if (e := task.exception())]
            if hard := [e for e in errors if not isinstance(e, NoServer)]:
                raise hard[0]
            if errors:
                dead = "; ".join(f"{url} ({reason})" for url, reason in self._client.dead.items())
                raise EnginesLost(f"no SGLang server is left: {dead}", self._groups)
            if should_stop is not None and should_stop():
                return
