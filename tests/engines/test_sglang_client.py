"""Samples from real SGLang servers against transformers' own forward pass, and servers that misbehave."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from conftest import CONFIG_EOS
from patience import patience, until
from tiny import VOCAB, hf_model

from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.sglang import client as client_module
from megatron_dgpo.rollout.sglang.client import BadAnswer, RouterFailed, SGLangClient
from megatron_dgpo.rollout.sglang.router import take_out
from megatron_dgpo.rollout.sglang.servers import ServerFailed, ServerProcess, workers_of_router
from megatron_dgpo.types import Group, Prompt, Sample

BOUND = 1e-4
LIMIT = 64
"""Positions of the tiny models."""
PROMPTS = [Prompt(f"p{i}", tuple((3 * i + k) % VOCAB for k in range(i + 1)), "", "") for i in range(6)]


@contextmanager
def client_of(*urls: str, **more: Any) -> Iterator[SGLangClient]:
    settings = dict(
        max_concurrency=64,
        request_timeout=patience(),
        retries=2,
        decode=lambda ids: " ".join(map(str, ids)),
        vocab_size=VOCAB,
        max_positions=LIMIT,
    )
    client = SGLangClient(urls, **{**settings, **more})
    client.version = 0
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def urls(servers: dict[str, ServerProcess]) -> dict[str, str]:
    """Of servers whose weights have a number, as after a sync."""
    found = {name: server.url for name, server in servers.items()}
    with client_of(*found.values()) as client:
        for url in found.values():
            client.submit(url, "/update_weight_version", {"new_version": "0"}, timeout=patience()).result()
    return found


def complete(groups: Sequence[Group | None]) -> list[Group]:
    assert all(g is not None for g in groups)
    return [g for g in groups if g is not None]


def reference_logits(folder: Path, sample: Sample) -> torch.Tensor:
    """(response tokens, V) transformers' logits at the sample's tokens."""
    ids = [*sample.prompt.token_ids, *sample.token_ids]
    with torch.no_grad():
        logits = hf_model(folder)(torch.tensor([ids])).logits[0]
    return logits[len(sample.prompt.token_ids) - 1 : -1]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.1},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_log_probs_are_those_of_transformers_before_any_filter(
    how: dict[str, Any], urls: dict[str, str], folders: dict[str, Path]
) -> None:
    params = SamplingParams(max_new_tokens=12, n=2, **how)
    with client_of(urls["qwen2"]) as client:
        groups = complete(client.generate(PROMPTS, params))
    assert [g.prompt for g in groups] == PROMPTS
    for group in groups:
        assert [s.index for s in group.samples] == [0, 1]
        for sample in group.samples:
            assert sample.finish_reason == "length" and len(sample.token_ids) == 12
            assert [(v.version, v.start, v.end) for v in sample.weight_versions] == [(0, 0, 12)]
            assert sample.text == " ".join(map(str, sample.token_ids))
            logits = reference_logits(folders["qwen2"], sample)
            chosen = torch.tensor(sample.token_ids).unsqueeze(1)
            log_probs = (logits / (params.temperature or 1.0)).log_softmax(-1).gather(1, chosen).squeeze(1)
            assert (log_probs - torch.tensor(sample.log_probs)).abs().max() <= BOUND
            if params.greedy:
                assert sample.token_ids == logits.argmax(-1).tolist()
            if params.top_k:
                assert bool((logits.topk(5).indices == chosen).any(-1).all())


def test_scores_are_those_of_transformers(urls: dict[str, str], folders: dict[str, Path]) -> None:
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, VOCAB - 1, (n,), generator=g).tolist() for n in (2, 9, 40)]
    with client_of(urls["llama"]) as client:
        scores = client.log_probs(urls["llama"], ids)
        with pytest.raises(ValueError, match="sequence 1: SGLang does not score the last id"):
            client.log_probs(urls["llama"], [[1, 2], [1, VOCAB - 1]])
    model = hf_model(folders["llama"])
    for row, tokens in zip(scores, ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        want = logits.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
        assert (want - torch.tensor(row)).abs().max() <= BOUND


def test_only_the_given_tokens_end_a_response(urls: dict[str, str], folders: dict[str, Path]) -> None:
    """The server stops at its config's end of sequence; the client goes on."""
    stops = (3, 11)
    params = SamplingParams(max_new_tokens=40, n=24, stop_token_ids=stops)
    with client_of(urls["ends"]) as client:
        samples = [s for g in complete(client.generate(PROMPTS, params)) for s in g.samples]
    for s in samples:
        if s.finish_reason == "stop":
            assert s.token_ids[-1] in stops and not set(s.token_ids[:-1]) & set(stops)
            assert s.text == " ".join(map(str, s.token_ids[:-1]))
        else:
            assert len(s.token_ids) == 40 and not set(s.token_ids) & set(stops)
        assert len(s.log_probs) == len(s.token_ids) == s.weight_versions[-1].end
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    beyond = [s for s in samples if CONFIG_EOS in s.token_ids[:-1]]
    assert len(beyond) > 5
    for s in beyond[:5]:
        chosen = torch.tensor(s.token_ids).unsqueeze(1)
        want = reference_logits(folders["qwen2"], s).log_softmax(-1).gather(1, chosen).squeeze(1)
        assert (want - torch.tensor(s.log_probs)).abs().max() <= BOUND


