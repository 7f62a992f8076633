"""The bootstrap against the plain loop, the normal approximation, and its own promise."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dgpo.evaluation.intervals import bootstrap_interval


def test_it_is_what_the_plain_loop_gives() -> None:
    values = np.random.default_rng(3).random(37).tolist()
    draw = np.random.default_rng(11)
    means = []
    for _ in range(500):
        chosen = draw.integers(len(values), size=(1, len(values)))[0]
        means.append(sum(values[i] for i in chosen) / len(values))
    wanted = np.quantile(means, [0.05, 0.95])
    assert bootstrap_interval(values, level=0.9, resamples=500, seed=11) == pytest.approx(wanted, abs=1e-12)


def test_large_samples_give_the_normal_interval() -> None:
    values = np.random.default_rng(4).random(4000)
    half = 1.959964 * values.std() / np.sqrt(len(values))
    low, high = bootstrap_interval(values.tolist(), resamples=4000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_it_covers_the_true_mean_about_as_often_as_it_says() -> None:
    """30 problems as in AIME, each with its own chance: 95% of the intervals hold the mean of .4, less a
    little, as the percentile bootstrap is known to be short for few values. 400 draws: sd .011."""
    draw = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        chances = draw.beta(0.8, 1.2, size=30)
        values = draw.binomial(32, chances) / 32
        low, high = bootstrap_interval(values.tolist(), resamples=400, seed=int(draw.integers(1 << 30)))
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_equal_values_have_no_spread_and_none_are_refused() -> None:
    assert bootstrap_interval([0.25] * 5, resamples=100) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="level=1.0"):
        bootstrap_interval([0.5], level=1.0)
