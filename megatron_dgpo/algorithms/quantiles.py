"""Exact quantiles of numbers that are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.segments import sum_over

PERCENTS = (10, 50, 90, 99)
_DIGIT_BITS = 4
_SHIFTS = range(28, -1, -_DIGIT_BITS)


@torch.no_grad()
def quantiles(
    values: Sequence[torch.Tensor],
    percents: Sequence[int] = PERCENTS,
    group: dist.ProcessGroup | None = None,
) -> list[list[float]]:
    """The order statistics of rank ceil(p N / 100), N counted over all ranks: one list for each tensor of
    `values`, empty where N is 0.

    That is the inverse of the empirical distribution function (numpy's "inverted_cdf"): always a number that
    occurs, and the same however the numbers are spread. Each tensor is one-dimensional float32; a number
    below 0 counts as 0, a NaN as greater than all. Every rank gives as many tensors.

    Non-negative float32 numbers order as their bit patterns do. The pattern is found four bits at a time from
    the top: of the 15 numbers at which the next four could begin, count how many values lie below each. A
    rank sorts its values once; the rest is 9 all-reduces of at most 15 integers a quantile, at any N.
    """
    patterns = [_patterns(v).sort().values for v in values]
    device = patterns[0].device
    counts = sum_over(torch.tensor([p.numel() for p in patterns], device=device), group).tolist()
    # Counted from 0; integers, since 0.07 * 100 is more than 7 in floating point.
    places = torch.tensor([[-(-n * p // 100) - 1 for p in percents] for n in counts], device=device)
    found = torch.zeros_like(places)
    steps = torch.arange(1, 1 << _DIGIT_BITS, device=device)
    for shift in _SHIFTS:
        candidates = found.unsqueeze(-1) + (steps << shift)
        below = torch.stack([torch.searchsorted(p, c) for p, c in zip(patterns, candidates, strict=True)])
        digits = (sum_over(below, group) <= places.unsqueeze(-1)).sum(-1)
        found = found + (digits << shift)
    numbers = found.to(torch.int32).view(torch.float32)
    return [row if n else [] for row, n in zip(numbers.tolist(), counts, strict=True)]


def _patterns(values: torch.Tensor) -> torch.Tensor:
    """int64; the sign bit goes, which -0.0 and some NaNs have."""
    return values.float().clamp(min=0.0).view(torch.int32).long() & 0x7FFFFFFF
