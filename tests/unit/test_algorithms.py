"""Advantages, surrogate and the two losses against definitions written here in float64."""

from __future__ import annotations

import math
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_dgpo.algorithms import build_algorithm
from megatron_dgpo.algorithms.advantages import group_advantages
from megatron_dgpo.algorithms.surrogate import (
    clipped_surrogate,
    k3_kl,
    policy_ratio,
    token_coefficients,
    truncated_importance_weights,
)
from megatron_dgpo.ops import token_stats
from megatron_dgpo.types import Group, PackedBatch, Prompt, Sample

VOCAB = 46
LENGTHS = (9, 4, 30, 12, 21)
PROMPTS = (3, 1, 8, 5, 2)
COMMON = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "advantage_eps": 1e-6,
    "normalize_by_std": True,
    "aggregation": "sequence_mean",
    "tis_cap": 0.0,
    "sequence_mask_cap": 0.0,
    "credit": "uniform",
    "tau": 1.0,
    "tau_schedule": "constant",
    "tau_final": 1.0,
    "effective_fraction": 0.9,
    "kappa": 1.0,
    "kappa_schedule": "constant",
    "kappa_final": 1.0,
    "entropy_normalization": "log_vocab",
    "distance": "hellinger",
    "credit_timing": "rollout",
}


def dgpo(**changes):
    settings = {**COMMON, "name": "dgpo", "credit": "distribution", "tau": 0.02}
    return build_algorithm(SimpleNamespace(**{**settings, **changes}), vocab_size=VOCAB)


def grpo(**changes):
    return build_algorithm(
        SimpleNamespace(**{"name": "grpo", "kl_coef": 0.0, **COMMON, **changes}), vocab_size=VOCAB
    )


# --- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_group_advantages(normalize, eps):
    rewards = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.25, None, -3.0, 7.5], [None, 2.0, 4.0]]
    got = group_advantages(rewards, eps=eps, normalize_by_std=normalize)
    for group, row in zip(rewards, got, strict=True):
        known = [r for r in group if r is not None]
        mean, std = statistics.fmean(known), statistics.pstdev(known)
        for reward, advantage in zip(group, row, strict=True):
            if reward is None:
                assert advantage is None
            else:
                want = (reward - mean) / (std + eps) if normalize else reward - mean
                assert advantage == pytest.approx(want, rel=1e-12, abs=1e-14)


def test_equal_rewards_have_exactly_no_advantage():
    got = group_advantages([[0.1] * 7, [None, 3.0], [None, None], []], eps=0.0, normalize_by_std=True)
    assert got == [[0.0] * 7, [None, 0.0], [None, None], []]


def test_bad_rewards_are_named():
    with pytest.raises(ValueError, match=r"rewards\[1\]\[2\] = nan"):
        group_advantages([[1.0], [0.0, 1.0, math.nan]], eps=1e-6, normalize_by_std=True)
    with pytest.raises(ValueError, match="eps=-1"):
        group_advantages([[1.0]], eps=-1, normalize_by_std=True)


def test_assign_and_select():
    def samples(rewards):
        prompt = Prompt(id="p", token_ids=(1,), text="", answer="")
        made = [Sample(prompt, i, [1], [0.0], "stop", (), reward=r) for i, r in enumerate(rewards)]
        return Group(prompt, made)

    groups = [samples([1.0, None, 0.0]), samples([0.0, 0.0])]
    algorithm = dgpo(advantage_eps=0.0)
    algorithm.assign_advantages(groups)
    assert [s.advantage for g in groups for s in g.samples] == [1.0, 0.0, -1.0, 0.0, 0.0]
    assert algorithm.select(groups) == [groups[0].samples[0], groups[0].samples[2], *groups[1].samples]


# --- surrogate ------------------------------------------------------------------------------------


