"""Advantages of whole responses from the rewards of their group."""

from __future__ import annotations

import math


def group_advantages(
    rewards: list[list[float | None]], *, eps: float, normalize_by_std: bool
) -> list[list[float | None]]:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group (Eq. 1, arXiv 2605.03327), std over the
    population; without `normalize_by_std` only the mean is taken off (Dr. GRPO, arXiv 2503.20783).

    None is a reward that failed: it leaves the statistics and stays None. Where all rewards of a
    group are equal, the advantages are exactly 0. Raises ValueError for eps < 0 or a reward that is
    not finite.
    """
    if not eps >= 0:
        raise ValueError(f"advantage eps={eps}: must be at least 0")
    return [_advantages(group, row, eps, normalize_by_std) for row, group in enumerate(rewards)]


def leave_one_out_advantages(rewards: list[list[float | None]]) -> list[list[float | None]]:
    """A_i = r_i - mean of the group's other rewards (RLOO, arXiv 2402.14740).

    None is a reward that failed: it leaves the means and stays None. A reward that is alone has no others,
    and advantage 0. Raises ValueError for a reward that is not finite.
    """
    return [_leave_one_out(group, row) for row, group in enumerate(rewards)]


def _leave_one_out(rewards: list[float | None], row: int) -> list[float | None]:
    known = _finite(rewards, row)
    if len(known) < 2 or min(known) == max(known):
        return [None if r is None else 0.0 for r in rewards]
    total, others = math.fsum(known), len(known) - 1
    return [None if r is None else r - (total - r) / others for r in rewards]


def _finite(rewards: list[float | None], row: int) -> list[float]:
    for column, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(f"rewards[{row}][{column}] = {reward}: need a finite number, or None if failed")
    return [r for r in rewards if r is not None]


def _advantages(
    rewards: list[float | None], row: int, eps: float, normalize_by_std: bool
) -> list[float | None]:
    known = _finite(rewards, row)
    if not known:
        return [None] * len(rewards)
    if min(known) == max(known):
        return [None if r is None else 0.0 for r in rewards]
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if normalize_by_std:
        scale = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / len(known)) + eps
    return [None if r is None else (r - mean) / scale for r in rewards]
