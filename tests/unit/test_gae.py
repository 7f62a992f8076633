"""Token advantages from values, against the definition as a sum."""

from __future__ import annotations

import pytest
import torch

from megatron_dgpo.algorithms.gae import clipped_value_loss, generalized_advantages

LENGTHS, PROMPTS = (7, 3, 12, 5), (2, 2, 4, 5)
"""The last sequence has no token that counts."""


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_advantages_and_returns(gamma, lam):
    g = torch.Generator().manual_seed(1)
    values = torch.randn(sum(LENGTHS), generator=g)
    rewards = torch.tensor([1.0, -0.5, 0.25, 9.0])
    mask = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    got, returns = generalized_advantages(values, rewards, mask, cu, gamma=gamma, lam=lam)
    start = 0
    for s, length in enumerate(LENGTHS):
        v = [float(values[t]) for t in range(start, start + length) if mask[t]]
        r = [0.0] * (len(v) - 1) + [float(rewards[s])]
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
        want = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(v))]
        mine = got[start : start + length][mask[start : start + length]]
        assert mine.tolist() == pytest.approx(want, abs=1e-12)
        back = returns[start : start + length][mask[start : start + length]]
        assert back.tolist() == pytest.approx([a + x for a, x in zip(want, v, strict=True)], abs=1e-12)
        if lam == 1.0:  # the discounted reward itself, whatever the values are
            discounted = [gamma ** (len(v) - 1 - t) * float(rewards[s]) for t in range(len(v))]
            assert back.tolist() == pytest.approx(discounted, abs=1e-12)
        start += length
    assert not got[~mask].any() and not returns[~mask].any()


def test_no_token_counts():
    cu = torch.tensor([0, 4], dtype=torch.int32)
    got, returns = generalized_advantages(
        torch.ones(4), torch.ones(1), torch.zeros(4, dtype=torch.bool), cu, gamma=1.0, lam=1.0
    )
    assert not got.any() and not returns.any()


def test_clipped_value_loss():
    old = torch.zeros(5)
    new = torch.tensor([0.1, 0.5, 0.5, -0.5, 0.5], requires_grad=True)
    returns = torch.tensor([1.0, 1.0, 0.3, 1.0, 0.4])
    loss = clipped_value_loss(new, old, returns, 0.2)
    # Moved past the clip: towards the return counts as if it had stopped, beyond it as it is.
    want = [0.81, max(0.25, 0.64), max(0.04, 0.01), max(2.25, 1.44), max(0.01, 0.04)]
    assert loss.tolist() == pytest.approx([x / 2 for x in want], abs=1e-7)
    (grad,) = torch.autograd.grad(loss.sum(), new)
    assert grad.tolist() == pytest.approx([-0.9, 0.0, 0.2, -1.5, 0.0], abs=1e-6)
    plain = clipped_value_loss(new, old, returns, 0.0)
    assert torch.equal(plain, 0.5 * (new - returns) ** 2)
