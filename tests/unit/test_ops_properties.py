"""What holds of the token statistics and of the credit weights for any input: bounds, symmetries and
invariances, on random cases that are the same in every run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import FIELDS, IMPLS, SHARDED, UNIT, bound, shard_numbers

from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.ops import token_stats
from megatron_dgpo.ops.shards import merge_shards

CASES = settings(max_examples=30)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- random logits ------------------------------------------------------------------------------------


@st.composite
def problems(draw, dtypes=DTYPES):
    """Logits of a policy and of a reference at any distance, targets, a temperature; some columns may be
    masked in both. At most e^5 columns: the bounds below take an entropy for less than 5 nats."""
    tokens, vocab = draw(st.integers(1, 6)), draw(st.sampled_from((1, 2, 3, 17, 46, 130)))
    spread = draw(st.sampled_from((0.0, 0.5, 3.0, 30.0)))
    shift = draw(st.sampled_from((0.0, 1e-6, 1e-3, 0.1, 1.0, 30.0, None)))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(tokens, vocab, generator=g) * spread
    # Turned round, where the spread is wide, it puts its mass on other columns: distance 1 but for rounding.
    reference = z.flip(-1) if shift is None else z + shift * torch.randn(tokens, vocab, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    if draw(st.booleans()):
        masked = torch.rand(tokens, vocab, generator=g) < 0.4
        masked[torch.arange(tokens), targets] = False
        z[masked] = reference[masked] = -torch.inf
    temperature = draw(st.sampled_from((0.7, 1.0, 1.3)) | st.floats(0.25, 4.0))
    return z.to(dtype), reference.to(dtype), targets, temperature


def stats_of(impl, z, targets, reference=None, temperature=1.0, **more):
    if impl == "fused" and z.dtype == torch.float64:
        impl = "eager"  # the kernels refuse float64
    return token_stats(z, targets, reference_logits=reference, temperature=temperature, impl=impl, **more)


def largest(*logits):
    return max(float(z.double().masked_fill(z == -torch.inf, 0.0).abs().max()) for z in logits)


def distance_bound(z, reference, temperature, distance):
    """What float32 may lose in a squared Hellinger distance, (T,).

    The root of a probability is off by a relative E: three roundings of (z - m) / temperature in the
    exponent, which is half of at most 2 max |z| (3 max |z| u), 4 u of exponential and root, and the same
    again from the partition sum that divides it; E = (8 max |z| / temperature + 16) u leaves room for
    log-probabilities (in the reference implementation), which round once more. The vector of differences
    of roots, whose length is sqrt(2 d), is then off by 2 E, and half its square by 2 E sqrt(2 d) + 2 E^2;
    its sum adds a few u d.
    """
    e = (8 * largest(z, reference) / temperature + 16) * UNIT
    return 2 * e * (2 * distance).sqrt() + 2 * e * e + 16 * UNIT * distance


def true_distance(z, reference, temperature):
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (z, reference))
    return 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)


def assert_same(a, b, z, reference, temperature, logit_error=0.0):
    """Both are within the bounds of the truth, so within twice the bounds of each other."""
    tolerance = 2 * max(bound(x / temperature, logit_error / temperature) for x in (z, reference))
    for name in set(FIELDS) - {"hellinger"}:
        assert (getattr(a, name).double() - getattr(b, name).double()).abs().max() <= tolerance, name
    # A logit that is off by x moves the root of a probability by a relative x, at most.
    d = true_distance(z, reference, temperature)
    moved = 2 * logit_error / temperature
    limit = 2 * distance_bound(z, reference, temperature, d) + 2 * moved * (2 * d).sqrt() + 2 * moved**2
    assert ((a.hellinger.double() - b.hellinger.double()).abs() <= limit).all()


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems())
def test_ranges(impl, problem):
    z, reference, targets, temperature = problem
    stats = stats_of(impl, z, targets, reference, temperature)
    assert all(getattr(stats, name).isfinite().all() for name in FIELDS)
    assert (stats.hellinger >= 0).all() and (stats.hellinger <= 1).all()
    assert (stats.reverse_kl >= 0).all()
    # Sums of terms that are themselves not positive, or not negative: no rounding crosses 0.
    assert (stats.log_probs <= 0).all() and (stats.reference_log_probs <= 0).all()
    assert (stats.entropy >= 0).all()
    ceiling = (z != -torch.inf).sum(-1).double().log()
    assert (stats.entropy.double() <= ceiling + bound(z / temperature)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strangers_are_no_further_apart_than_one(impl):
    """Rounding takes the sum of one in five of these beyond 1."""
    z = 30 * torch.randn(200, 130, generator=torch.Generator().manual_seed(0))
    stats = stats_of(impl, z, torch.zeros(200, dtype=torch.int64), z.flip(-1))
    assert (stats.hellinger <= 1).all() and (stats.hellinger == 1).sum() > 50


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems())
def test_hellinger_is_symmetric(impl, problem):
    z, reference, targets, temperature = problem
    there = stats_of(impl, z, targets, reference, temperature)
    back = stats_of(impl, reference, targets, z, temperature)
    truth = true_distance(z, reference, temperature)
    limit = distance_bound(z, reference, temperature, truth)
    for stats in (there, back):
        assert ((stats.hellinger.double() - truth).abs() <= limit).all()
    assert ((there.hellinger - back.hellinger).double().abs() <= 2 * limit).all()
    # What is said of one distribution does not depend on which of the two it is: one formula, one sum.
    tolerance = 2 * max(bound(x / temperature) for x in (z, reference))
    assert (there.log_probs - back.reference_log_probs).abs().max() <= tolerance


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems())
def test_exactly_zero_at_equality(impl, problem):
    z, _, targets, temperature = problem
    stats = stats_of(impl, z, targets, z.clone(), temperature)
    assert not stats.hellinger.any() and not stats.reverse_kl.any()
    assert torch.equal(stats.log_probs, stats.reference_log_probs)


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems(), st.floats(-1000.0, 1000.0))
def test_a_constant_added_to_all_logits_changes_nothing(impl, problem, constant):
    z, reference, targets, temperature = problem
    z, reference = z.float(), reference.float()
    signs = 1.0 - 2.0 * (torch.arange(len(z)) % 2)
    moved, moved_reference = z + constant * signs[:, None], reference - constant * signs[:, None]
    assert_same(
        stats_of(impl, z, targets, reference, temperature),
        stats_of(impl, moved, targets, moved_reference, temperature),
        moved,
        moved_reference,
        temperature,
        # The sum is rounded: the moved logits are those of another distribution.
        logit_error=UNIT * largest(moved, moved_reference, z, reference),
    )


@pytest.mark.parametrize("impl", SHARDED)
@CASES
@given(problems(dtypes=(torch.float32,)), st.integers(-1000, 1000))
def test_a_constant_that_is_added_exactly_changes_no_bit(impl, problem, constant):
    z, reference, targets, _ = problem
    # Multiples of 1/16 below 2^11: sums and differences have at most 16 bits.
    z, reference = ((16 * x).round() / 16 for x in (z, reference))
    found = []
    for c in (0, constant):
        leaf = (z + c).requires_grad_()
        stats = stats_of(impl, leaf, targets, reference - c, entropy_grad=True)
        # reverse_kl adds the difference of the peaks, which the constant changes.
        values = [getattr(stats, name).detach() for name in FIELDS if name != "reverse_kl"]
        found.append([*values, *torch.autograd.grad((stats.log_probs + stats.entropy).sum(), leaf)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_is_immaterial(impl, problem, random):
    z, reference, targets, temperature = problem
    order = list(range(z.shape[1]))
    random.shuffle(order)
    where = torch.tensor(order).argsort()
    assert_same(
        stats_of(impl, z, targets, reference, temperature),
        stats_of(impl, z[:, order], where[targets], reference[:, order], temperature),
        z,
        reference,
        temperature,
    )


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems(), st.integers(1, 40), st.sampled_from((0.0, 1e4, -1e4, -torch.inf, torch.inf, torch.nan)))
def test_padding_contributes_nothing(impl, problem, columns, fill):
    z, reference, targets, temperature = problem
    size = z.shape[1]
    wide, wide_reference = (torch.nn.functional.pad(x, (0, columns), value=fill) for x in (z, reference))
    wide.requires_grad_()
    a = stats_of(impl, z, targets, reference, temperature)
    b = stats_of(impl, wide, targets, wide_reference, temperature, vocab_size=size, entropy_grad=True)
    assert_same(a, b, z, reference, temperature)
    (grad,) = torch.autograd.grad((b.log_probs + b.entropy).sum(), wide)
    assert grad.isfinite().all() and not grad[:, size:].any()


@pytest.mark.parametrize("impl", SHARDED)
@CASES
@given(problems(dtypes=(torch.float32,)), st.lists(st.integers(0, 130), max_size=6))
def test_shards_of_any_width_merge_to_the_whole(impl, problem, cuts):
    z, reference, targets, _ = problem
    size = z.shape[1]
    ends = [0, *sorted(min(cut, size) for cut in cuts), size]
    rows = [
        shard_numbers(impl, z[:, a:b], targets - a, reference[:, a:b])
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]
    assert_same(merge_shards(torch.stack(rows)), stats_of(impl, z, targets, reference), z, reference, 1.0)


@pytest.mark.parametrize("impl", IMPLS)
@CASES
@given(problems(dtypes=(torch.float32,)))
def test_a_tokens_gradient_adds_up_to_zero(impl, problem):
    """No statistic changes where all logits move alike."""
    z, _, targets, temperature = problem
    z.requires_grad_()
    stats = stats_of(impl, z, targets, temperature=temperature, entropy_grad=True)
    (of_log_probs,) = torch.autograd.grad(stats.log_probs.sum(), z, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(stats.entropy.sum(), z)
    # The probabilities, each off by a relative `bound`, add up to 1; those of an entropy weigh |log p + H|.
    tolerance = bound(z.detach() / temperature) / temperature
    span = 2 * largest(z.detach()) / temperature + 10
    assert of_log_probs.double().sum(-1).abs().max() <= tolerance
    assert of_entropy.double().sum(-1).abs().max() <= span * tolerance


# --- random credit ------------------------------------------------------------------------------------

VOCAB = 46
ROUNDING = 2.0**-24
"""Credit is float64 but for one rounding to float32, a relative 2^-24; twice that covers float64's own."""