def test_many_samples_through_few_slots(urls: dict[str, str]) -> None:
    done: list[int] = []
    with client_of(urls["qwen2"], urls["ends"], max_concurrency=4) as client:
        groups = complete(
            client.generate(PROMPTS, SamplingParams(max_new_tokens=8, n=32), on_progress=done.append)
        )
    assert sum(done) == 6 * 32
    for group in groups:
        assert len({tuple(s.token_ids) for s in group.samples}) > 16


def test_a_call_can_be_ended_early(urls: dict[str, str]) -> None:
    come: list[Group] = []
    with client_of(urls["qwen2"], max_concurrency=2) as client:
        groups = client.generate(
            PROMPTS * 4,
            SamplingParams(max_new_tokens=52, n=2),
            on_group=come.append,
            should_stop=lambda: len(come) >= 3,
        )
        whole = [g for g in groups if g is not None]
        assert 3 <= len(whole) < len(groups)
        assert {id(g) for g in whole} == {id(g) for g in come}
        # Nothing is left behind that the next call would wait for.
        started = time.monotonic()
        complete(client.generate(PROMPTS[:1], SamplingParams(max_new_tokens=1)))
        assert time.monotonic() - started < patience(100)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt("far", (1, VOCAB), "", ""), f"prompt 'far' has token id {VOCAB}"),
        (Prompt("none", (), "", ""), "prompt 'none' has no tokens"),
        (Prompt("long", (1,) * 60, "", ""), "prompt 'long': 60 tokens and max_new_tokens 8 exceed"),
    ],
)
def test_prompts_that_no_server_may_see_are_refused(prompt: Prompt, says: str, urls: dict[str, str]) -> None:
    with client_of(urls["qwen2"]) as client:
        with pytest.raises(ValueError, match=says):
            client.generate([*PROMPTS, prompt], SamplingParams(max_new_tokens=8))
        complete(client.generate(PROMPTS, SamplingParams(max_new_tokens=2)))  # the server is well


# --- servers that misbehave ---------------------------------------------------------------------------


@contextmanager
def serving(handle: Callable[[web.Request], Any]) -> Iterator[str]:
    """A server whose answers `handle` gives; its URL."""

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def serve() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(site._server.sockets[0].getsockname()[1])
        ready.set()

    async def end() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await runner.cleanup()

    ports: list[int] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(serve(), loop)
    assert ready.wait(patience())
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(patience())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def passed_on(request: web.Request, url: str) -> tuple[int, str]:
    """Status and text of what the server at `url` answers."""
    body = await request.read()
    async with (
        aiohttp.ClientSession() as session,
        session.request(request.method, url + request.path_qs, data=body, headers=_JSON) as real,
    ):
        return real.status, await real.text()


