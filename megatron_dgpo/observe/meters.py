"""Seconds per phase, and sums that ranks can add up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the seconds spent in each phase of a step.

    Phases may nest; the outer one includes the inner one. On a GPU the device is waited for at both
    ends of a phase, so that a phase is charged for its own kernels.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = _now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + _now() - start

    def pop(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call, in the order the phases first ended."""
        out = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return out


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Sums:
    """Named (sum, count) pairs; their ratio is a mean over whatever was counted.

    Ranks hold different numbers of samples and tokens, so means cannot be averaged but sums can be
    merged.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float | torch.Tensor, float | torch.Tensor]] = {}

    def add(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor = 1) -> None:
        """Add the sum of `count` values. Zero-dimensional tensors stay on their device, unread."""
        total = total.detach().double() if isinstance(total, torch.Tensor) else float(total)
        count = count.detach().double() if isinstance(count, torch.Tensor) else float(count)
        old_total, old_count = self._pairs.get(name, (0.0, 0.0))
        self._pairs[name] = (old_total + total, old_count + count)

    def merge(self, other: Sums) -> None:
        """Add another's sums to these."""
        for name, (total, count) in other._pairs.items():
            self.add(name, total, count)

    def on_host(self) -> Sums:
        """The same as plain numbers, which can travel to other ranks."""
        out = Sums()
        for name, (total, count) in self._pairs.items():
            out.add(name, float(total), float(count))
        return out

    def means(self) -> dict[str, float]:
        """{name: sum / count}, without the names of which nothing was counted."""
        return {name: float(t) / float(c) for name, (t, c) in self._pairs.items() if float(c) != 0}
