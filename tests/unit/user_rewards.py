"""Reward functions of a user's, for the tests of import paths."""

from __future__ import annotations

import asyncio
import math
import threading
import time

from patience import patience


def digits(text, gold, *, finish_reason, metadata):
    """The share of the gold answer's digits in the text; sleeps, crashes or answers nonsense when told to."""
    if text == "sleep":
        time.sleep(60)
    if text == "crash":
        raise RuntimeError("no such answer")
    if text == "nan":
        return math.nan
    if text == "nothing":
        return {"parts": 1}
    found = sum(d in text for d in gold) / len(gold)
    return {"reward": found, "stopped": finish_reason == "stop", "level": metadata.get("level", 0)}


async def judge(text, gold, *, finish_reason, metadata):
    await asyncio.sleep(60 if text == "sleep" else 0.2)
    if text == "crash":
        raise RuntimeError("no such answer")
    return float(gold in text)


RELEASED = threading.Event()
"""Lets go of `blocking`."""


async def blocking(text, gold, *, finish_reason, metadata):
    """Waits without giving control back, when told to."""
    if text == "block":
        RELEASED.wait(patience())
    return float(gold in text)


STARTED: list[str] = []
MOST = [0]
"""Calls of `counted` that are under way, and the most that ever were."""


async def counted(text, gold, *, finish_reason, metadata):
    STARTED.append(text)
    MOST[0] = max(MOST[0], len(STARTED))
    await asyncio.sleep(0.001)
    STARTED.pop()
    return 1.0


def steering(text, gold, *, finish_reason, metadata):
    return {"reward": 0.0, text: 1.0}


NOT_A_FUNCTION = 3
