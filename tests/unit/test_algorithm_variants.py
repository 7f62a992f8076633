"""The algorithms beside DGPO and GRPO, and credit as a component of each: losses and gradients against their
published formulas, written here in float64 response by response."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from test_algorithms import COMMON, LENGTHS, VOCAB, close, engine_log_probs, pack, problem, run

from megatron_dgpo.algorithms import Algorithm, build_algorithm
from megatron_dgpo.algorithms.advantages import leave_one_out_advantages
from megatron_dgpo.algorithms.assignment import LEAST_TAU
from megatron_dgpo.algorithms.schedules import scheduled
from megatron_dgpo.ops import token_stats

LONGEST = 40
DEFAULTS = {
    "dapo": {"aggregation": "token_mean"},
    "dapo_dgpo": {"aggregation": "token_mean", "credit": "distribution", "tau": 0.2},
    "gspo": {"clip_low": 3e-3, "clip_high": 4e-3},
    "dr_grpo": {"normalize_by_std": False, "aggregation": "fixed_length"},
    "reinforce": {"aggregation": "sequence_sum"},
    "ppo": {"aggregation": "token_mean"},
}


def make(name, **changes):
    settings = {**COMMON, "name": name, **DEFAULTS.get(name, {}), **changes}
    return build_algorithm(SimpleNamespace(**settings), vocab_size=VOCAB, max_response_tokens=LONGEST)


def responses(case):
    """For each response: its tokens' log-probs (now, with gradient; old), DGPO's weights under the old
    policy at tau 0.2, and its advantage. And the leaf."""
    reference, old, now, targets, mask, advantages = case
    leaf = now.double().requires_grad_()
    out, start = [], 0
    for s, length in enumerate(LENGTHS):
        tokens = [t for t in range(start, start + length) if mask[t]]
        start += length
        y = targets[tokens][:, None]
        lp, lo = (torch.log_softmax(x, -1)[tokens].gather(1, y)[:, 0] for x in (leaf, old.double()))
        p, q = (torch.softmax(x.double(), -1)[tokens] for x in (old, reference))
        d, gate = 1 - (p * q).sqrt().sum(-1), -(p * p.log()).sum(-1) / math.log(VOCAB)
        w = len(tokens) * torch.softmax(d * gate / 0.2, 0)
        out.append((lp, lo, w, float(advantages[s])))
    return out, leaf


def clipped(ratio, a, low, high):
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def dapo(parts, credit=False):
    """One mean over all tokens of all responses (Eq. 8, arXiv 2503.14476)."""
    terms = [
        clipped((lp - lo).exp(), a * (w if credit else torch.ones_like(w)), 0.2, 0.28)
        for lp, lo, w, a in parts
    ]
    return -torch.cat(terms).mean()


def gspo(parts, credit=False):
    """The mean over responses of the clipped sequence ratio (Eq. 5 and 7, arXiv 2507.18071). With credit the
    clip is the sequence's, and the weights move the gradient between tokens, but not the value."""
    total = 0.0
    for lp, lo, w, a in parts:
        s = (lp - lo).mean().exp()
        if credit:
            token_s = s.detach() * (lp - lp.detach()).exp()
            total = total + (w * clipped(token_s, torch.tensor(a), 3e-3, 4e-3)).mean()
        else:
            total = total + clipped(s, torch.tensor(a), 3e-3, 4e-3)
    return -total / len(parts)


def dr_grpo(parts):
    """Sums over tokens, over the number of responses and the longest response (arXiv 2503.20783)."""
    terms = [clipped((lp - lo).exp(), torch.tensor(a), 0.2, 0.28).sum() for lp, lo, _, a in parts]
    return -sum(terms) / (len(parts) * LONGEST)


def reinforce(parts):
    """The mean over responses of A log pi(y) (arXiv 2402.14740)."""
    return -sum(a * lp.sum() for lp, _, _, a in parts) / len(parts)


def value_and_gradient(formula, case, **how):
    parts, leaf = responses(case)
    loss = formula(parts, **how)
    (grad,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), grad


