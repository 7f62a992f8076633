"""Settings that change over a run."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def scheduled(start: float, end: float, schedule: str, progress: float) -> float:
    """The value at `progress`, from 0 (start) to 1 (end).

    "linear": a straight line; "cosine": half a period of a cosine, flat at both ends; "constant": start.
    Raises ValueError for another schedule or a progress outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress}: must be from 0 to 1")
    if schedule == "constant":
        return start
    if schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return start + (end - start) * progress
