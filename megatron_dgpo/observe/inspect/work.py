"""Work on files beside the event loop, its results kept within a bound."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Key = tuple[Hashable, ...]


class Cache:
    """Bytes by key, the least recently used ones dropped when all are more than `most_bytes`. Any thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0

    def get(self, key: Key) -> bytes | None:
        with self._lock:
            value = self._kept.get(key)
            if value is not None:
                self._kept.move_to_end(key)
            return value

    def put(self, key: Key, value: bytes) -> None:
        if len(value) > self._most // 4:  # one answer must not push out all the others
            return
        with self._lock:
            self.size += len(value) - len(self._kept.pop(key, b""))
            self._kept[key] = value
            while self.size > self._most:
                self.size -= len(self._kept.popitem(last=False)[1])


class Work:
    """Runs functions in a few threads. Whoever asks for a key that is being made waits for that one."""

    def __init__(self, *, threads: int, most_bytes: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="inspect")
        self.cache = Cache(most_bytes)
        self._making: dict[Key, asyncio.Future[bytes]] = {}

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def kept(self, key: Key, make: Callable[[], bytes]) -> bytes:
        """`make()`, or what it gave for this key before. A key holds all that the bytes depend on, such as
        a file's time and size."""
        known = self.cache.get(key)
        if known is not None:
            return known
        future = self._making.get(key)
        if future is None:
            future = asyncio.get_running_loop().run_in_executor(self._threads, make)
            self._making[key] = future
            future.add_done_callback(lambda done: self._made(key, done))
        # A client that goes away ends its own waiting and not the work that others wait for.
        return await asyncio.shield(future)

    def _made(self, key: Key, done: asyncio.Future[bytes]) -> None:
        del self._making[key]
        if not done.cancelled() and done.exception() is None:
            self.cache.put(key, done.result())

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