ANY_TAU = st.sampled_from((1e-3, 0.05, 1.0)) | st.floats(1e-3, 1e3)
ANY_KAPPA = st.sampled_from((0.0, 1.0)) | st.floats(0.0, 4.0)


@st.composite
def rollouts(draw, tau=ANY_TAU, kappa=ANY_KAPPA):
    """Distances, entropies, which tokens count, where sequences end, and the settings."""
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    total = sum(lengths)
    scales = torch.rand(len(lengths), generator=g) ** draw(st.sampled_from((0, 8)))
    distance = torch.rand(total, generator=g) * scales.repeat_interleave(torch.tensor(lengths))
    entropy = torch.rand(total, generator=g) * math.log(VOCAB) * draw(st.sampled_from((0.0, 1.0, 1.0)))
    mask = torch.rand(total, generator=g) >= draw(st.sampled_from((0.0, 0.4, 0.9)))
    normalization = draw(st.sampled_from(("log_vocab", "none")))
    how = {"tau": draw(tau), "kappa": draw(kappa), "entropy_normalization": normalization}
    return distance, entropy, mask, lengths, how


def credit(distance, entropy, mask, lengths, how):
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return credit_weights(distance, entropy, ends, vocab_size=VOCAB, loss_mask=mask, **how)


@CASES
@given(rollouts())
def test_weights_add_up_to_the_counted_tokens(rollout):
    distance, entropy, mask, lengths, how = rollout
    got = credit(*rollout)
    assert (got.weights >= 0).all() and got.weights.isfinite().all()
    assert not got.weights[~mask].any() and not got.scores[~mask].any()
    assert (got.effective_fraction > 0).all() and (got.effective_fraction <= 1).all()
    for weights, counted in zip(got.weights.split(lengths), mask.split(lengths), strict=True):
        # 2^-23 is below the 1e-6 that is promised.
        total = int(counted.sum())
        assert abs(float(weights.double().sum()) - total) <= 2 * ROUNDING * total