def test_clipped_surrogate_and_its_gradient():
    cases = [  # ratio, advantage, value, slope
        (1.5, 2.0, 2.56, 0.0),
        (1.1, 2.0, 2.2, 2.0),
        (0.5, 2.0, 1.0, 2.0),
        (0.5, -2.0, -1.6, 0.0),
        (0.9, -2.0, -1.8, -2.0),
        (1.5, -2.0, -3.0, -2.0),
        (1.5, 0.0, 0.0, 0.0),
    ]
    ratio, advantage, value, slope = (torch.tensor(c, dtype=torch.float64) for c in zip(*cases, strict=True))
    ratio.requires_grad_()
    got = clipped_surrogate(ratio, advantage, 0.2, 0.28)
    (grad,) = torch.autograd.grad(got.sum(), ratio)
    assert torch.allclose(got, value, rtol=1e-15) and torch.equal(grad, slope)


def test_ratio_and_k3():
    a = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
    b = torch.tensor([-1.5, -2.0, -0.5 + 1e-9, -9.0], dtype=torch.float64)
    assert torch.allclose(policy_ratio(a, b), a.exp() / b.exp(), rtol=1e-14)
    got = k3_kl(a, b)
    assert torch.allclose(got, b.exp() / a.exp() - 1 - (b - a), rtol=1e-12, atol=1e-15) and got.min() >= 0
    # In expectation over p it is KL(p || q).
    p, q = torch.softmax(torch.randn(2, 50, dtype=torch.float64), -1)
    assert (p * k3_kl(p.log(), q.log())).sum() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-10)


def test_token_coefficients():
    cu = torch.tensor([0, 3, 5, 9], dtype=torch.int32)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0]).bool()
    by_sequence = token_coefficients(cu, mask, "sequence_mean", num_sequences=10, num_tokens=77)
    want = torch.tensor([0, 1 / 20, 1 / 20, 0, 0, 1 / 30, 1 / 30, 1 / 30, 0])
    assert torch.allclose(by_sequence, want, rtol=1e-7, atol=0)
    by_token = token_coefficients(cu, mask, "token_mean", num_sequences=10, num_tokens=77)
    assert torch.allclose(by_token, mask.float() / 77, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="aggregation='mean'.*sequence_mean, token_mean"):
        token_coefficients(cu, mask, "mean", num_sequences=1, num_tokens=1)
    with pytest.raises(ValueError, match="num_tokens=0"):
        token_coefficients(cu, mask, "token_mean", num_sequences=1, num_tokens=0)


# --- losses ---------------------------------------------------------------------------------------


def problem(shift=1.0, move=0.3, seed=0):
    """Logits of reference, old and current policy for five packed sequences, in float32."""
    g = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    reference = torch.randn(total, VOCAB, generator=g) * 2
    old = reference + shift * torch.randn(total, VOCAB, generator=g)
    now = old + move * torch.randn(total, VOCAB, generator=g)
    targets = torch.randint(0, VOCAB, (total,), generator=g)
    mask = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    mask[20] = False
    advantages = torch.tensor([1.3, -0.7, 0.0, -1.1, 0.4])
    return reference, old, now, targets, mask, advantages


def pack(targets, mask, advantages, sequences=range(5)):
    starts = [sum(LENGTHS[:i]) for i in range(6)]
    where = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences])
    cu = torch.tensor([0, *(LENGTHS[s] for s in sequences)], dtype=torch.int32).cumsum(0).int()
    return where, PackedBatch(
        tokens_T=targets[where],
        targets_T=targets[where],
        positions_T=torch.cat([torch.arange(LENGTHS[s]) for s in sequences]),
        loss_mask_T=mask[where],
        cu_seqlens=cu,
        advantages_S=advantages[list(sequences)],
    )


