"""The inspector's routes. All of them read; what reads files does so in threads.

/                 the list of runs             /run?run=NAME     a run
/assets/NAME      scripts and styles           /api/...          data, see `views.py`
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from megatron_dgpo.observe.inspect import guard, pages
from megatron_dgpo.observe.inspect.runs import Found, Refused, RunsFolder
from megatron_dgpo.observe.inspect.views import Views
from megatron_dgpo.observe.inspect.work import Key, Work

THREADS = 4
CACHE_BYTES = 256 << 20
_MOST_FILES = 64
"""Files of a credit log that one request may ask about."""
_LIST_SECONDS = 1.0
"""For so long a list of runs is handed out again, to as many clients as ask."""
_Parser = Callable[[str, str], Any]


# --- query parameters -------------------------------------------------------------------------------


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Refused(400, f"{name}: a whole number of at most nine digits is wanted, not {text[:40]!r}")
    return int(text)


def _word(name: str, text: str) -> str:
    if not re.fullmatch(r"[0-9a-f-]{1,40}", text):
        raise Refused(400, f"{name}: {text[:40]!r} is not of the form that the inspector hands out")
    return text


def _text(name: str, text: str) -> str:
    return text


def _places(name: str, text: str) -> list[tuple[int, int]]:
    """`12-0,12-1` to [(12, 0), (12, 1)]."""
    words = text.split(",")
    if len(words) > _MOST_FILES:
        raise Refused(400, f"{name}: at most {_MOST_FILES} files at once, not {len(words)}")
    places = []
    for word in words:
        if not re.fullmatch(r"[0-9]{1,9}-[0-9]{1,9}", word):
            raise Refused(400, f"{name}: steps and replicas such as 12-0,12-1 are wanted, not {word[:40]!r}")
        step, _, replica = word.partition("-")
        places.append((int(step), int(replica)))
    return places


def query(
    request: web.Request, wanted: Mapping[str, _Parser], optional: Mapping[str, _Parser] | None = None
) -> dict[str, Any]:
    """The query's parameters: each of `wanted` once, of `optional` at most once, and no others.

    Raises Refused with status 400.
    """
    known = {**wanted, **(optional or {})}
    for name in request.query:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise Refused(400, f"{name[:40]!r} is not a parameter of this; it takes {takes}")
    found = {}
    for name, parse in known.items():
        values = request.query.getall(name, [])
        if not values and name not in wanted:
            continue
        if len(values) != 1:
            raise Refused(400, f"{name}: is wanted once, and was given {len(values)} times")
        found[name] = parse(name, values[0])
    return found


# --- routes -----------------------------------------------------------------------------------------


class Inspector:
    """The handlers, over the runs of one folder."""

    def __init__(self, folder: RunsFolder) -> None:
        self._work = Work(threads=THREADS, most_bytes=CACHE_BYTES)
        self._views = Views(folder, self._work.cache)
        self._assets = pages.assets()

    def app(self, host: str) -> web.Application:
        app = web.Application(middlewares=[guard.middleware(host)])
        app.on_response_prepare.append(guard.add_headers)
        for path, handler in (
            ("/", self.list_page),
            ("/run", self.run_page),
            ("/assets/{name}", self.asset),
            ("/api/runs", self.runs),
            ("/api/overview", self.overview),
            ("/api/news", self.news),
            ("/api/files", self.files),
            ("/api/sample", self.sample),
        ):
            app.router.add_get(path, handler)
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        self._work.close()

    async def list_page(self, request: web.Request) -> web.Response:
        query(request, {})
        return self._asset(request, pages.LIST)

    async def run_page(self, request: web.Request) -> web.Response:
        asked = query(request, {"run": _text}, {"compare": _text})
        for name in asked.values():
            await self._run({"run": name})
        return self._asset(request, pages.RUN)

    async def asset(self, request: web.Request) -> web.Response:
        return self._asset(request, request.match_info["name"])

    def _asset(self, request: web.Request, name: str) -> web.Response:
        asset = self._assets.get(name)
        if asset is None:
            raise Refused(404, "there is nothing of this name")
        return _answer(request, asset.content, asset.kind)

    async def runs(self, request: web.Request) -> web.Response:
        query(request, {})
        tick = int(asyncio.get_running_loop().time() / _LIST_SECONDS)
        return _answer(request, await self._work.kept(("runs", tick), self._views.runs))

    async def overview(self, request: web.Request) -> web.Response:
        run = await self._run(query(request, {"run": _text}))
        key = await self._work.run(self._views.state_key, run)
        return _answer(request, await self._work.kept(key, lambda: self._views.overview(run)))

    async def news(self, request: web.Request) -> web.Response:
        asked = query(request, {"run": _text, "metrics": _word, "advisories": _word, "digest": _word})
        run = await self._run(asked)
        cursors = {name: asked[name] for name in ("metrics", "advisories")}
        return _answer(request, await self._work.run(self._views.news, run, cursors, asked["digest"]))

    async def files(self, request: web.Request) -> web.Response:
        asked = query(request, {"run": _text, "want": _places})
        run = await self._run(asked)
        return _answer(request, await self._work.run(self._views.files, run, asked["want"]))

    async def sample(self, request: web.Request) -> web.Response:
        asked = query(request, {"run": _text, "step": _number, "replica": _number, "row": _number})
        run = await self._run(asked)
        place = (asked["step"], asked["replica"], asked["row"])
        key: Key = await self._work.run(self._views.sample_key, run, *place)
        body = await self._work.kept(key, lambda: self._views.sample(run, *place))
        return _answer(request, body, "application/octet-stream")

    async def _run(self, asked: Mapping[str, Any]) -> Found:
        found: Found = await self._work.run(self._views.run, asked["run"])
        return found


def _answer(request: web.Request, body: bytes, kind: str = "application/json") -> web.Response:
    """The body, or "304 Not Modified" to who has it already."""
    tag = hashlib.blake2b(body, digest_size=16).hexdigest()
    headers = {"ETag": f'"{tag}"'}
    if any(known.value == tag for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    charset = "utf-8" if kind.startswith("text/") else None
    return web.Response(body=body, content_type=kind, charset=charset, headers=headers)