@pytest.mark.parametrize("move", [0.3, 0.02])
@pytest.mark.parametrize(
    "name, formula, how",
    [
        ("dapo", dapo, {}),
        ("dapo_dgpo", dapo, {"credit": True}),
        ("gspo", gspo, {}),
        ("dr_grpo", dr_grpo, {}),
        ("reinforce", reinforce, {}),
    ],
)
def test_loss_and_gradient(name, formula, how, move):
    case = problem(move=move)
    want = value_and_gradient(formula, case, **how)
    # The sum of a response's log-probs is of the size of its length, not of 1.
    close(run(make(name), case), want, scale=LONGEST if name == "reinforce" else 1)
    assert want[1].abs().max() > 1e-4


@pytest.mark.parametrize("credit", [False, True])
@pytest.mark.parametrize("move", [0.3, 0.02])
def test_ppo_takes_each_tokens_own_advantage(move, credit):
    """One mean over all tokens of the clipped surrogate (Eq. 7, arXiv 1707.06347). The responses' rewards,
    which advantages_S holds, must not come in once the critic has given tokens theirs."""
    case = problem(move=move)
    mask = case[4]
    advantages_T = torch.randn(len(mask), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parts, leaf = responses(case)
    rows = torch.split(advantages_T[mask], [len(lp) for lp, *_ in parts])
    terms = [
        clipped((lp - lo).exp(), a * (w if credit else 1.0), 0.2, 0.28)
        for (lp, lo, w, _), a in zip(parts, rows, strict=True)
    ]
    loss = -torch.cat(terms).mean()
    (grad,) = torch.autograd.grad(loss, leaf)
    ppo = make("ppo", **({"credit": "distribution", "tau": 0.2} if credit else {}))
    assert ppo.needs_critic
    advantages_T[~mask] = math.inf  # whatever stands there
    close(run(ppo, case, advantages_T=advantages_T), (float(loss.detach()), grad))
    assert grad.abs().max() > 1e-4
    splits = [
        run(ppo, case, sequences, 5, int(mask.sum()), advantages_T=advantages_T)
        for sequences in ([4, 0], [2, 1, 3])
    ]
    assert sum(s[0] for s in splits) == pytest.approx(float(loss.detach()), abs=2e-5)
    assert (sum(s[1] for s in splits) - grad).abs().max() <= 2e-6
    assert ppo.advantages([[1.0, None], [0.5, 0.5]]) == [[1.0, None], [0.5, 0.5]]


def test_credit_goes_with_the_sequence_ratio():
    case = problem(move=0.02)
    got = run(make("gspo", credit="distribution", tau=0.2), case)
    close(got, value_and_gradient(gspo, case, credit=True))
    assert got[0] == pytest.approx(run(make("gspo"), case)[0], abs=1e-6)


@pytest.mark.parametrize("name", [*(n for n in DEFAULTS if n != "ppo"), "dgpo", "grpo"])
def test_the_split_does_not_matter_and_equal_rewards_teach_nothing(name):
    case = problem(move=0.05)
    credit = {} if name in ("dgpo", "grpo") else {"credit": "distribution"}
    algorithm = make(name, kl_coef=0.0, **credit)
    tokens = int(case[4].sum())
    whole = run(algorithm, case)
    parts = [run(algorithm, case, sequences, 5, tokens) for sequences in ([4, 0], [2, 1, 3])]
    scale = LONGEST if name == "reinforce" else 1
    assert sum(p[0] for p in parts) == pytest.approx(whole[0], abs=1e-6 * scale)
    assert (sum(p[1] for p in parts) - whole[1]).abs().max() <= 1e-7 * scale
    still = run(algorithm, (*case[:5], torch.zeros(5)))
    assert still[0] == 0.0 and not still[1].any()
    rewards = [[0.5] * 4, [1.0, None, 1.0], [None, 3.0]]
    assert algorithm.advantages(rewards) == [[0.0] * 4, [0.0, None, 0.0], [None, 0.0]]


def test_leave_one_out():
    rewards = [[1.0, 0.0, 0.25, None, -2.0]]
    (got,) = leave_one_out_advantages(rewards)
    for i, (reward, advantage) in enumerate(zip(rewards[0], got, strict=True)):
        others = [r for j, r in enumerate(rewards[0]) if r is not None and j != i]
        want = None if reward is None else pytest.approx(reward - statistics.fmean(others), abs=1e-15)
        assert advantage == want
    with pytest.raises(ValueError, match=r"rewards\[0\]\[1\] = inf"):
        leave_one_out_advantages([[1.0, math.inf]])


def test_sequences_that_the_engine_saw_otherwise_teach_nothing():
    case = problem()
    _, old, _, targets, mask, advantages = case
    own = torch.log_softmax(old, -1).gather(1, targets[:, None])[:, 0]
    engine = engine_log_probs(case, spread=0.01)
    start = sum(LENGTHS[:2])
    engine[start : start + LENGTHS[2]] = own[start : start + LENGTHS[2]] - 0.2  # a ratio of e^0.2 throughout
    got = run(make("grpo", kl_coef=0.0, sequence_mask_cap=1.1), case, engine=engine)
    # The masked response still counts in the denominators.
    without = advantages.clone()
    without[2] = 0.0
    want = run(make("grpo", kl_coef=0.0), (*case[:5], without), engine=engine)
    assert got[0] == want[0] and torch.equal(got[1], want[1])
    total, count = got[2]["sequence_masked"]
    assert total / count == pytest.approx(int(mask[start : start + LENGTHS[2]].sum()) / int(mask.sum()))
    assert (
        run(make("grpo", kl_coef=0.0, sequence_mask_cap=1.3), case, engine=engine)[2]["sequence_masked"][0]
        == 0
    )


# --- credit over a run -----------------------------------------------------------------------------


def test_schedules():
    assert [scheduled(1.0, 0.2, "linear", x) for x in (0.0, 0.25, 1.0)] == pytest.approx([1.0, 0.8, 0.2])
    assert [scheduled(0.0, 2.0, "cosine", x) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 1.0, 2.0])
    assert scheduled(0.0, 2.0, "cosine", 0.25) == pytest.approx(1 - math.sqrt(0.5))
    assert scheduled(3.0, 7.0, "constant", 0.9) == 3.0
    with pytest.raises(ValueError, match="progress=1.5"):
        scheduled(1.0, 2.0, "linear", 1.5)