def run(
    algorithm, case, sequences=range(5), num_sequences=5, num_tokens=None, engine=None, advantages_T=None
):
    """Loss, gradient of the current logits (all tokens; zero elsewhere) and metrics of one micro-batch.
    engine: the engine's log-probs; the trainer's own where None. advantages_T: a critic's, of all tokens."""
    reference, old, now, targets, mask, advantages = case
    where, batch = pack(targets, mask, advantages, sequences)
    num_tokens = int(mask.sum()) if num_tokens is None else num_tokens
    with torch.no_grad():
        stats = token_stats(
            old[where],
            batch.targets_T,
            reference_logits=reference[where] if algorithm.needs_reference else None,
        )
    batch.features = algorithm.rollout_features(stats, batch)
    batch.features["engine_log_probs"] = stats.log_probs if engine is None else engine[where]
    if advantages_T is not None:
        batch.features["advantages"] = advantages_T[where]
    batch.coefficients_T = algorithm.token_coefficients(batch, num_sequences, num_tokens)
    leaf = now.clone().requires_grad_()
    stats = token_stats(
        leaf[where],
        batch.targets_T,
        reference_logits=reference[where] if algorithm.update_needs_reference else None,
    )
    loss, metrics = algorithm.loss(stats, batch)
    (grad,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), grad, {k: (float(a), float(b)) for k, (a, b) in metrics.items()}


def oracle(
    case,
    *,
    tau,
    kappa,
    timing,
    distance,
    aggregation,
    kl_coef=0.0,
    normalise=True,
    engine=None,
    cap=None,
):
    """Eq. 7 with Eq. 2 and 6 in float64, sequence by sequence; tau None is GRPO. cap: each token's term
    counts min(cap, old / engine) times."""
    reference, old, now, targets, mask, advantages = case
    leaf = now.double().requires_grad_()
    log_q, log_old, log_p = (torch.log_softmax(x, -1) for x in (reference.double(), old.double(), leaf))
    loss, start = torch.zeros((), dtype=torch.float64), 0
    for s, length in enumerate(LENGTHS):
        tokens = [t for t in range(start, start + length) if mask[t]]
        start += length
        logs = (log_old if timing == "rollout" else log_p.detach())[tokens]
        p, q = logs.exp(), log_q[tokens].exp()
        if tau is None:
            w = torch.ones(len(tokens), dtype=torch.float64)
        else:
            d = 1 - (p * q).sqrt().sum(-1) if distance == "hellinger" else (p * (logs - q.log())).sum(-1)
            gate = -(p * logs).sum(-1) / (math.log(VOCAB) if normalise else 1.0)
            w = len(tokens) * torch.softmax(d * gate**kappa / tau, 0)
        y = targets[tokens]
        lp, lo, lr = (x[tokens].gather(1, y[:, None])[:, 0] for x in (log_p, log_old, log_q))
        rho, a = (lp - lo).exp(), float(advantages[s]) * w
        surrogate = torch.minimum(rho * a, rho.clamp(0.8, 1.28) * a)
        if engine is not None:
            surrogate = surrogate * (lo.exp() / engine[tokens].double().exp()).clamp(max=cap)
        kl = (lr - lp).exp() - (lr - lp) - 1
        share = 1 / (5 * len(tokens)) if aggregation == "sequence_mean" else 1 / int(mask.sum())
        loss = loss - share * (surrogate - kl_coef * kl).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), grad


def close(got, want, scale=1.0):
    """float32 statistics are within 1e-5 of the truth (test_ops); a loss adds 60 of them with shares that
    sum to 1 and factors |w rho A| of a few; weights multiply an error in the score by 1 / tau."""
    assert abs(got[0] - want[0]) <= 2e-5 * scale
    assert (got[1] - want[1]).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("timing", ["rollout", "update"])
