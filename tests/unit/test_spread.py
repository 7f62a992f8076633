"""Spread of credit and quantiles of a step, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spread_reference import spread, token_quantiles

from megatron_dgpo.algorithms.quantiles import quantiles
from megatron_dgpo.algorithms.spread import credit_spread
from megatron_dgpo.types import PackedBatch

LENGTHS = ((3, 0), (2, 1), (1, 7), (5, 9), (4, 10), (2, 11), (1, 101), (6, 250))
"""Prompt positions and response tokens of each sequence."""
ADVANTAGES = (1.0, 0.5, -1.0, 0.0, -0.25, 2.0, 1.0, -2.0)


def batch_of(weights: list[torch.Tensor], keep: list[int] | None = None):
    """The sequences of LENGTHS that are kept, with these weights of their response tokens."""
    keep = list(range(len(LENGTHS))) if keep is None else keep
    sizes = [sum(LENGTHS[k]) for k in keep]
    cu = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    place = torch.cat([torch.arange(size) for size in sizes])
    prompt = torch.repeat_interleave(torch.tensor([LENGTHS[k][0] for k in keep]), torch.tensor(sizes))
    mask = place >= prompt
    weights_T = torch.zeros(len(place))
    weights_T[mask] = torch.cat([weights[k] for k in keep])
    advantages = torch.tensor([ADVANTAGES[k] for k in keep])
    return weights_T, PackedBatch(place, place, place, mask, cu, advantages)


def random_weights(seed: int, sharpness: float) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, generator=g).mul(sharpness).softmax(0) * n for _, n in LENGTHS]
    drawn[4] = torch.ones(LENGTHS[4][1])  # all equal
    drawn[3] = torch.full((LENGTHS[3][1],), 1 / 3)
    return drawn


def means(metrics) -> dict[str, float]:
    return {name: float(a) / float(b) for name, (a, b) in metrics.items() if float(b)}


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 20.0])
def test_spread_is_that_of_numpy(sharpness: float) -> None:
    weights = random_weights(1, sharpness)
    got = means(credit_spread(*batch_of(weights)))
    want = spread([(w.tolist(), a) for w, a in zip(weights, ADVANTAGES, strict=True)])
    assert got.keys() == want.keys() and len(want) == 10
    for name, value in want.items():
        # float64 sums of a few hundred numbers; centring weights that differ by 1% costs two digits.
        assert got[name] == pytest.approx(value, rel=1e-9), name


def test_spread_adds_up_over_micro_batches() -> None:
    weights = random_weights(2, 2.0)
    whole = credit_spread(*batch_of(weights))
    parts = [credit_spread(*batch_of(weights, keep)) for keep in ([7, 0, 3], [1], [2, 6, 5, 4])]
    for name, (total, count) in whole.items():
        assert sum(float(p[name][1]) for p in parts) == float(count)
        assert sum(float(p[name][0]) for p in parts) == pytest.approx(float(total), rel=1e-12, abs=1e-15)


def test_what_nothing_is_known_of_is_not_counted() -> None:
    ones = [torch.ones(n) for _, n in LENGTHS]
    for keep in ([0], [1], [3, 4], [0, 1, 2]):
        metrics = credit_spread(*batch_of(ones, keep))
        assert all(math.isfinite(float(x)) for pair in metrics.values() for x in pair)
        assert float(metrics["credit_position_correlation"][1]) == 0
    # The first has no token at all.
    assert float(credit_spread(*batch_of(ones, [0]))["credit_effective_fraction"][1]) == 0
    assert means(credit_spread(*batch_of(ones, [1])))["credit_top1_share"] == 1.0
    empty = PackedBatch(*[torch.zeros(1, dtype=torch.long)] * 3, torch.tensor([False]), torch.tensor([0, 1]),
                        torch.zeros(1))  # fmt: skip
    assert means(credit_spread(torch.zeros(1), empty)) == {}


def test_all_credit_on_one_token() -> None:
    weights = [torch.zeros(n) for _, n in LENGTHS]
    for w in weights[1:]:
        w[-1] = len(w)
    got = means(credit_spread(*batch_of(weights, [7])))
    assert got["credit_top1_share"] == got["credit_top10_share"] == 1.0
    assert got["credit_weight_max"] == 250.0
    assert got["credit_effective_fraction"] == pytest.approx(1 / 250, rel=1e-12)
    assert 0 < got["credit_position_correlation"] < 0.2


# --- quantiles ----------------------------------------------------------------------------------------

HARD = (0.0, -0.0, 1e-45, 1e-38, 1.0, 1.0 + 2**-23, 3.4e38, math.inf)


@given(
    st.lists(st.one_of(st.floats(0, width=32), st.sampled_from(HARD)), min_size=1, max_size=230),
    st.lists(st.integers(1, 100), min_size=1, max_size=5),
)
def test_quantiles_are_order_statistics(values: list[float], percents: list[int]) -> None:
    given = torch.tensor(values, dtype=torch.float32)
    (got,) = quantiles([given], percents)
    ordered = sorted(given.abs().tolist())
    assert got == [ordered[-(-len(ordered) * p // 100) - 1] for p in percents]


def test_quantiles_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    values = [rng.gamma(0.3, size=1013).astype(np.float32), np.zeros(5, np.float32), np.ones(1, np.float32)]
    got = quantiles([torch.from_numpy(v) for v in values])
    for v, found in zip(values, got, strict=True):
        assert found == list(token_quantiles("x", v).values())


def test_quantiles_of_nothing_of_negatives_and_of_nan() -> None:
    nothing, signs = torch.zeros(0), torch.tensor([-1.0, -0.0, 2.0, math.nan, -math.nan])
    got = quantiles([nothing, signs], (20, 40, 60, 80, 100))
    assert got[0] == [] and got[1][:3] == [0.0, 0.0, 2.0] and all(map(math.isnan, got[1][3:]))
