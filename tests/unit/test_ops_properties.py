"""What holds for any logits: bounds, symmetries, and a distance of 0 at equality.

Tolerances: u = 2^-24 is float32's unit roundoff. A logit z, shifted by the peak m and exponentiated, has a
relative error of (|z - m| + 4) u; a log-probability or an entropy inherits at most (2 span + 32) u with
span = the largest |z - m| (see test_ops.py), where 32 covers the sums. The distance is half a sum of
squares whose relative errors are those of the probabilities, so its absolute error is at most that too.
"""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.ops import token_stats

UNIT = 2.0**-24
FUSED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = ["eager", *(["fused"] if FUSED else []), "reference"]
FIELDS = ("log_probs", "entropy", "hellinger", "reference_log_probs", "reverse_kl")

# The same examples in every run, and no files of examples.
quickly = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@st.composite
def logits(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """(policy, reference, targets, temperature): from nearly uniform to nearly one-hot, from equal to
    unrelated."""
    tokens, vocab = draw(st.integers(1, 9)), draw(st.integers(2, 130))
    spread = draw(st.sampled_from((0.01, 1.0, 5.0, 40.0)))
    shift = draw(st.sampled_from((0.0, 1e-4, 0.3, 20.0)))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(tokens, vocab, generator=g) * spread
    reference = z + shift * torch.randn(tokens, vocab, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    return z.to(dtype), reference.to(dtype), targets, draw(st.sampled_from((0.7, 1.0, 1.3)))


def span(*tensors, temperature):
    return max(float((x.float().amax(-1) - x.float().amin(-1)).max()) for x in tensors) / temperature


def rounding(z, reference, temperature):
    return (2 * span(z, reference, temperature=temperature) + 32) * UNIT * 4


def stats_of(z, reference, targets, temperature, impl, **more):
    return token_stats(z, targets, reference_logits=reference, temperature=temperature, impl=impl, **more)


@pytest.mark.parametrize("impl", IMPLS)
@quickly
@given(case=logits())
def test_bounds(impl, case):
    z, reference, targets, temperature = case
    stats = stats_of(z, reference, targets, temperature, impl)
    slack = rounding(z, reference, temperature)
    assert 0 <= stats.hellinger.min() and stats.hellinger.max() <= 1
    assert stats.reverse_kl.min() >= 0
    assert stats.entropy.min() >= -slack and stats.entropy.max() <= math.log(z.shape[1]) + slack
    assert stats.log_probs.max() <= slack and stats.reference_log_probs.max() <= slack
    # 1 - x <= -log x and Jensen's inequality: d <= -log(1 - d) <= KL / 2.
    assert (stats.hellinger <= stats.reverse_kl / 2 + slack).all()


@pytest.mark.parametrize("impl", IMPLS)
@quickly
@given(case=logits())
def test_the_distance_is_symmetric(impl, case):
    z, reference, targets, temperature = case
    one = stats_of(z, reference, targets, temperature, impl)
    other = stats_of(reference, z, targets, temperature, impl)
    slack = rounding(z, reference, temperature)
    assert (one.hellinger - other.hellinger).abs().max() <= slack
    # Each policy's own numbers do not depend on which side it stands.
    assert (one.log_probs - other.reference_log_probs).abs().max() <= slack


@pytest.mark.parametrize("impl", IMPLS)
@quickly
@given(case=logits((torch.float32,)), constant=st.floats(-1e3, 1e3, width=32))
def test_a_constant_added_to_all_logits_of_a_token_changes_nothing(impl, case, constant):
    z, reference, targets, temperature = case
    want = stats_of(z, reference, targets, temperature, impl)
    got = stats_of(z + constant, reference - constant, targets, temperature, impl)
    # Each moved logit is rounded to half a unit in the last place of its own size, and so is its quotient
    # by the temperature; an error e of the logits moves every number by at most 2 e (1 + |log-ratio|).
    size = float(torch.stack((z, reference)).abs().max()) + abs(constant)
    error = 4 * size * UNIT / temperature
    ratio = span(z, reference, temperature=temperature)
    slack = rounding(z, reference, temperature) + 2 * error * (1 + 2 * ratio)
    for name in FIELDS:
        assert (getattr(got, name) - getattr(want, name)).abs().max() <= slack, name


@pytest.mark.parametrize("impl", IMPLS)
@quickly
@given(case=logits(), seed=st.integers(0, 2**31))
def test_the_order_of_the_vocabulary_changes_nothing(impl, case, seed):
    z, reference, targets, temperature = case
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(seed))
    want = stats_of(z, reference, targets, temperature, impl)
    moved = torch.argsort(order)[targets]
    got = stats_of(z[:, order], reference[:, order], moved, temperature, impl)
    slack = rounding(z, reference, temperature) * (1 + span(z, reference, temperature=temperature))
    for name in FIELDS:
        assert (getattr(got, name) - getattr(want, name)).abs().max() <= slack, name


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@quickly
@given(case=logits(), fill=st.sampled_from((0.0, 1e4, -1e4, float("nan"))), padding=st.integers(1, 40))
def test_padding_columns_contribute_nothing(impl, case, fill, padding):
    z, reference, targets, temperature = case
    vocab = z.shape[1]
    want = stats_of(z, reference, targets, temperature, impl)
    wide = [torch.nn.functional.pad(x, (0, padding), value=fill) for x in (z, reference)]
    got = stats_of(*wide, targets, temperature, impl, vocab_size=vocab)
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@quickly
@given(case=logits())
def test_equal_policies_have_distance_exactly_zero(impl, case):
    z, _, targets, temperature = case
    stats = stats_of(z, z.clone(), targets, temperature, impl)
    assert not stats.hellinger.any() and not stats.reverse_kl.any()
    assert torch.equal(stats.log_probs, stats.reference_log_probs)


# --- credit -------------------------------------------------------------------------------------------

VOCAB = 1000


@st.composite
def responses(draw):
    """(distance, entropy, cu_seqlens, loss mask) of packed responses, some tokens or all masked."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    total = sum(lengths)
    distance = torch.rand(total, generator=g) ** draw(st.sampled_from((1, 8)))
    entropy = torch.rand(total, generator=g) * math.log(VOCAB)
    mask = torch.rand(total, generator=g) >= draw(st.sampled_from((0.0, 0.3, 0.9)))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return distance, entropy, cu_seqlens, mask


def credit(case, **settings):
    distance, entropy, cu_seqlens, mask = case
    values = {"vocab_size": VOCAB, "tau": 0.1, "kappa": 1.0} | settings
    return credit_weights(distance, entropy, cu_seqlens, loss_mask=mask, **values)


taus, kappas = st.floats(1e-3, 10.0), st.sampled_from((0.0, 0.5, 1.0, 2.0))


@quickly
@given(case=responses(), tau=taus, kappa=kappas)
def test_weights_sum_to_the_number_of_counted_tokens(case, tau, kappa):
    _, _, cu_seqlens, mask = case
    got = credit(case, tau=tau, kappa=kappa)
    assert (got.weights[~mask] == 0).all() and (got.weights >= 0).all()
    assert (got.effective_fraction > 0).all() and (got.effective_fraction <= 1).all()
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        counted = mask[start:end]
        if counted.any():
            assert abs(float(got.weights[start:end][counted].double().mean()) - 1) <= 1e-6


@quickly
@given(case=responses(), kappa=kappas)
def test_a_large_tau_is_uniform_credit(case, kappa):
    tau = 1e8
    # ln w departs from 0 by at most (max s - min s) / tau, and s is in [0, 1].
    assert (credit(case, tau=tau, kappa=kappa).weights - case[3].float()).abs().max() <= 1 / tau + UNIT


@quickly
@given(case=responses(), tau=taus)
def test_more_distance_or_more_entropy_is_more_credit(case, tau):
    distance, entropy, cu_seqlens, mask = case
    weights = credit(case, tau=tau).weights
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = (distance * entropy)[start:end][mask[start:end]].double()
        order = scores.argsort()
        assert (weights[start:end][mask[start:end]][order].diff() >= -1e-5 * weights.max()).all()


@quickly
@given(case=responses(), tau=taus, kappa=kappas)
def test_a_response_is_weighed_alone(case, tau, kappa):
    """Packed with others or not, and in whichever order."""
    distance, entropy, cu_seqlens, mask = case
    together = credit(case, tau=tau, kappa=kappa).weights
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        one = slice(start, end)
        alone = (distance[one], entropy[one], torch.tensor([0, end - start], dtype=torch.int32), mask[one])
        assert torch.allclose(credit(alone, tau=tau, kappa=kappa).weights, together[one], rtol=1e-6, atol=0)
