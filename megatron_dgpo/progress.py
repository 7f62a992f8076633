"""How far long work has come: a bar on a terminal, and where none can be a line now and then.

In a log file (Slurm, nohup) the first line comes after half a minute, each of the next after twice the last
wait, up to five minutes. A thread writes them, so that work shows that finishes nothing for half an hour.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

DELAY_SECONDS = 3.0
"""Before work is worth a bar."""
FIRST_SECONDS = 30.0
"""Before work is worth a line; the environment's DGPO_PROGRESS_SECONDS may name others."""
LONGEST = 10
"""Times the first wait: the longest one between two lines."""
BYTES = "bytes"
"""A unit, shown in GB."""
_PACKAGE = "megatron_dgpo"

log = logging.getLogger(__name__)


class Bar(Protocol):
    def update(self, n: int = 1, /) -> object:
        """`n` more are done."""


def speaks() -> bool:
    """Whether this process shows the package's notes: rank 0 does, unless it is to be quiet."""
    return logging.getLogger(_PACKAGE).isEnabledFor(logging.INFO)


@contextmanager
def progress(
    name: str,
    total: int | None = None,
    unit: str = "",
    *,
    initial: int = 0,
    shown: bool | None = None,
    bar: bool = True,
) -> Iterator[Bar]:
    """Shows on stderr how far the work of this block is, if it takes long.

    Args:
        total: how many there are to do, if that is known; `initial` of them are done already.
        unit: what they are, in the plural.
        shown: None: where this process `speaks`.
        bar: whether to show a bar on a terminal; lines else, as of work in which there is nothing to count.
    """
    shown = speaks() if shown is None else shown
    if not shown or sys.stderr is None:
        yield _Nobody()
    elif bar and (unit or total is not None) and sys.stderr.isatty():
        with _terminal_bar(name, total, unit, initial) as moving:
            yield moving
    else:
        lines = _Lines(name, total, unit, initial)
        try:
            yield lines
            lines.end(done=True)
        finally:
            lines.end(done=False)


def watched(
    items: Iterable[T], name: str, total: int | None = None, unit: str = "", *, bar: bool = True
) -> Iterator[T]:
    """The items, with `progress` of how many the caller has taken."""
    with progress(name, total, unit, bar=bar) as moving:
        for item in items:
            yield item
            moving.update()


def describe(
    name: str,
    done: int,
    total: int | None,
    unit: str,
    seconds: float,
    *,
    initial: int = 0,
    over: bool = False,
) -> str:
    """A line: "rollout: 1,200 of 8,192 samples in 5 min 0 s, 4.0 per second, about 29 min 8 s left"."""
    parts = ["done"] if over else []
    parts.append(_count(done, total, unit) + _time(seconds))
    fresh = done - initial
    if fresh > 0 and seconds > 0:
        parts.append(_rate(fresh / seconds, unit))
        if total is not None and done < total and not over:
            parts.append(f"about {_time((total - done) * seconds / fresh)} left")
    return f"{name}: {', '.join(parts)}"


def waits(first: float) -> Iterator[float]:
    """Seconds before the first line, and between each and the next."""
    return (min(first * 2**n, first * LONGEST) for n in itertools.count())


class _Nobody:
    def update(self, n: int = 1) -> None:
        pass


class _Lines:
    """Lines of a log about one piece of work; a thread writes them, until `end`."""

    def __init__(self, name: str, total: int | None, unit: str, initial: int) -> None:
        self._what = name, total, unit, initial
        self._done, self._started = initial, time.monotonic()
        self._said = False
        self._ended, self._speaking = threading.Event(), threading.Lock()
        threading.Thread(target=self._run, name=f"progress of {name}", daemon=True).start()

    def update(self, n: int = 1) -> None:
        self._done += n

    def end(self, *, done: bool) -> None:
        """Of work that has said something, `done` says that it is over."""
        with self._speaking:  # nothing comes after the last word
            if done and self._said and not self._ended.is_set():
                self._say(over=True)
            self._ended.set()

    def _run(self) -> None:
        for seconds in waits(_first_seconds(os.environ.get("DGPO_PROGRESS_SECONDS", ""))):
            if self._ended.wait(min(seconds, threading.TIMEOUT_MAX)):
                return
            with self._speaking:
                if self._ended.is_set():
                    return
                self._said = True
                self._say(over=False)

    def _say(self, *, over: bool) -> None:
        name, total, unit, initial = self._what
        seconds = time.monotonic() - self._started
        text = describe(name, self._done, total, unit, seconds, initial=initial, over=over)
        try:
            if sys.stderr.isatty():  # where there may be the bar of other work
                from tqdm import tqdm

                tqdm.write(text, file=sys.stderr)
            else:
                sys.stderr.write(text + "\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # nobody reads it any more
            pass


def _terminal_bar(name: str, total: int | None, unit: str, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=name,
        initial=initial,
        delay=DELAY_SECONDS,
        file=sys.stderr,
        leave=False,
        mininterval=0.2,
        dynamic_ncols=True,
        **({"unit": "B", "unit_scale": True} if unit == BYTES else {}),
    )


@functools.cache
def _first_seconds(given: str) -> float:
    try:
        seconds = float(given) if given else FIRST_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        log.warning("DGPO_PROGRESS_SECONDS: %r is no number above 0; it is %g now", given, FIRST_SECONDS)
        return FIRST_SECONDS
    return seconds


def _count(done: int, total: int | None, unit: str) -> str:
    if total is None and not unit:
        return ""
    if unit == BYTES:
        numbers = [f"{n / 1e9:,.1f}" for n in (done, total) if n is not None]
        return f"{' of '.join(numbers)} GB in "
    return f"{' of '.join(f'{n:,}' for n in (done, total) if n is not None)} {unit}".rstrip() + " in "


def _rate(per_second: float, unit: str) -> str:
    what = ""
    if unit == BYTES:
        per_second, what = per_second / 1e9, "GB "
    for name, seconds in (("second", 1), ("minute", 60), ("hour", 3600)):
        if per_second * seconds >= 1 or name == "hour":
            return f"{per_second * seconds:,.1f} {what}per {name}"
    raise AssertionError("the hour is taken")


def _time(seconds: float) -> str:
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