def dropped(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


@contextmanager
def between(
    url: str,
    fault: Callable[[int, dict[str, Any]], Any],
    *,
    unknown: Sequence[str] = (),
    alive: Callable[[], bool] = lambda: True,
) -> Iterator[str]:
    """A server that passes everything on to the one at `url`, but for samples: `fault` gets each
    request's number and the real answer, and says what to answer: a value, a web.Response, or None to
    drop the connection. It does not know the `unknown` paths, and drops all while not `alive`."""
    count = itertools.count()

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path in unknown:
            return web.Response(status=404)
        if not alive():
            return dropped(request)
        status, text = await passed_on(request, url)
        if request.path != "/generate":
            return web.Response(text=text, status=status, content_type="application/json")
        answer = fault(next(count), json.loads(text))
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer is None:
            return dropped(request)
        return answer if isinstance(answer, web.Response) else web.json_response(answer)

    with serving(handle) as own:
        yield own


_JSON = {"Content-Type": "application/json"}
FEW = SamplingParams(max_new_tokens=6, n=2)


CUT_SHORT = "|".join(
    f"'{p.id}', .*'length' after 4 of the 6 tokens asked for, {len(p.token_ids)} being given" for p in PROMPTS
)
"""Of whichever prompt is answered first."""


def cut(answer: dict[str, Any], count: int) -> dict[str, Any]:
    """An answer with this many tokens."""
    meta = answer["meta_info"]
    answer["output_ids"] = (answer["output_ids"] * 2)[:count]
    meta["output_token_logprobs"] = (meta["output_token_logprobs"] * 2)[:count]
    return answer


def changed(**how: Any) -> Callable[[int, dict[str, Any]], Any]:
    """The first answer's meta_info with other values; a callable one gets the real value."""

    def fault(number: int, answer: dict[str, Any]) -> dict[str, Any]:
        if number == 0:
            meta = answer["meta_info"]
            meta |= {k: v(meta[k]) if callable(v) else v for k, v in how.items()}
        return answer

    return fault


@pytest.mark.parametrize("failure", [web.Response, lambda **_: None], ids=["status", "connection dropped"])
def test_failures_of_requests_that_run_at_once_do_not_add_up(failure: Any, urls: dict[str, str]) -> None:
    """All 12 requests are in flight when the server fails, and each may be sent again once."""
    arrived, all_there = itertools.count(1), asyncio.Event()

    async def blip() -> Any:
        if next(arrived) == 12:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), patience())
        return failure(status=503, text="oh")

    def fault(number: int, answer: Any) -> Any:
        return blip() if number < 12 else answer

    with between(urls["qwen2"], fault) as url, client_of(url, max_concurrency=12, retries=1) as client:
        groups = complete(client.generate(PROMPTS, FEW))
        assert [len(g.samples) for g in groups] == [2] * 6 and client.live == [url]


def test_new_servers_do_not_undo_the_bound_on_requests(urls: dict[str, str]) -> None:
    """`set_servers` comes while a request is in flight."""
    active, peak = 0, 0

    async def slow(answer: Any) -> Any:
        nonlocal active, peak
        active, peak = active + 1, max(peak, active + 1)
        client.set_servers([url])
        await asyncio.sleep(0.05)
        active -= 1
        return answer

    with (
        between(urls["qwen2"], lambda number, answer: slow(answer) if number < 4 else answer) as url,
        client_of(url, max_concurrency=1) as client,
    ):
        complete(client.generate(PROMPTS, FEW))
        complete(client.generate(PROMPTS[:2], FEW))
    assert peak == 1


def test_control_calls_do_not_meet_a_connection_that_was_closed_meanwhile() -> None:
    """A server that answers one request a connection, and does not say so."""
    seen: list[int] = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append(1)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.read(1)  # the next request, or the end
        writer.close()

    async def serve() -> str:
        server = await asyncio.start_server(once, "127.0.0.1", 0)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    with client_of() as client:
        url = client._http.run(serve())
        for _ in range(3):
            assert client.submit(url, "/continue_generation", timeout=patience()).result() == {}
    assert len(seen) == 3


