"""Bootstrap confidence intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 1 << 22
"""Numbers drawn at a time."""


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of the mean of one value a problem.

    Problems are drawn again with replacement; the samples of a problem stay together, since they are no
    independent evidence. Raises ValueError without values, or for a level outside (0, 1).
    """
    if not len(values):
        raise ValueError("an interval needs at least one problem")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level}: must be between 0 and 1")
    numbers = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(numbers))
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        chosen = draw.integers(len(numbers), size=(count, len(numbers)))
        means[start : start + count] = numbers[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
