"""Reward functions of a user's, for the tests of import paths."""

from __future__ import annotations

import asyncio
import math
import time


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


NOT_A_FUNCTION = 3
