"""Seconds per phase, and sums that ranks can add up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

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
    added: every rank turns the same list of names into a vector, the vectors are all-reduced with
    SUM, and `from_vector` gives the global sums.
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

    def names(self) -> list[str]:
        """The names seen so far, sorted."""
        return sorted(self._pairs)

    def to_vector(self, names: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """float64 (2 * len(names),): the sums, then the counts. A name not seen here counts 0.

        Raises KeyError for names seen here that the list leaves out.
        """
        if left_over := sorted(set(self._pairs) - set(names)):
            raise KeyError(f"these sums are not in the list of names: {', '.join(left_over)}")
        pairs = [self._pairs.get(name, (0.0, 0.0)) for name in names]
        values = [total for total, _ in pairs] + [count for _, count in pairs]
        out = torch.zeros(len(values), dtype=torch.float64, device=device)
        for k, value in enumerate(values):
            out[k] = value
        return out

    @classmethod
    def from_vector(cls, names: Sequence[str], vector: torch.Tensor) -> Self:
        """The sums that `to_vector` (or a SUM of such vectors) describes."""
        if vector.shape != (2 * len(names),):
            raise ValueError(f"{len(names)} names need {2 * len(names)} numbers, got {tuple(vector.shape)}")
        numbers = vector.tolist()
        out = cls()
        for k, name in enumerate(names):
            out.add(name, numbers[k], numbers[len(names) + k])
        return out

    def means(self) -> dict[str, float]:
        """{name: sum / count}, without the names of which nothing was counted."""
        return {name: float(t) / float(c) for name, (t, c) in self._pairs.items() if float(c) != 0}
