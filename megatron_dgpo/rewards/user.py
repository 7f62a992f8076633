"""A reward function of the user's own, by import path."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dgpo.rewards.answers import canonical, final_answer
from megatron_dgpo.rewards.base import Outcome, Reward
from megatron_dgpo.rewards.pool import ProcessPool, call_here
from megatron_dgpo.rewards.terms import RESERVED
from megatron_dgpo.types import Sample

log = logging.getLogger(__name__)

TASK = "megatron_dgpo.rewards.user:call"
CONCURRENT = 64
"""Coroutines that are under way at once; more wait, and their time with them."""
GRACE_SECONDS = 5.0
"""How much later than its time limit a coroutine may come back before it counts as one that blocks."""


class UserReward(Reward):
    """What `function(text, gold, finish_reason=..., metadata=...)` says of a response: a number, or a dict
    with "reward" and other numbers, which become parts.

    A plain function runs in worker processes where there are any, which end it when it takes too long; a
    coroutine runs in a thread of this process, up to CONCURRENT responses at once, each with the same time
    limit. An exception, a time-out or a value that is not a finite number fails the response; so does a
    coroutine that blocks, with all that it keeps from running.

    Raises ValueError for a path that cannot be imported, and in `outcomes` for a part with a RESERVED name.
    """

    def __init__(self, path: str, *, timeout_seconds: float = 10.0, num_workers: int = 0) -> None:
        super().__init__(timeout_seconds=timeout_seconds, num_workers=num_workers)
        self._path = path
        self._function = imported(path)
        self._is_async = inspect.iscoroutinefunction(self._function)
        pooled = num_workers and not self._is_async
        self._pool = ProcessPool(TASK, num_workers, timeout_seconds) if pooled else None

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        calls = [
            {
                "path": self._path,
                "text": s.text,
                "gold": s.prompt.answer,
                "finish_reason": s.finish_reason,
                "metadata": s.prompt.metadata,
            }
            for s in samples
        ]
        results: Sequence[dict[str, Any] | str]
        if self._is_async:
            results = self._all(calls)
        elif self._pool is not None:
            results = self._pool.map(calls)
        else:
            results = call_here(call, calls)
        taken = {name for r in results if not isinstance(r, str) for name in r["parts"]} & set(RESERVED)
        if taken:
            raise ValueError(
                f"reward.name: {self._path} returns {sorted(taken)[0]!r}, a name that the run itself gives a "
                f"part of the reward (as {', '.join(RESERVED)}); call it otherwise"
            )
        return [Outcome(error=r) if isinstance(r, str) else Outcome(r["value"], r["parts"]) for r in results]

    def _all(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any] | str]:
        """In a thread, which can be left alone with a coroutine that never gives control back."""
        results: list[dict[str, Any] | str | None] = [None] * len(calls)
        answered: queue.SimpleQueue[int] = queue.SimpleQueue()

        async def one(index: int, free: asyncio.Semaphore) -> None:
            async with free:
                results[index] = await self._one(calls[index])
            answered.put(index)

        async def everything() -> None:
            free = asyncio.Semaphore(CONCURRENT)
            await asyncio.gather(*(one(index, free) for index in range(len(calls))))

        threading.Thread(target=lambda: asyncio.run(everything()), name="user reward", daemon=True).start()
        try:
            for _ in calls:  # as long as nothing blocks, one comes back within the time limit
                answered.get(timeout=self.timeout_seconds + GRACE_SECONDS)
        except queue.Empty:
            log.warning("%s: a coroutine blocks the others; use await in it, or a plain function", self._path)
        blocked = f"timed out after {self.timeout_seconds:g} s: a coroutine of {self._path} blocks the others"
        return [blocked if result is None else result for result in list(results)]

    async def _one(self, given: dict[str, Any]) -> dict[str, Any] | str:
        arguments = {k: v for k, v in given.items() if k not in ("path", "text", "gold")}
        try:
            waiting = self._function(given["text"], given["gold"], **arguments)
            return checked(await asyncio.wait_for(waiting, self.timeout_seconds))
        except TimeoutError:
            return f"timed out after {self.timeout_seconds:g} s"
        except Exception as error:  # whatever the user's function raises is a failure of this one response
            return f"{type(error).__name__}: {error}"

    def canonical_answer(self, text: str) -> str | None:
        answer = final_answer(text)
        return None if answer is None else canonical(answer) or None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def imported(path: str) -> Callable[..., Any]:
    """The function at "package.module:function". Raises ValueError saying why there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"it cannot be imported ({error})") from error
    if not callable(found):
        raise ValueError(f"{module} has no function {name!r}")
    return found


def call(*, path: str, text: str, gold: str, finish_reason: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Score one response: {"value": ..., "parts": ...}. Raises what the function raises."""
    return checked(imported(path)(text, gold, finish_reason=finish_reason, metadata=metadata))


def checked(result: Any) -> dict[str, Any]:
    """{"value", "parts"} of what a function returned. Raises ValueError for anything but finite numbers."""
    given = dict(result) if isinstance(result, dict) else {"reward": result}
    if "reward" not in given:
        raise ValueError(f"the function returned {sorted(given)} and no 'reward'")
    for name, value in given.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return {"value": float(given.pop("reward")), "parts": {k: float(v) for k, v in given.items()}}