def test_scheduled_credit_is_that_of_the_moment():
    case = problem()
    moving = make(
        "dgpo",
        credit="distribution",
        tau=0.4,
        tau_schedule="linear",
        tau_final=0.1,
        kappa=0.0,
        kappa_schedule="cosine",
        kappa_final=2.0,
    )
    for progress, tau, kappa in ((0.0, 0.4, 0.0), (0.5, 0.25, 1.0), (1.0, 0.1, 2.0)):
        moving.begin_step(progress)
        fixed = make("dgpo", credit="distribution", tau=tau, kappa=kappa)
        a, b = run(moving, case), run(fixed, case)
        assert a[0] == pytest.approx(b[0], abs=1e-7) and torch.allclose(a[1], b[1], atol=1e-9)
        assert a[2]["credit_tau"][0] == pytest.approx(5 * tau)


def prepared(algorithm, case, splits):
    """Micro-batches with features after `settle`, and their stats."""
    reference, old, _, targets, mask, advantages = case
    batches = []
    for sequences in splits:
        where, batch = pack(targets, mask, advantages, sequences)
        stats = token_stats(old[where], batch.targets_T, reference_logits=reference[where])
        batch.features = algorithm.rollout_features(stats, batch)
        batches.append(batch)
    algorithm.settle(batches)
    return batches


def fractions(batches):
    """(sum w)^2 / (T sum w^2) of each response."""
    out = []
    for batch in batches:
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            w = batch.features["credit_weights"][a:b][batch.loss_mask_T[a:b]].double()
            out.append(float(w.sum() ** 2 / (len(w) * (w**2).sum())))
    return out