@pytest.mark.parametrize("distance", ["hellinger", "reverse_kl"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_dgpo_loss_and_gradient(timing, distance, aggregation):
    case = problem()
    settings = {"tau": 0.2, "kappa": 1.0, "distance": distance, "aggregation": aggregation}
    got = run(dgpo(credit_timing=timing, **settings), case)
    close(got, oracle(case, timing=timing, **settings))
    other = oracle(case, timing={"rollout": "update", "update": "rollout"}[timing], **settings)
    assert abs(got[0] - other[0]) > 1e-4 or (got[1] - other[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_grpo_loss_and_gradient(kl_coef, aggregation):
    case = problem()
    algorithm = grpo(kl_coef=kl_coef, aggregation=aggregation)
    assert algorithm.needs_reference is (kl_coef > 0) and not algorithm.update_needs_reference
    want = oracle(
        case, tau=None, kappa=0, timing="rollout", distance="", aggregation=aggregation, kl_coef=kl_coef
    )
    close(run(algorithm, case), want)


@pytest.mark.parametrize("timing", ["rollout", "update"])
def test_dgpo_is_grpo_exactly_at_the_reference(timing):
    case = problem(shift=0.0, move=0.0)
    a, b = run(dgpo(credit_timing=timing, tau=0.02), case), run(grpo(), case)
    assert a[0] == b[0] and torch.equal(a[1], b[1])
    assert a[2]["credit_weight_variance"] == (0.0, 59.0 - 2)
    assert a[2]["credit_effective_fraction"] == (5.0, 5.0)


def test_rollout_credit_at_the_reference_is_grpo_through_later_updates():
    case = problem(shift=0.0, move=0.4)
    a, b = run(dgpo(credit_timing="rollout"), case), run(grpo(), case)
    assert a[0] == b[0] and torch.equal(a[1], b[1])


def test_infinite_tau_is_grpo():
    case = problem()
    a, b = run(dgpo(tau=1e9), case), run(grpo(), case)
    assert a[0] == pytest.approx(b[0], abs=1e-7) and (a[1] - b[1]).abs().max() <= 1e-8


@pytest.mark.parametrize(
    "make",
    [dgpo, partial(dgpo, credit_timing="update"), partial(grpo, kl_coef=0.04)],
    ids=["dgpo", "dgpo at update", "grpo with kl"],
)
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_the_split_into_micro_batches_does_not_matter(make, aggregation):
    algorithm = make(aggregation=aggregation)
    case = problem()
    tokens = int(case[4].sum())
    whole = run(algorithm, case)
    for split in ([[0], [1], [2], [3], [4]], [[4, 0], [2, 1, 3]]):
        parts = [run(algorithm, case, sequences, 5, tokens) for sequences in split]
        # float32: the sum of a hundred terms below 1 in another order.
        assert sum(p[0] for p in parts) == pytest.approx(whole[0], abs=1e-6)
        assert (sum(p[1] for p in parts) - whole[1]).abs().max() <= 1e-7
        for name, (total, count) in whole[2].items():
            assert sum(p[2][name][1] for p in parts) == count
            assert sum(p[2][name][0] for p in parts) == pytest.approx(total, rel=1e-6, abs=1e-9)


def test_metrics():
    case = problem(move=0.6)
    reference, old, now, targets, mask, advantages = case
    _, _, metrics = run(dgpo(credit_timing="update"), case)
    got = {k: a / b for k, (a, b) in metrics.items()}
    p, q = torch.softmax(now.double(), -1)[mask], torch.softmax(reference.double(), -1)[mask]
    y = targets[mask][:, None]
    ratio = p.gather(1, y)[:, 0] / torch.softmax(old.double(), -1)[mask].gather(1, y)[:, 0]
    a = torch.repeat_interleave(advantages, torch.tensor(LENGTHS))[mask]
    low, high = (ratio < 0.8) & (a < 0), (ratio > 1.28) & (a > 0)
    entropy = -(p * p.log()).sum(-1)
    want = {
        "clip_fraction": (low | high).double().mean(),
        "clip_low_fraction": low.double().mean(),
        "ratio_mean": ratio.mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "entropy": entropy.mean(),
        "entropy_normalized": entropy.mean() / math.log(VOCAB),
        "hellinger": (1 - (p * q).sqrt().sum(-1)).mean(),
        "kl_reference": (p * (p / q).log()).sum(-1).mean(),
    }
    assert 0 < want["clip_low_fraction"] < want["clip_fraction"]
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), rel=1e-5), name
    # What they are is in test_spread.py.
    spread = {"weight_variance", "weight_max", "top1_share", "position_correlation", "tau", "kappa"}
    spread |= {
        f"{n}{side}" for n in ("effective_fraction", "top10_share") for side in ("", "_right", "_wrong")
    }
    assert set(got) == {*want, *(f"credit_{n}" for n in spread)}
    assert got["credit_tau"] == pytest.approx(0.02) and got["credit_kappa"] == 1.0
    assert 0 < got["credit_effective_fraction"] < 1
    # With mean 1, the variance of a response's weights is 1 / fraction - 1.
    one = run(dgpo(credit_timing="update"), case, [2])[2]
    variance, fraction = (one[f"credit_{n}"] for n in ("weight_variance", "effective_fraction"))
    assert variance[0] / variance[1] == pytest.approx(1 / fraction[0] - 1, rel=1e-5)


@pytest.mark.parametrize("make", [dgpo, lambda: grpo(kl_coef=0.04)])
@pytest.mark.parametrize("sign", [1, -1])
def test_tokens_outside_the_mask_do_not_reach_the_loss(make, sign):
    case = problem()
    reference, old, now, targets, mask, advantages = case
    loss, grad, metrics = run(make(), case)
    wild, wild_old = now.clone(), old.clone()
    # Ratios of e^1000 and e^-1000, to the old policy and to the reference.
    wild[~mask, targets[~mask]], wild_old[~mask, targets[~mask]] = sign * 1e3, -sign * 1e3
    wild_loss, wild_grad, wild_metrics = run(make(), (reference, wild_old, wild, targets, mask, advantages))
    assert wild_loss == loss and torch.equal(wild_grad, grad) and wild_metrics == metrics
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))