def impatient_with(url: str, request: Any, to: str, *args: Any, timeout: float, **more: Any) -> Any:
    """Only this server's time is short: the others may be as slow as the machine."""
    return request(to, *args, timeout=2 if to == url else timeout, **more)


async def _late(answer: Any) -> Any:
    await asyncio.sleep(3600)
    return answer


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda number, answer: web.Response(status=500, text="oh no"), "answered 500: oh no"),
        (lambda number, answer: None, "does not answer"),
        (lambda number, answer: _late(answer), "no answer to /generate in 2 s"),
    ],
    ids=["status 500", "connection dropped", "slow"],
)
def test_a_server_that_keeps_failing_is_left_out(
    fault: Any, says: str, urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with between(urls["qwen2"], fault) as url, client_of(url, urls["ends"]) as client:
        monkeypatch.setattr(client._http, "request", partial(impatient_with, url, client._http.request))
        groups = complete(client.generate(PROMPTS, FEW))
        assert [len(g.samples) for g in groups] == [2] * 6
        assert client.live == [urls["ends"]] and says in client.dead[url]
    with between(urls["qwen2"], fault) as url, client_of(url, request_timeout=2) as client:
        with pytest.raises(EnginesLost, match="no SGLang server is left") as lost:
            client.generate(PROMPTS, FEW)
        assert len(lost.value.groups) == 6 and url in str(lost.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (changed(output_token_logprobs=None), "log-probs of 0 tokens for 6"),
        (changed(output_token_logprobs=lambda x: x[:-1]), "log-probs of 5 tokens for 6"),
        (changed(output_token_logprobs=lambda x: [[None, *x[0][1:]], *x[1:]]), "log-prob of token 0 is None"),
        (changed(output_token_logprobs=lambda x: [*x[:5], [float("nan"), *x[5][1:]]]), "token 5 is nan"),
        (changed(output_token_logprobs=lambda x: [[-1.0, 2000, None], *x[1:]]), "or of others"),
        (changed(weight_versions=None, weight_version="default"), "weights of version 'default'"),
        (changed(weight_versions=[{"version": "4", "start": 0, "end": 6}]), "weights of version '4', not 0"),
        (changed(finish_reason={"type": "tired"}), "unknown finish reason 'tired'"),
        (lambda number, answer: web.Response(text="<html>"), "not a sample"),
        (lambda number, answer: cut(answer, 4), CUT_SHORT),
        (lambda number, answer: cut(answer, 7), "7 tokens, of 6 asked for"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_an_error(fault: Any, says: str, urls: dict[str, str]) -> None:
    with between(urls["qwen2"], fault) as url, client_of(url) as client:
        with pytest.raises(BadAnswer, match=says) as error:
            client.generate(PROMPTS, FEW)
        assert url in str(error.value)


def test_an_aborted_sample_is_drawn_again(urls: dict[str, str]) -> None:
    fault = changed(finish_reason={"type": "abort", "message": "paused"})
    with between(urls["qwen2"], fault) as url, client_of(url) as client:
        groups = complete(client.generate(PROMPTS, FEW))
    assert all(len(s.token_ids) == 6 and s.finish_reason == "length" for g in groups for s in g.samples)


def test_aborts_without_end_are_an_error_with_the_servers_reason(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MAX_ABORTS", 2)

    def fault(number: int, answer: dict[str, Any]) -> dict[str, Any]:
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "the queue is full"}
        return answer

    with between(urls["qwen2"], fault) as url, client_of(url) as client:
        with pytest.raises(BadAnswer, match=f"{url}, .*aborted 2 times; .*the queue is full"):
            client.generate(PROMPTS, FEW)


def test_sequences_that_the_server_would_cut_short(urls: dict[str, str]) -> None:
    """The client is told of more positions than the server has; it learns better, by asking or by the
    answer."""
    long = SamplingParams(max_new_tokens=LIMIT - 1)
    with client_of(urls["qwen2"], max_positions=2 * LIMIT) as client:
        with pytest.raises(
            ValueError, match=f"prompt 'p0': 1 tokens .* exceed {LIMIT - 6}: .*{urls['qwen2']}"
        ):
            client.generate(PROMPTS[:1], long)
    with (
        between(urls["qwen2"], lambda number, answer: answer, unknown=["/server_info"]) as url,
        client_of(url, max_positions=2 * LIMIT) as client,
    ):
        with pytest.raises(BadAnswer, match=f"{url}, .*after {LIMIT - 3} of the {LIMIT - 1} tokens"):
            client.generate(PROMPTS[:1], long)


def test_the_longest_sequence_that_is_let_through_comes_whole(urls: dict[str, str]) -> None:
    """Also where it is continued near its end, with all but the last token as the prompt."""
    params = SamplingParams(max_new_tokens=LIMIT - 6 - 6, n=32, stop_token_ids=(VOCAB - 1,))
    with client_of(urls["ends"]) as client:
        (group,) = complete(client.generate(PROMPTS[5:], params))
    assert {len(s.token_ids) for s in group.samples if s.finish_reason == "length"} == {LIMIT - 12}
    assert any(CONFIG_EOS in s.token_ids for s in group.samples)
    with client_of(urls["ends"]) as client:
        wide = Prompt("wide", (1,) * (LIMIT - 7), "", "")
        (group,) = complete(client.generate([wide], SamplingParams(max_new_tokens=1)))
    assert len(group.samples[0].token_ids) == 1


# --- a router -----------------------------------------------------------------------------------------


@contextmanager
def router_of(python: Path, workers: Sequence[str], log_file: Path, **options: Any) -> Iterator[str]:
    """A real sglang-router in front of these workers, with the options that README names; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = dict(
        worker_urls=list(workers),
        host="127.0.0.1",
        port=port,
        policy="round_robin",
        worker_startup_check_interval=1,
        disable_retries=True,
        disable_circuit_breaker=True,
        health_check_endpoint="/model_info",
        request_timeout_secs=int(patience()),
    )
    with log_file.open("ab") as log:
        command = [python, "-c", START_ROUTER, json.dumps({**settings, **options})]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:

        def ready() -> bool:
            assert process.poll() is None, log_file.read_text()
            try:
                return sorted(workers_of_router(url)) == sorted(workers)
            except ServerFailed:
                return False

        until(ready, "a router with its workers")
        yield url
    finally:
        process.kill()
        process.wait()


START_ROUTER = """
import json, sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
Router.from_args(RouterArgs(**json.loads(sys.argv[1]))).start()
"""
"""`python -m sglang_router.launch_router` imports SGLang too, which takes long and wants its GPU packages."""


@pytest.fixture(scope="module")
def router_python(sglang_python: Path) -> Path:
    if subprocess.run([sglang_python, "-c", "import sglang_router.router"], capture_output=True).returncode:
        pytest.skip(f"sglang-router is not installed beside {sglang_python} (make sglang)")
    return sglang_python


def counted(seen: list[int]) -> Callable[[int, dict[str, Any]], Any]:
    def fault(number: int, answer: dict[str, Any]) -> dict[str, Any]:
        seen.append(number)
        return answer

    return fault


def test_a_worker_that_dies_behind_a_router_is_taken_out(
    urls: dict[str, str], router_python: Path, tmp_path: Path
) -> None:
    first: list[int] = []
    with (
        between(urls["qwen2"], counted(first), alive=lambda: len(first) < 4) as mortal,
        router_of(router_python, [mortal, urls["ends"]], tmp_path / "log") as url,
        client_of(mortal, urls["ends"], generate_url=url, max_concurrency=2) as client,
    ):
        groups = complete(client.generate(PROMPTS * 2, FEW))
        assert [len(g.samples) for g in groups] == [2] * 12
        assert all(len(s.token_ids) == 6 for g in groups for s in g.samples)
        assert client.live == [urls["ends"]] and mortal in client.dead
        until(lambda: workers_of_router(url) == [urls["ends"]], "the worker is taken out")
        assert len(first) >= 4


@pytest.mark.parametrize("names", ["url", "query"])
def test_older_routers_have_other_names_for_a_worker_that_is_taken_out(names: str) -> None:
    """Some know workers by their URL, and the oldest have a path of their own for it."""
    workers = ["http://a:1", "http://b:2"]

    async def handle(request: web.Request) -> web.Response:
        asked = request.method, request.path
        if names == "query" and asked == ("POST", "/remove_worker"):
            workers.remove(request.query["url"])
        elif names == "url" and asked == ("GET", "/workers"):
            return web.json_response({"workers": [{"id": f"id of {w}", "url": w} for w in workers]})
        elif names == "url" and asked == ("DELETE", "/workers/http://b:2"):
            workers.remove("http://b:2")
        else:
            return web.Response(status=400 if asked[0] == "DELETE" else 404)
        return web.Response()

    with serving(handle) as url, client_of() as client:
        client._http.run(take_out(client._http, url, "http://b:2"))
    assert workers == ["http://a:1"]


def test_a_slow_sample_behind_a_router_is_drawn_again_and_kills_nobody(
    urls: dict[str, str], router_python: Path, tmp_path: Path
) -> None:
    with (
        between(urls["qwen2"], lambda number, answer: _late(answer) if number == 1 else answer) as worker,
        router_of(router_python, [worker, urls["ends"]], tmp_path / "log") as url,
        client_of(worker, urls["ends"], generate_url=url, request_timeout=6) as client,
    ):
        groups = complete(client.generate(PROMPTS, FEW))
        assert [len(g.samples) for g in groups] == [2] * 6
        assert client.live == [worker, urls["ends"]]


def test_a_request_that_a_router_repeats_while_a_worker_has_it_is_drawn_again(
    urls: dict[str, str], router_python: Path, tmp_path: Path
) -> None:
    """The router loses some connections, and its own retries, with the same request id, come back refused."""
    count, said, lost = itertools.count(), [], []

    async def handle(request: web.Request) -> web.Response:
        if request.path == "/generate" and next(count) < 6:
            lost.append(asyncio.ensure_future(passed_on(request, urls["qwen2"])))
            await asyncio.sleep(0.05)  # it arrives
            return dropped(request)
        status, text = await passed_on(request, urls["qwen2"])
        said.append(text if status == 400 else "")
        return web.Response(text=text, status=status, content_type="application/json")

    long = SamplingParams(max_new_tokens=50, n=8)
    with (
        serving(handle) as worker,
        router_of(router_python, [worker], tmp_path / "log", disable_retries=False) as url,
        client_of(worker, generate_url=url) as client,
    ):
        groups = complete(client.generate(PROMPTS, long))
        assert [len(g.samples) for g in groups] == [8] * 6 and client.live == [worker]
    assert any("Duplicate request ID" in text for text in said)


@pytest.mark.parametrize(
    ("fault", "limit", "says"),
    [
        (
            lambda number, answer: web.Response(status=500, text="oh no"),
            patience(),
            "answered 500: .*oh no.*; sent 3 times",
        ),
        (lambda number, answer: _late(answer), 1, "no answer to /generate in 1 s; sent 2 times"),
    ],
    ids=["status 500", "slow"],
)
def test_a_router_that_keeps_failing_is_named(
    fault: Any, limit: float, says: str, urls: dict[str, str], router_python: Path, tmp_path: Path
) -> None:
    with (
        between(urls["qwen2"], fault) as one,
        between(urls["ends"], fault) as two,
        router_of(router_python, [one, two], tmp_path / "log") as url,
        client_of(one, two, generate_url=url, request_timeout=limit) as client,
    ):
        with pytest.raises(
            RouterFailed, match=f"(?s)router {url}.*{says}.*its workers are well: {one}, {two}"
        ):
            client.generate(PROMPTS, FEW)
        assert client.live == [one, two]
