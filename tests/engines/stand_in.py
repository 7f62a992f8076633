"""A server in front of a real one that does something else where a test wants it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from patience import patience

Ask = Callable[[str, Any], Awaitable[web.Response]]
"""Path and payload -> what the real server answers."""
Answer = Callable[[str, Any, Ask], Awaitable[web.Response]]
"""Path, payload, and a way to ask the real server -> what to answer."""

_JSON = {"Content-Type": "application/json"}
OK = {"success": True, "message": "done"}


@contextmanager
def stand_in(real: str, answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the paths of the control calls that it has got, in order."""
    calls: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()

        async def ask(path: str, payload: Any) -> web.Response:
            data = None if payload is None else json.dumps(payload)
            async with (
                aiohttp.ClientSession() as session,
                session.request(request.method, real + path, data=data, headers=_JSON) as got,
            ):
                return web.Response(text=await got.text(), status=got.status, content_type="application/json")

        if request.method == "GET":
            return await ask(request.path, None)
        if request.path != "/generate":
            calls.append(request.path)
        return await answer(request.path, json.loads(body or b"null"), ask)

    async def serve() -> int:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(site._server.sockets[0].getsockname()[1])  # type: ignore[union-attr]

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(serve(), loop).result(patience())}", calls
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def failing(statuses: Mapping[str, int]) -> Answer:
    """These paths with these statuses; everything else as the real server."""

    async def answer(path: str, payload: Any, ask: Ask) -> web.Response:
        if path in statuses:
            return web.Response(status=statuses[path], text="made to fail")
        return await ask(path, payload)

    return answer


def dummy(statuses: Mapping[str, int]) -> Answer:
    """Says yes to every call and does nothing, but for these paths: 0 never answers."""

    async def answer(path: str, payload: Any, ask: Ask) -> web.Response:
        status = statuses.get(path, 200)
        if status == 0:
            await asyncio.sleep(3600)
        return web.json_response(OK if status == 200 else {"message": "made to fail"}, status=status)

    return answer


async def without_sessions(path: str, payload: Any, ask: Ask) -> web.Response:
    """A release before 0.5.21: it takes weights at any time between pause and continue."""
    if path in ("/begin_weight_update", "/end_weight_update"):
        return web.Response(status=404, text="not found")
    if path == "/continue_generation":
        await ask("/end_weight_update", {})
    got = await ask(path, payload)
    if path == "/pause_generation":
        await ask("/begin_weight_update", {"selector": "all"})
    return got