def test_what_is_missing_is_named():
    _, old, _, targets, mask, advantages = problem()
    where, batch = pack(targets, mask, advantages)
    stats = token_stats(old[where], batch.targets_T)
    with pytest.raises(ValueError, match="coefficients_T is None"):
        grpo().loss(stats, batch)
    batch.coefficients_T = grpo().token_coefficients(batch, 5, 1)
    with pytest.raises(KeyError, match="old_log_probs"):
        grpo().loss(stats, batch)
    for algorithm in (dgpo(), grpo(kl_coef=0.1)):
        with pytest.raises(ValueError, match="needs the reference's statistics: hellinger"):
            algorithm.rollout_features(stats, batch)
    batch.features = grpo().rollout_features(stats, batch)
    with pytest.raises(ValueError, match="credit_timing='update' needs the reference"):
        dgpo(credit_timing="update").loss(stats, batch)
    for change in ({"name": "ppi"}, {"distance": "euclid"}, {"credit_timing": "never"}):
        ((key, value),) = change.items()
        with pytest.raises(ValueError, match=f"{key}='{value}': choose one of"):
            dgpo(**change)


# --- truncated importance sampling ----------------------------------------------------------------


def engine_log_probs(case, spread=0.6):
    """Log-probs of an engine that is not quite the trainer's old policy; wild outside the mask."""
    _, old, _, targets, mask, _ = case
    own = torch.log_softmax(old, -1).gather(1, targets[:, None])[:, 0]
    noise = spread * torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    return torch.where(mask, own + noise, torch.full_like(own, -1e4))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("cap", [1.3, 1e9])
