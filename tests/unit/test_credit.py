"""Credit weights against a float64 loop over responses."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dgpo.algorithms.credit import credit_weights

LENGTHS = (1, 17, 300, 64)
CU = torch.tensor([0, 1, 18, 318, 382], dtype=torch.int32)
VOCAB = 46


def data(seed=0, masked=0.4):
    g = torch.Generator().manual_seed(seed)
    distance = torch.rand(sum(LENGTHS), generator=g)
    entropy = torch.rand(sum(LENGTHS), generator=g) * math.log(VOCAB)
    mask = torch.rand(sum(LENGTHS), generator=g) >= masked
    mask[0] = True
    return distance, entropy, mask


def by_hand(distance, entropy, mask, tau, kappa, normalise):
    """Eq. 6 response by response, on python floats."""
    weights, scores, fractions = [0.0] * len(mask), [0.0] * len(mask), []
    for start, end in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        tokens = [t for t in range(start, end) if mask[t]]
        for t in tokens:
            gate = float(entropy[t]) / (math.log(VOCAB) if normalise else 1.0)
            scores[t] = float(distance[t]) * gate**kappa
        top = max(scores[t] for t in tokens)
        e = {t: math.exp((scores[t] - top) / tau) for t in tokens}
        for t in tokens:
            weights[t] = len(tokens) * e[t] / math.fsum(e.values())
        fractions.append(
            math.fsum(weights[t] for t in tokens) ** 2
            / (len(tokens) * math.fsum(weights[t] ** 2 for t in tokens))
        )
    return weights, scores, fractions


@pytest.mark.parametrize("tau", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("normalization", ["log_vocab", "none"])
def test_weights(tau, kappa, normalization):
    distance, entropy, mask = data()
    got = credit_weights(
        distance,
        entropy,
        CU,
        vocab_size=VOCAB,
        tau=tau,
        kappa=kappa,
        entropy_normalization=normalization,
        loss_mask=mask,
    )
    weights, scores, fractions = by_hand(distance, entropy, mask, tau, kappa, normalization == "log_vocab")
    # Everything is float64 inside; one rounding to float32 on the way out.
    assert torch.allclose(got.weights.double(), torch.tensor(weights).double(), rtol=1e-6, atol=1e-12)
    assert torch.allclose(got.scores.double(), torch.tensor(scores).double(), rtol=1e-6, atol=1e-12)
    assert torch.allclose(got.effective_fraction, torch.tensor(fractions), rtol=1e-6, atol=0)
    assert torch.equal(got.weights[~mask], torch.zeros(int((~mask).sum())))
    for start, end in zip(CU[:-1], CU[1:], strict=True):
        counted = mask[start:end]
        assert abs(got.weights[start:end][counted].double().mean() - 1) <= 1e-6


def test_long_responses_keep_mean_one():
    cu = torch.tensor([0, 32768], dtype=torch.int32)
    g = torch.Generator().manual_seed(5)
    distance, entropy = torch.rand(32768, generator=g), torch.rand(32768, generator=g) * 3
    got = credit_weights(distance, entropy, cu, vocab_size=VOCAB, tau=0.05, kappa=1.0)
    assert abs(got.weights.double().mean() - 1) <= 1e-6


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_equal_scores_give_exactly_one(kappa):
    _, entropy, mask = data()
    got = credit_weights(
        torch.zeros(382), entropy, CU, vocab_size=VOCAB, tau=0.02, kappa=kappa, loss_mask=mask
    )
    assert torch.equal(got.weights, mask.float())
    assert torch.equal(got.effective_fraction, torch.ones(4))


def test_kappa_zero_ignores_entropy_even_where_it_is_zero():
    distance, entropy, mask = data()
    settings = {"vocab_size": VOCAB, "tau": 0.1, "kappa": 0.0, "loss_mask": mask}
    a = credit_weights(distance, entropy, CU, **settings)
    b = credit_weights(distance, torch.zeros_like(entropy), CU, **settings)
    assert torch.equal(a.weights, b.weights) and torch.equal(a.scores, torch.where(mask, distance, 0.0))


def test_nats_with_kappa_one_are_a_smaller_tau():
    distance, entropy, mask = data()
    nats = credit_weights(
        distance,
        entropy,
        CU,
        vocab_size=VOCAB,
        tau=0.3,
        kappa=1.0,
        entropy_normalization="none",
        loss_mask=mask,
    )
    scaled = credit_weights(
        distance, entropy, CU, vocab_size=VOCAB, tau=0.3 / math.log(VOCAB), kappa=1.0, loss_mask=mask
    )
    assert torch.allclose(nats.weights, scaled.weights, rtol=1e-6, atol=0)


def test_infinite_tau_is_uniform():
    distance, entropy, mask = data()
    got = credit_weights(distance, entropy, CU, vocab_size=VOCAB, tau=1e9, kappa=1.0, loss_mask=mask)
    # softmax(s / tau) departs from uniform by at most (max s - min s) / tau, and s <= 1.
    assert (got.weights - mask.float()).abs().max() <= 1e-9 + 2.0**-24


def test_masked_tokens_are_as_if_absent():
    distance, entropy, mask = data()
    distance, entropy = distance.clone(), entropy.clone()
    got = credit_weights(distance, entropy, CU, vocab_size=VOCAB, tau=0.1, kappa=1.0, loss_mask=mask)
    distance[~mask], entropy[~mask] = float("nan"), float("inf")
    dirty = credit_weights(distance, entropy, CU, vocab_size=VOCAB, tau=0.1, kappa=1.0, loss_mask=mask)
    assert torch.equal(got.weights, dirty.weights)
    cu = torch.cat([torch.zeros(1), mask.cumsum(0)[CU[1:].long() - 1]]).int()
    packed = credit_weights(distance[mask], entropy[mask], cu, vocab_size=VOCAB, tau=0.1, kappa=1.0)
    assert torch.allclose(got.weights[mask], packed.weights, rtol=1e-6, atol=0)


def test_a_response_without_counted_tokens():
    distance, entropy, mask = data()
    mask[18:318] = False
    got = credit_weights(distance, entropy, CU, vocab_size=VOCAB, tau=0.1, kappa=1.0, loss_mask=mask)
    assert torch.equal(got.weights[18:318], torch.zeros(300)) and got.effective_fraction[2] == 1
    assert abs(got.weights[318:][mask[318:]].mean() - 1) <= 1e-6


def test_no_gradient():
    distance, entropy, _ = data()
    got = credit_weights(
        distance.requires_grad_(), entropy.requires_grad_(), CU, vocab_size=VOCAB, tau=0.1, kappa=1.0
    )
    assert not got.weights.requires_grad and not got.scores.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 0.0}, "tau=0.0"),
        ({"tau": float("inf")}, "tau=inf"),
        ({"kappa": -1.0}, "kappa=-1.0"),
        ({"vocab_size": 1}, "vocab_size=1"),
        ({"entropy_normalization": "nats"}, "entropy_normalization='nats'.*log_vocab, none"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: goes from 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 382])}, "shortest sequence -1"),
    ],
)
def test_refuses(change, message):
    distance, entropy, _ = data()
    call = {"cu_seqlens": CU, "vocab_size": VOCAB, "tau": 0.5, "kappa": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        credit_weights(distance, entropy, **call)