@CASES
@given(rollouts())
def test_weights_follow_the_scores_no_further_than_tau_lets_them(rollout):
    """exp(-r / tau) <= w <= exp(r / tau), r the range of a response's scores: 1 for a large tau."""
    distance, entropy, mask, lengths, how = rollout
    got = credit(*rollout)
    parts = (got.weights.double(), got.scores.double(), mask)
    for weights, scores, counted in zip(*(x.split(lengths) for x in parts), strict=True):
        w, s = weights[counted], scores[counted]
        if not len(w):
            continue
        order = s.argsort()
        assert (w[order].diff() >= 0)[s[order].diff() > 0].all()
        # The scores that are handed out are rounded to float32.
        limit = float(s.max() - s.min() + 2 * ROUNDING * s.max()) / how["tau"]
        assert float(w.max()) <= math.exp(min(limit, 700.0)) * (1 + 2 * ROUNDING)
        assert float(w.min()) >= math.exp(-limit) * (1 - 2 * ROUNDING) - 2.0**-149


@CASES
@given(rollouts(tau=st.just(1e9)))
def test_an_infinite_tau_gives_one(rollout):
    mask = rollout[2]
    # |w - 1| <= exp(r / tau) - 1; scores are below ln(VOCAB)^4 < 215 nats^4.
    assert ((credit(*rollout).weights - mask.float()).abs() <= 2.2e-7 + ROUNDING).all()


