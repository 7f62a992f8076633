"""Samples from SGLang servers: token ids in, token ids and log-probs out.

One request a sample, so that a failed one is drawn again alone; a prompt's samples share its prefix in
the server's cache. Requests go to the least loaded server. A server that fails is left out, and what
it had not finished is drawn by the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.sglang.web import Http, ServerError, ServerGone, ServerTimeout
from megatron_dgpo.types import Group, Prompt, Sample, VersionSpan

log = logging.getLogger(__name__)

__all__ = ["BadAnswer", "SGLangClient", "ServerError", "ServerGone", "ServerTimeout"]

_FIRST_PAUSE_SECONDS = 0.25
_HEALTH_TIMEOUT_SECONDS = 5.0
_POLL_SECONDS = 0.2
_SERVER_ERROR = 500
_MAX_ABORTS = 20
"""A sample that a sync aborts is drawn again; one that is aborted this often has another problem."""


class BadAnswer(RuntimeError):
    """A server's answer lacks what a sample needs; not repeated, since it would not get better."""


class SGLangClient:
    """What one rank asks of the servers.

    Args:
        urls: of the servers, which control calls go to.
        generate_url: where samples are drawn instead, such as a router in front of the servers.
        max_concurrency: samples in flight at a server, from this client.
        request_timeout: seconds after which a sample's server counts as dead.
        retries: how many failures in a row a server may have until it counts as dead.
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
        self._generate_url = generate_url
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
        self._loads: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._in_flight: set[str] = set()
        self._changed = asyncio.Condition()
        self._held = False
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
        self._loads = dict.fromkeys(urls, 0)
        self._failures = dict.fromkeys(urls, 0)
        self._wake()

    def mark_dead(self, url: str, reason: str) -> None:
        """Send this server nothing any more."""
        if url in self._live:
            self._live.remove(url)
            self._dead[url] = reason
            log.warning("SGLang server %s counts as dead: %s", url, reason)
            self._wake()

    def hold(self) -> None:
        """Send no new samples' requests until `release`; those that are in flight go on."""
        self._held = True

    def release(self) -> None:
        self._held = False
        self._wake()

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
            out.append(_log_probs(url, "the probe", list(ids[1:]), entries[1:]))
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
            BadAnswer: an answer without log-probs, with ones that are not finite, or of other weights.
            ValueError: for a prompt that is empty, too long or outside the vocabulary.
        """
        self._check(prompts, params)
        return self._http.run(_Draw(self, prompts, params, on_progress, on_group).run(should_stop))

    async def draw(self, prompt: Prompt, index: int, params: SamplingParams, call: str) -> Sample:
        """One sample, whatever fails on the way; raises NoServer when none is left."""
        for _ in range(_MAX_ABORTS):
            sample = _Response(prompt, index, params)
            while sample.finish_reason is None:
                before = self.version
                url, answer = await self._ask(_request(sample), call)
                sample.add(url, answer, (before, self.version), self.own_names)
            if sample.finish_reason != "abort":
                return sample.finished(self._decode)
        raise BadAnswer(f"prompt {prompt.id!r}, sample {index}: aborted {_MAX_ABORTS} times")

    async def _ask(self, payload: dict[str, Any], call: str) -> tuple[str, Any]:
        """A server and its answer; servers that fail are tried again, then left out."""
        while True:
            url = await self._acquire()
            # Never the same twice: a server may not have noticed that the one before was given up.
            rid = f"{call}-{uuid4().hex}"
            self._in_flight.add(rid)
            try:
                answer = await self._http.request(
                    self._generate_url or url, "/generate", {**payload, "rid": rid}, timeout=self._timeout
                )
                self._failures[url] = 0
                return url, answer
            except (ServerGone, ServerError) as error:
                if isinstance(error, ServerError) and error.status < _SERVER_ERROR:
                    raise
                failure = error
            finally:
                self._in_flight.discard(rid)
                await self._release(url)
            await self._failed(url, failure)

    async def _failed(self, url: str, error: ServerGone | ServerError) -> None:
        """Wait before the next try, or give the server up."""
        count = self._failures[url] = self._failures.get(url, 0) + 1
        suspects = self.live if self._generate_url else [url]
        if isinstance(error, ServerTimeout) or count > self._retries:
            for suspect in suspects:
                self.mark_dead(suspect, str(error))
            return
        for suspect in suspects:
            try:
                await self._http.request(suspect, "/health", timeout=_HEALTH_TIMEOUT_SECONDS, method="GET")
            except (ServerGone, ServerError) as sick:
                self.mark_dead(suspect, f"{error}; then {sick}")
        pause = _FIRST_PAUSE_SECONDS * 2 ** (count - 1)
        log.info("%s; again in about %.2g s", error, pause)
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))

    async def abort(self, rids: Sequence[str]) -> None:
        """End requests, wherever they are; failures do not matter."""
        calls = [
            self._http.request(url, "/abort_request", {"rid": rid}, timeout=_HEALTH_TIMEOUT_SECONDS)
            for url in self._live
            for rid in rids
        ]
        await asyncio.gather(*calls, return_exceptions=True)

    def in_flight(self, call: str) -> list[str]:
        """Requests of a call that servers have and have not answered."""
        return [rid for rid in self._in_flight if rid.startswith(call)]

    async def _acquire(self) -> str:
        """The least loaded server, once it has room."""
        async with self._changed:
            while True:
                if not self._live:
                    raise NoServer
                if not self._held:
                    url = min(self._live, key=lambda u: (self._loads[u], random.random()))
                    if self._loads[url] < self._max_concurrency:
                        self._loads[url] += 1
                        return url
                await self._changed.wait()

    async def _release(self, url: str) -> None:
        async with self._changed:
            if url in self._loads:
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
        for prompt in prompts:
            self._check_tokens(prompt.token_ids, f"prompt {prompt.id!r}")
            if len(prompt.token_ids) + params.max_new_tokens > self._max_positions:
                raise ValueError(
                    f"prompt {prompt.id!r}: {len(prompt.token_ids)} tokens and max_new_tokens "
                    f"{params.max_new_tokens} exceed the model's {self._max_positions} positions"
                )


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


def _request(sample: _Response) -> dict[str, Any]:
    """The rest of a sample, as /generate takes it."""
    params, drawn = sample.params, len(sample.token_ids)
    key = f"{params.seed}/{sample.index}/{drawn}/{sample.prompt.id}".encode()
    return dict(
        input_ids=[*sample.prompt.token_ids, *sample.token_ids],
        sampling_params=dict(
            max_new_tokens=params.max_new_tokens - drawn,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            min_p=params.min_p,
            stop_token_ids=list(params.stop_token_ids),
            # With it SGLang looks at no stop token at all.
            ignore_eos=not params.stop_token_ids,
            # Taken by servers with deterministic inference only.
            sampling_seed=int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1,
            skip_special_tokens=False,
        ),
        return_logprob=True,
    )


class _Response:
    """A sample while it is drawn: more than one answer where a server stopped at an end-of-sequence
    token of the model's own config, which the sampling does not count as one."""

    def __init__(self, prompt: Prompt, index: int, params: SamplingParams) -> None:
        self.prompt, self.index, self.params = prompt, index, params
        self.token_ids: list[int] = []
        self.finish_reason: Any = None
        self._log_probs: list[float] = []
        self._spans: list[VersionSpan] = []

    def add(self, url: str, answer: Any, versions: tuple[int, int], own_names: Mapping[str, int]) -> None:
        """Take an answer; `versions`: the weights in use when it was asked for, and now."""
        who = f"prompt {self.prompt.id!r}, sample {self.index}"
        try:
            ids, meta = answer["output_ids"], answer["meta_info"]
            reason = meta["finish_reason"]["type"]
        except (TypeError, KeyError) as error:
            raise BadAnswer(f"{url}, {who}: not a sample: {answer!r:.300}") from error
        if reason not in ("stop", "length", "abort"):
            raise BadAnswer(f"{url}, {who}: unknown finish reason {reason!r}")
        if reason == "abort":
            self.finish_reason = reason
            return
        if not ids:
            raise BadAnswer(f"{url}, {who}: no tokens")
        self._log_probs += _log_probs(url, who, ids, meta.get("output_token_logprobs") or [])
        self._spans += _spans(url, who, meta, len(self.token_ids), len(ids), versions, own_names)
        self.token_ids += ids
        stopped_early = reason == "stop" and ids[-1] not in self.params.stop_token_ids
        if not stopped_early:
            self.finish_reason = reason
        elif len(self.token_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def finished(self, decode: Callable[[Sequence[int]], str]) -> Sample:
        return Sample(
            prompt=self.prompt,
            index=self.index,
            token_ids=self.token_ids,
            log_probs=self._log_probs,
            finish_reason=self.finish_reason,
            weight_versions=tuple(self._spans),
            text=decode(self.token_ids),
        )


def _log_probs(url: str, who: str, ids: Sequence[int], entries: Sequence[Any]) -> list[float]:
    """The log-probs of `ids` out of SGLang's [log-prob, id, text] triples."""
    if len(entries) != len(ids) or [e[1] for e in entries] != list(ids):
        raise BadAnswer(f"{url}, {who}: log-probs of {len(entries)} tokens for {len(ids)}, or of others")
    values = [e[0] for e in entries]
    for t, value in enumerate(values):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadAnswer(f"{url}, {who}: the log-prob of token {t} is {value!r}")
    return values


def _spans(
    url: str,
    who: str,
    meta: dict[str, Any],
    start: int,
    count: int,
    versions: tuple[int, int],
    own_names: Mapping[str, int],
) -> list[VersionSpan]:
    """Which weights drew which of an answer's `count` tokens, the first being the response's `start`.

    Raises BadAnswer for weights that no sync left there, such as those of a server that started anew.
    """
    # Releases before 0.5.21 name the version at the end only; they draw nothing during an update.
    given = meta.get("weight_versions") or [{"version": meta.get("weight_version"), "start": 0, "end": count}]
    spans = []
    for span in given:
        name, low, high = str(span.get("version")), span.get("start"), span.get("end")
        version = str(own_names.get(name)) if own_names else name
        if not str(version).isdecimal() or not versions[0] <= int(version) <= versions[1]:
            raise BadAnswer(
                f"{url}, {who}: drawn with weights of version {name!r}, not {versions[0]} to {versions[1]}"
            )
        spans.append(VersionSpan(int(version), start + low, start + high))
    return spans
