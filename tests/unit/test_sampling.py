"""Sampling parameters and the inverse-CDF draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.rollout.sampling import NonFiniteLogits, TokenChooser, inverse_cdf, uniforms

PINNED = [0.6232119938127983, 0.8080128224769341, 0.3306599909254697]
"""uniforms(1, "data:1", 0, 3): a change here changes every seeded run."""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("n", 0),
        ("seed", -1),
        ("stop_token_ids", [1]),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 3),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"sampling: {field} must be"):
        SamplingParams(**{"max_new_tokens": 4, field: value})


def test_inverse_cdf_picks_the_interval() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    numbers = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-40]
    drawn = [int(inverse_cdf(probs, torch.tensor([u], dtype=torch.float64))) for u in numbers]
    assert drawn == [1, 1, 3, 3, 4, 4]
    scaled = inverse_cdf(probs * 3e-5, torch.tensor([1 - 2.0**-40], dtype=torch.float64))
    assert int(scaled) == 4  # never the trailing token of probability 0


def test_uniforms_are_uniform_stable_and_extendable() -> None:
    np.testing.assert_allclose(uniforms(1, "data:1", 0, 3), PINNED, rtol=0, atol=1e-15)
    assert np.array_equal(uniforms(1, "data:1", 0, 50)[:3], uniforms(1, "data:1", 0, 3))
    drawn = np.stack([uniforms(s, f"d:{p}", i, 20) for s in range(5) for p in range(20) for i in range(10)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    expected = drawn.size / 20
    # chi-square with 19 degrees of freedom: 43.8 is p = 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 43.8
    between = np.corrcoef(drawn[:, 0], np.roll(drawn[:, 0], 1))[0, 1]
    assert abs(between) < 4 / len(drawn) ** 0.5


def test_chooser_records_unfiltered_log_probs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 12, generator=generator) * 3
    params = SamplingParams(1, temperature=0.5, top_k=4, top_p=0.9, min_p=0.05)
    uniform = torch.rand(6, 1, dtype=torch.float64, generator=generator)
    chooser = TokenChooser(params, uniform)
    chooser.choose(logits)
    assert torch.equal(chooser.chosen_A, chooser.tokens_RN[:, 0])
    for row in range(6):
        probs = (logits[row].double() / 0.5).softmax(-1)
        kept = probs.argsort(descending=True).tolist()[:4]
        renormalised = probs[kept] / probs[kept].sum()
        before = renormalised.cumsum(0) - renormalised
        kept = [t for t, b in zip(kept, before.tolist(), strict=True) if b < 0.9]
        kept = sorted(t for t in kept if probs[t] >= 0.05 * probs.max())
        cdf = (probs[kept] / probs[kept].sum()).cumsum(0)
        expected = kept[int((cdf <= uniform[row, 0]).sum())]
        assert int(chooser.chosen_A[row]) == expected
        assert abs(float(chooser.log_probs_RN[row, 0]) - float(probs[expected].log())) < 1e-5


def test_chooser_names_the_original_rows_of_non_finite_logits() -> None:
    chooser = TokenChooser(SamplingParams(3), torch.full((4, 3), 0.5, dtype=torch.float64))
    chooser.choose(torch.zeros(4, 5))
    chooser.keep(torch.tensor([1, 3]))
    bad = torch.zeros(2, 5)
    bad[1, 2] = torch.nan
    with pytest.raises(NonFiniteLogits) as caught:
        chooser.choose(bad)
    assert caught.value.rows == [3]
