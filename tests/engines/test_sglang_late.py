"""What a late sample, a failed health check and a pause say of a server; the servers are stand-ins whose
answers come at once, or not at all."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from patience import patience, until
from test_sglang_client import client_of, complete, serving

from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.sglang import health
from megatron_dgpo.rollout.sglang.client import SampleLate
from megatron_dgpo.types import Prompt

LIMIT = 1.0
"""Seconds that a sample may take here."""
PROMPTS = [Prompt(f"p{i}", (i + 1,), "", "") for i in range(8)]
ONE = SamplingParams(max_new_tokens=1, n=1)


def drawing(late: Callable[[int, int], bool], asked: list[int] | None = None) -> Any:
    """Answers of a server; `late(prompt's token, times that it was asked for)`: not at all."""
    times: Counter[int] = Counter()

    async def handle(request: web.Request) -> web.Response:
        if request.path != "/generate":
            return web.json_response({})
        token = (await request.json())["input_ids"][0]
        times[token] += 1
        if asked is not None:
            asked.append(token)
        if late(token, times[token]):
            await asyncio.sleep(3600)
        meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-1.0, 5, None]]}
        return web.json_response({"output_ids": [5], "meta_info": {**meta, "weight_version": "0"}})

    return handle


def test_a_late_sample_costs_no_server(caplog: pytest.LogCaptureFixture) -> None:
    first: list[int] = []
    with (
        serving(drawing(lambda token, count: token == 3, first)) as one,
        serving(drawing(lambda token, count: token == 6 and count == 1)) as two,
        client_of(one, two, request_timeout=LIMIT) as client,
    ):
        complete(client.generate(PROMPTS, ONE))
        assert client.live == [one, two]
        # It was sent to the other one where there is one.
        assert first.count(3) <= 1
        client.mark_dead(one, "gone")
        complete(client.generate(PROMPTS, ONE))
        assert client.live == [two]
    with (
        serving(drawing(lambda token, count: token == 6 and count == 1)) as one,
        client_of(one, request_timeout=LIMIT) as client,
    ):
        complete(client.generate(PROMPTS, ONE))
        assert client.live == [one]
        assert "no answer to /generate in 1 s; the sample is drawn again" in caplog.text


def test_a_sample_that_is_late_twice_is_named_with_what_would_help() -> None:
    """Others keep coming, so the server is not to blame."""

    async def keep_coming(client: Any, url: str) -> None:
        while True:
            client._health.answered(url)
            await asyncio.sleep(0.1)

    with (
        serving(drawing(lambda token, count: token == 3)) as one,
        client_of(one, request_timeout=LIMIT) as client,
    ):
        others = client._http.submit(keep_coming(client, one))
        with pytest.raises(SampleLate, match="second time, while .* rollout.sglang.request_timeout_seconds"):
            client.generate(PROMPTS, ONE)
        others.cancel()
        assert client.live == [one]


def test_a_server_from_which_nothing_comes_is_left_out() -> None:
    with (
        serving(drawing(lambda token, count: True)) as one,
        serving(drawing(lambda token, count: False)) as two,
        client_of(one, two, request_timeout=LIMIT) as client,
    ):
        complete(client.generate(PROMPTS, ONE))
        assert client.live == [two] and "no answer to /generate" in client.dead[one]
    with serving(drawing(lambda token, count: True)) as one, client_of(one, request_timeout=LIMIT) as client:
        started = time.monotonic()
        with pytest.raises(EnginesLost):  # one sample: the second time it is late
            client.generate(PROMPTS[:1], ONE)
        assert time.monotonic() - started < 2 * LIMIT + patience(30)


def test_a_sync_s_time_is_not_counted_against_a_server() -> None:
    with (
        serving(drawing(lambda token, count: count < 3)) as one,
        client_of(one, request_timeout=LIMIT, retries=0) as client,
    ):
        client._released = float("inf")  # as if one had ended after every request
        complete(client.generate(PROMPTS[:1], ONE))
        assert client.live == [one]


def test_health_is_asked_again_and_not_while_the_servers_are_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PAUSE_SECONDS", 0.01)
    seen: list[float] = []
    wrong = 2

    async def handle(request: web.Request) -> web.Response:
        seen.append(time.monotonic())
        return web.Response(status=503 if len(seen) <= wrong else 200)

    with serving(handle) as url, client_of(url) as client:
        error = RuntimeError("a request failed")
        client.hold()
        checks = [client._http.submit(client._check_health([url], error)) for _ in range(20)]
        time.sleep(0.3)
        assert not seen and not any(c.done() for c in checks)
        client.release()
        assert not any(c.result(patience()) for c in checks)
        assert len(seen) == 3 and client.live == [url]  # one check for all that ask
        wrong, seen[:] = 3, []
        assert client._http.run(client._check_health([url], error))
        assert "a request failed; then" in client.dead[url] and "answered 503" in client.dead[url]
    assert health._TRY_SECONDS > 20  # SGLang answers 503 by itself then
    with client_of("http://127.0.0.1:9") as client:
        assert client._http.run(client._check_health(["http://127.0.0.1:9"], error))
    until(lambda: not client.live, "the server counts as dead")
