"""Seconds per phase, and sums that ranks can add up."""

from __future__ import annotations

import math
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
    """Named (sum, count) pairs, whose ratio is a mean over whatever was counted, and named maxima.

    Ranks hold different numbers of samples and tokens, so means cannot be averaged but sums can be
    merged.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float | torch.Tensor, float | torch.Tensor]] = {}
        self._maxima: dict[str, float | torch.Tensor] = {}

    def add(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor = 1) -> None:
        """Add the sum of `count` values. Zero-dimensional tensors stay on their device, unread."""
        total = total.detach().double() if isinstance(total, torch.Tensor) else float(total)
        count = count.detach().double() if isinstance(count, torch.Tensor) else float(count)
        old_total, old_count = self._pairs.get(name, (0.0, 0.0))
        self._pairs[name] = (old_total + total, old_count + count)

    def add_max(self, name: str, value: float | torch.Tensor) -> None:
        """One value of which the greatest is kept; a NaN is. Tensors as with `add`."""
        value = value.detach().double() if isinstance(value, torch.Tensor) else float(value)
        self._maxima[name] = _greater(self._maxima[name], value) if name in self._maxima else value

    def merge(self, other: Sums) -> None:
        """Add another's sums to these, and keep the greater maxima."""
        for name, (total, count) in other._pairs.items():
            self.add(name, total, count)
        for name, value in other._maxima.items():
            self.add_max(name, value)

    def on_host(self) -> Sums:
        """The same as plain numbers, which can travel to other ranks."""
        out = Sums()
        for name, (total, count) in self._pairs.items():
            out.add(name, float(total), float(count))
        for name, value in self._maxima.items():
            out.add_max(name, float(value))
        return out

    def values(self) -> dict[str, float]:
        """{name: sum / count}, without the names of which nothing was counted, and the maxima."""
        means = {name: float(t) / float(c) for name, (t, c) in self._pairs.items() if float(c) != 0}
        return means | {name: float(value) for name, value in self._maxima.items()}


def _greater(a: float | torch.Tensor, b: float | torch.Tensor) -> float | torch.Tensor:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        device = a.device if isinstance(a, torch.Tensor) else b.device  # type: ignore[union-attr]
        a, b = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (a, b))
        return torch.maximum(a, b)
    return a if math.isnan(a) or a > b else b