@CASES
@given(rollouts())
def test_masked_tokens_are_as_if_absent(rollout):
    distance, entropy, mask, lengths, how = rollout
    got = credit(*rollout)
    dirty = credit(
        torch.where(mask, distance, torch.nan), torch.where(mask, entropy, torch.inf), mask, lengths, how
    )
    assert torch.equal(got.weights, dirty.weights) and torch.equal(got.scores, dirty.scores)
    counted = [int(part.sum()) for part in mask.split(lengths)]
    packed = credit(distance[mask], entropy[mask], mask[mask], counted, how)
    assert torch.allclose(got.weights[mask], packed.weights, rtol=2 * ROUNDING, atol=2.0**-149)
    assert torch.allclose(got.effective_fraction, packed.effective_fraction, rtol=2 * ROUNDING, atol=0)


@CASES
@given(rollouts(), st.randoms(use_true_random=False))
def test_sequences_do_not_see_each_other(rollout, random):
    distance, entropy, mask, lengths, how = rollout
    order = list(range(len(lengths)))
    random.shuffle(order)

    def reordered(x):
        parts = x.split(lengths)
        return torch.cat([parts[i] for i in order])

    got = credit(*rollout)
    moved = credit(*(reordered(x) for x in (distance, entropy, mask)), [lengths[i] for i in order], how)
    assert torch.allclose(reordered(got.weights), moved.weights, rtol=2 * ROUNDING, atol=2.0**-149)
    assert torch.equal(reordered(got.scores), moved.scores)
    assert torch.allclose(got.effective_fraction[order], moved.effective_fraction, rtol=2 * ROUNDING, atol=0)


@CASES
@given(rollouts(kappa=st.just(0.0)))
def test_kappa_zero_ignores_entropy(rollout):
    distance, entropy, mask, lengths, how = rollout
    got = credit(*rollout)
    without = credit(distance, torch.zeros_like(entropy), mask, lengths, how)
    assert torch.equal(got.weights, without.weights)
    assert torch.equal(got.scores, torch.where(mask, distance, 0.0))


@CASES
@given(rollouts(), st.sampled_from((0.25, 0.5, 2.0, 8.0)))
def test_only_the_distance_over_tau_matters(rollout, factor):
    """A power of two scales without rounding: not a bit changes."""
    distance, entropy, mask, lengths, how = rollout
    scaled = credit(distance * factor, entropy, mask, lengths, {**how, "tau": how["tau"] * factor})
    assert torch.equal(credit(*rollout).weights, scaled.weights)