@pytest.mark.parametrize("distance", ["hellinger", "reverse_kl"])
@pytest.mark.parametrize("target", [0.3, 0.9, 0.99])
def test_auto_tau_meets_the_effective_fraction(target, distance):
    auto = make("dgpo", credit="distribution", tau="auto", effective_fraction=target, distance=distance)
    case = problem()
    whole = prepared(auto, case, [range(5)])
    assert statistics.fmean(fractions(whole)) == pytest.approx(target, abs=1e-6)
    tau = auto.credit.tau
    parts = prepared(auto, case, [[3], [0, 4], [1, 2]])
    assert auto.credit.tau == pytest.approx(tau, rel=1e-9)
    assert statistics.fmean(fractions(parts)) == pytest.approx(target, abs=1e-6)
    fixed = prepared(make("dgpo", credit="distribution", tau=tau, distance=distance), case, [range(5)])
    assert torch.equal(fixed[0].features["credit_weights"], whole[0].features["credit_weights"])


def test_auto_tau_at_the_reference_leaves_credit_uniform():
    auto = make("dgpo", credit="distribution", tau="auto", effective_fraction=0.5)
    (batch,) = prepared(auto, problem(shift=0.0, move=0.0), [range(5)])
    assert torch.equal(batch.features["credit_weights"], batch.loss_mask_T.float())
    assert auto.credit.tau == 1.0  # and not the least, which would be the bisection's end


def test_auto_tau_follows_from_the_batch_alone():
    """So a run that was resumed after any step has the tau of one that was not."""
    cases = [problem(shift=0.0, move=0.0), problem(seed=1), problem(shift=1e-9, move=0.0), problem(shift=0.1)]
    goes_on = make("dgpo", credit="distribution", tau="auto", effective_fraction=0.7)
    for case in cases:
        fresh = make("dgpo", credit="distribution", tau="auto", effective_fraction=0.7)
        (a,), (b,) = prepared(goes_on, case, [range(5)]), prepared(fresh, case, [range(5)])
        assert goes_on.credit.tau == fresh.credit.tau
        assert torch.equal(a.features["credit_weights"], b.features["credit_weights"])


def test_a_fraction_that_no_tau_gives_has_the_nearer_bound():
    auto = make("dgpo", credit="distribution", tau="auto", effective_fraction=1e-3)
    prepared(auto, problem(), [range(5)])
    assert auto.credit.tau == pytest.approx(LEAST_TAU, rel=1e-9)


# --- a user's own -----------------------------------------------------------------------------------


class Doubled(Algorithm):
    def objective(self, tokens, ratio_T):
        return self._settings.options["times"] * super().objective(tokens, ratio_T)


def test_an_algorithm_by_its_path():
    case = problem()
    own = make("test_algorithm_variants:Doubled", options={"times": 2.0})
    want = run(make("grpo", kl_coef=0.0), case)
    got = run(own, case)
    assert got[0] == pytest.approx(2 * want[0], rel=1e-6) and torch.allclose(got[1], 2 * want[1])
    for name, message in (
        ("nowhere_at_all:Doubled", "No module named 'nowhere_at_all'"),
        ("test_algorithm_variants:Missing", "'Missing' in test_algorithm_variants is not a subclass"),
        ("test_algorithm_variants:run", "'run' in test_algorithm_variants is not a subclass of Algorithm"),
    ):
        with pytest.raises(ValueError, match=message):
            make(name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"credit": "other"}, "credit='other'"),
        ({"credit": "distribution", "tau": 0.0}, "tau=0.0"),
        ({"credit": "distribution", "tau": "fast"}, "tau='fast'"),
        ({"credit": "distribution", "tau_schedule": "linear", "tau_final": -1.0}, "tau=-1.0"),
        ({"credit": "distribution", "kappa": -1.0}, "kappa=-1.0"),
        ({"credit": "distribution", "tau": "auto", "effective_fraction": 1.0}, "effective_fraction=1.0"),
        ({"credit": "distribution", "tau": "auto", "tau_schedule": "linear"}, "tau='auto' has no schedule"),
        (
            {"credit": "distribution", "tau": "auto", "credit_timing": "update"},
            "tau='auto' is found for the scores of the rollout, and credit_timing='update' takes others",
        ),
        ({"tis_cap": 0.5}, "tis_cap=0.5"),
        ({"sequence_mask_cap": 0.9}, "sequence_mask_cap=0.9"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make("dapo", **change)