def test_importance_weights_in_loss_and_gradient(cap, aggregation):
    """A weight is as exact as the log-probs it is made of, and multiplies their terms by 1.2 on average:
    twice the bound."""
    case = problem()
    engine = engine_log_probs(case)
    settings = {"tau": 0.2, "kappa": 1.0, "distance": "hellinger", "aggregation": aggregation}
    for timing in ("rollout", "update"):
        got = run(dgpo(credit_timing=timing, tis_cap=cap, **settings), case, engine=engine)
        close(got, oracle(case, timing=timing, engine=engine, cap=cap, **settings), scale=2)
        plain = oracle(case, timing=timing, **settings)
        assert (got[1] - plain[1]).abs().max() > 1e-4
    settings |= {"tau": None, "timing": "rollout", "kl_coef": 0.04}
    got = run(grpo(kl_coef=0.04, aggregation=aggregation, tis_cap=cap), case, engine=engine)
    close(got, oracle(case, engine=engine, cap=cap, **settings), scale=2)


def test_importance_weights_as_metrics():
    case = problem()
    _, old, _, targets, mask, _ = case
    engine = engine_log_probs(case)
    own = torch.log_softmax(old.double(), -1).gather(1, targets[:, None])[:, 0]
    ratio = (own.exp() / engine.double().exp())[mask]
    _, _, metrics = run(dgpo(tis_cap=1.3), case, engine=engine)
    weight, capped = (metrics[name][0] / metrics[name][1] for name in ("tis_weight", "tis_capped"))
    assert weight == pytest.approx(float(ratio.clamp(max=1.3).mean()), rel=1e-6)
    assert capped == float((ratio > 1.3).double().mean()) and 0.1 < capped < 0.6
    _, _, metrics = run(dgpo(), case, engine=engine)
    assert not [name for name in metrics if name.startswith("tis")]


def test_importance_weights_and_their_cap():
    old = torch.tensor([-1.0, -1.0, -2.0, -0.1, -0.1])
    engine = torch.tensor([-1.0, -2.0, -1.0, -200.0, -0.1], requires_grad=True)
    weights, capped = truncated_importance_weights(old.requires_grad_(), engine, 2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-1.0), 2.0, 1.0], rel=1e-6)
    assert capped.tolist() == [False, True, False, True, False] and not weights.requires_grad
    exactly = truncated_importance_weights(torch.zeros(1), torch.zeros(1), 1.0)
    assert (exactly[0].item(), exactly[1].item()) == (1.0, False)


@pytest.mark.parametrize("make", [dgpo, lambda **c: grpo(kl_coef=0.04, **c)])
def test_an_engine_that_agrees_has_weights_of_exactly_one(make):
    case = problem()
    off, on = run(make(), case), run(make(tis_cap=1.0), case)
    assert off[0] == on[0] and torch.equal(off[1], on[1])
    assert on[2]["tis_weight"] == (59.0 - 2, 59.0 - 2) and on[2]["tis_capped"] == (0.0, 59.0 - 2)


@pytest.mark.parametrize("make", [dgpo, lambda **c: grpo(kl_coef=0.04, **c)])
def test_without_a_cap_the_engine_is_not_looked_at(make):
    case = problem()
    plain, other = run(make(), case), run(make(), case, engine=engine_log_probs(case) * torch.nan)
    assert plain[0] == other[0] and torch.equal(plain[1], other[1]) and plain[2] == other[2]


def test_a_cap_below_one_and_missing_engine_log_probs_are_refused():
    for cap in (0.5, -1.0, math.nan):
        with pytest.raises(ValueError, match="tis_cap=.*at least 1, or 0"):
            dgpo(tis_cap=cap)
    _, old, _, targets, mask, advantages = problem()
    where, batch = pack(targets, mask, advantages)
    stats = token_stats(old[where], batch.targets_T)
    algorithm = grpo(tis_cap=2.0)
    batch.features = algorithm.rollout_features(stats, batch)
    batch.coefficients_T = algorithm.token_coefficients(batch, 5, 1)
    with pytest.raises(KeyError, match="engine_log_probs"):
        algorithm.loss(stats, batch)
