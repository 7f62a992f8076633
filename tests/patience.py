"""How long tests wait for what has to come.

Such a wait is a guard against hanging and says nothing about speed, so it is far longer than what it waits
for ever takes. DGPO_TEST_PATIENCE is a factor on every one of them, for a machine that is busier still.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
FACTOR = float(os.environ.get("DGPO_TEST_PATIENCE") or 1)
if not FACTOR > 0:
    raise ValueError(f"DGPO_TEST_PATIENCE is {FACTOR:g}, expected a factor greater than 0")


def patience(seconds: float = 600) -> int:
    """Seconds, times the factor. A test names them only where it needs one wait to end before another."""
    return math.ceil(seconds * FACTOR)


def until(condition: Callable[[], T], what: str = "the condition", *, pause: float = 0.02) -> T:
    """The condition's value as soon as it is true. Raises AssertionError when patience is at its end."""
    deadline = time.monotonic() + (limit := patience())
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(pause)
    return value
