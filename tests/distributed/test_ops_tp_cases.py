"""Token statistics over 1, 2 and 4 gloo ranks where they are hardest: no padding and targets on every
shard, every temperature and dtype, extreme and masked logits, next to the reference, and few tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from test_ops_tp import FIELDS, IMPLS, SHARDED, SIZES, UNIT

VOCAB, HIDDEN = 64, 8  # divides by 4: every column is vocabulary
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TEMPERATURES = (0.7, 1.0, 1.3)
SHIFTS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
HARD = ("extreme", "masked", "one shard masked")


def logits(kind, tokens=33, shift=0.5):
    """(policy, reference, targets): the targets visit every shard."""
    g = torch.Generator().manual_seed(7)
    z = torch.randn(tokens, VOCAB, generator=g) * 3
    reference = z + shift * torch.randn(tokens, VOCAB, generator=g)
    targets = torch.arange(tokens) * 5 % VOCAB
    if kind == "extreme":
        z[:11, 20:40] += 1e4
        reference[6:16, 40:] -= 1e4
        z[11:22] -= 1e4
        z[22:] = z[22:].sign() * 1e4
    elif kind == "masked":
        columns = [c for c in range(VOCAB) if c % 7 in (2, 3)]
        z[:, columns] = reference[:, columns] = -torch.inf
        targets = targets - (targets % 7 == 2).long() + (targets % 7 == 3).long()
    elif kind == "one shard masked":  # at 4 ranks a whole one, at 2 ranks half of one
        z[:, 16:32] = reference[:, 16:32] = -torch.inf
        targets = torch.where((targets >= 16) & (targets < 32), targets + 32, targets)
    return z, reference, targets


def cases():
    """Name -> (policy, reference, targets, temperature)."""
    out = {}
    for temperature in TEMPERATURES:
        for dtype in ROUNDING:
            z, reference, targets = logits("plain")
            out["plain", temperature, dtype] = z.to(dtype), reference.to(dtype), targets, temperature
        for kind in HARD:
            out[kind, temperature] = *logits(kind), temperature
    for shift in SHIFTS:
        out["near", shift] = *logits("plain", shift=shift), 1.0
    for tokens in (0, 1):
        out["few", tokens] = *logits("plain", tokens), 1.0
    return out


def gradient_of(stats, x):
    tokens = torch.arange(len(stats.log_probs))
    a, b = 1.0 + tokens % 3, 1.0 - tokens % 2  # at most 3
    return torch.autograd.grad((a * stats.log_probs + b * stats.entropy).sum(), x)


HEADS = [(0, torch.float32), (1, torch.float32), (16, torch.bfloat16), (16, torch.float16)]
"""Tokens, which 4 ranks share under sequence parallelism where there is not just one, and dtype."""


def lm_head(tokens, dtype):
    """(hidden states, head, reference's hidden states, targets on every shard)."""
    g = torch.Generator().manual_seed(8)
    h, w = torch.randn(tokens, HIDDEN, generator=g), torch.randn(VOCAB, HIDDEN, generator=g)
    h0 = h + 0.1 * torch.randn(tokens, HIDDEN, generator=g)
    return h.to(dtype), w.to(dtype), h0.to(dtype), torch.arange(tokens) * 21 % VOCAB


def head_answers(tokens, dtype, rank, size, group, impl):
    from megatron_dgpo.ops import linear_token_stats

    h, w, h0, targets = lm_head(tokens, dtype)
    rows = slice(None) if tokens == 1 else slice(rank * tokens // size, (rank + 1) * tokens // size)
    hidden = h[rows].clone().requires_grad_()
    columns = slice(rank * VOCAB // size, (rank + 1) * VOCAB // size)
    weight = w[columns].clone().requires_grad_()
    stats = linear_token_stats(
        hidden,
        weight,
        targets,
        reference_hidden=h0[rows],
        reference_weight=w[columns],
        tp_group=group,
        chunk_size=5,
        entropy_grad=True,
        sequence_parallel=tokens != 1,
        impl=impl,
    )
    grads = gradient_of(stats, (hidden, weight))
    return {name: getattr(stats, name).detach() for name in FIELDS}, [x.clone() for x in grads]


def work(rank, world_size):
    from megatron_dgpo.ops import token_stats

    results = {}
    for size in SIZES:
        group, shard = dist.new_group(list(range(size))), rank
        if rank >= size:
            continue
        columns = slice(shard * VOCAB // size, (shard + 1) * VOCAB // size)
        for impl in IMPLS:
            for name, (z, reference, targets, temperature) in cases().items():
                local = z[:, columns].clone().requires_grad_()
                stats = token_stats(
                    local,
                    targets,
                    reference_logits=reference[:, columns],
                    tp_group=group,
                    temperature=temperature,
                    entropy_grad=True,
                    impl=impl,
                )
                (grad,) = gradient_of(stats, local)
                values = {n: getattr(stats, n).detach() for n in FIELDS}
                results[(size, impl, *name)] = values, grad.clone()
            for head in HEADS:
                results[size, impl, "head", head] = head_answers(*head, shard, size, group, impl)
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, 4)


def oracle(z, reference, targets, temperature):
    """The definitions in float64, by log-softmax: a probability may be e^-10000. A masked column adds 0."""
    z64 = z.double().clone().requires_grad_()
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (z64, reference.double()))
    p = log_p.exp()
    finite_p, finite_q = (x.masked_fill(z == -torch.inf, 0.0) for x in (log_p, log_q))
    rows = torch.arange(len(targets))
    values = {
        "log_probs": log_p[rows, targets],
        "entropy": -(p * finite_p).sum(-1),
        "hellinger": 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1),
        "reference_log_probs": log_q[rows, targets],
        "reverse_kl": (p * (finite_p - finite_q)).sum(-1),
    }
    stats = type("Stats", (), values)
    (grad,) = gradient_of(stats, z64)
    return {k: v.detach() for k, v in values.items()}, grad


def limits(case, logit_error=0.0):
    """What float32 may lose in each statistic (see bound in tests/unit/test_ops.py)."""
    z, reference, _, temperature = case
    largest = max(
        (float(x[x.isfinite()].double().abs().max()) for x in (z, reference) if len(x)), default=0.0
    )
    tolerance = (4 * largest / temperature + 32) * UNIT * 4 + 12 * logit_error
    out = {**dict.fromkeys(FIELDS, tolerance), "hellinger": 1e-6}
    if largest > 1e3 and temperature != 1.0:
        # Dividing by the temperature rounds each logit, and so a probability by a factor, a KL by that
        # times its largest log-ratio.
        rounding = 4 * largest / temperature * UNIT
        out["hellinger"] += rounding
        out["reverse_kl"] += rounding * 2 * largest / temperature
    return out


def check_values(found, want, limit):
    for values, _ in found:
        for name in FIELDS:
            assert ((values[name].double() - want[name]).abs() <= limit[name]).all(), name
        assert (values["hellinger"] >= 0).all() and (values["hellinger"] <= 1).all()
        assert (values["reverse_kl"] >= 0).all()


CASES = list(cases())


def test_the_targets_visit_every_shard():
    for kind in ("plain", "extreme", "masked"):
        assert set((logits(kind)[2] // 16).tolist()) == {0, 1, 2, 3}
    for z, reference, targets, _ in cases().values():
        rows = torch.arange(len(targets))
        assert z[rows, targets].isfinite().all() and reference[rows, targets].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES, ids=lambda name: "-".join(map(str, name)))
def test_hard_logits(ranks, size, impl, name):
    case = cases()[name]
    z, _, targets, temperature = case
    want, grad = oracle(*case)
    limit = limits(case)
    found = [r[(size, impl, *name)] for r in ranks[:size]]
    check_values(found, want, limit)
    if impl in SHARDED:
        assert all(torch.equal(values[n], found[0][0][n]) for values, _ in found for n in FIELDS)
    got = torch.cat([shard for _, shard in found], 1)
    assert got.dtype == z.dtype and got.isfinite().all()
    # Incoming gradients are at most 3; an entropy's weighs p with |log p + H|, below the span of the logits.
    slack = 4 * limit["log_probs"] / temperature + ROUNDING[z.dtype] * grad.abs()
    assert ((got.double() - grad).abs() <= slack).all()
    assert not got[z == -torch.inf].any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head[0]}-{head[1]}")
def test_half_heads_and_few_tokens(ranks, size, impl, head):
    tokens, dtype = head
    h, w, h0, targets = (x.double() for x in lm_head(*head))
    case = h @ w.t(), h0 @ w.t(), targets.long(), 1.0
    want, dz = oracle(*case)
    # A dot product of n float32 terms is off by at most (n + 1) u sum |h w|.
    products = torch.maximum(h.abs(), h0.abs()) @ w.abs().t()
    limit = limits(case, (HIDDEN + 1) * UNIT * float(products.max()) if tokens else 0.0)
    found = [r[size, impl, "head", head] for r in ranks[:size]]
    check_values(found, want, limit)
    weight = torch.cat([grads[1] for _, grads in found])
    hidden = torch.cat([grads[0] for _, grads in found]) if tokens != 1 else found[0][1][0]
    assert hidden.shape == h.shape and weight.dtype == hidden.dtype == dtype
    # Entries of dz are off by at most 4 tolerances, which the products sum; the sums are rounded once.
    slack = 4 * limit["log_probs"]
    for got, truth, factor in ((weight, dz.t() @ h, h), (hidden, dz @ w, w)):
        limit_of = slack * factor.abs().sum(0) + ROUNDING[dtype] * truth.abs()
        assert ((got.double() - truth).abs() <= 1.01 * limit_of).all()
