"""Token statistics with the vocabulary over 1, 2 and 4 gloo ranks, against a float64 oracle."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

VOCAB, PADDED, TOKENS, HIDDEN = 46, 64, 40, 24
UNIT = 2.0**-24
FIELDS = ("log_probs", "entropy", "hellinger", "reference_log_probs", "reverse_kl")
SIZES = (1, 2, 4)  # at 4, the last shard is padding only
# See conftest.py: without a GPU the kernels run in Triton's interpreter.
WITH_FUSED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
SHARDED = ("eager", "fused") if WITH_FUSED else ("eager",)
IMPLS = (*SHARDED, "reference")
HALVES = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
ROWS = [39, 0, 1, 2, 3, 17, 12, 30]
"""Of the tokens, those whose statistics are wanted: none, under sequence parallelism, of some ranks."""
ROWS_CASES = [
    (size, impl) for size in (2, 4) for impl in ("eager", "reference")
]  # the kernels see a chunk alone
CASES = [(size, impl, sp) for size in SIZES for impl in IMPLS for sp in (False, True)]


def data():
    g = torch.Generator().manual_seed(3)
    h = torch.randn(TOKENS, HIDDEN, generator=g)
    w = torch.randn(PADDED, HIDDEN, generator=g) * 0.6
    h0 = h + 0.2 * torch.randn(TOKENS, HIDDEN, generator=g)
    w0 = w + 0.05 * torch.randn(PADDED, HIDDEN, generator=g)
    w[VOCAB:], w0[VOCAB:] = 1e4, -1e4
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    cotangents = torch.randn(2, TOKENS, generator=g)
    return h, w, h0, w0, targets, cotangents


def logits():
    h, w, h0, w0, targets, cotangents = data()
    z, reference = h @ w.t(), h0 @ w0.t()
    z[:, VOCAB:], reference[:, VOCAB:] = 1e4, -1e4
    return z, reference, targets, cotangents


def answers(stats, cotangents, inputs):
    loss = (cotangents[0] * stats.log_probs + cotangents[1] * stats.entropy).sum()
    grads = torch.autograd.grad(loss, inputs)
    return {name: getattr(stats, name).detach() for name in FIELDS}, [g.clone() for g in grads]


def work(rank, world_size):
    from megatron_dgpo.ops import linear_token_stats, token_stats

    results = {}
    for size in SIZES:
        group, shard = dist.new_group(list(range(size))), rank
        if rank >= size:
            continue
        columns = slice(shard * PADDED // size, (shard + 1) * PADDED // size)
        common = {"tp_group": group, "vocab_size": VOCAB, "temperature": 0.8, "entropy_grad": True}
        for impl in IMPLS:
            z, reference, targets, cotangents = logits()
            local = z[:, columns].clone().requires_grad_()
            stats = token_stats(
                local, targets, reference_logits=reference[:, columns].contiguous(), impl=impl, **common
            )
            results["logits", size, impl] = answers(stats, cotangents, [local])
            for dtype in HALVES:
                half = z[:, columns].to(dtype).requires_grad_()
                stats = token_stats(
                    half, targets, reference_logits=reference[:, columns].to(dtype), impl=impl, **common
                )
                results["logits", size, impl, dtype] = answers(stats, cotangents, [half])
            for sp in (False, True):
                h, w, h0, w0, targets, cotangents = data()
                mine = slice(shard * TOKENS // size, (shard + 1) * TOKENS // size) if sp else slice(None)
                hidden = h[mine].clone().requires_grad_()
                weight = w[columns].clone().requires_grad_()
                call = dict(
                    policy_hidden=hidden,
                    policy_weight=weight,
                    targets=targets,
                    reference_hidden=h0[mine] if size == 4 else h0,
                    reference_weight=w0[columns],
                    chunk_size=7,
                    sequence_parallel=sp,
                    impl=impl,
                    **common,
                )
                stats = linear_token_stats(**call)
                results["linear", size, impl, sp] = answers(stats, cotangents, [hidden, weight])
                if (size, impl) in ROWS_CASES:
                    stats = linear_token_stats(**call, rows=torch.tensor(ROWS))
                    results["rows", size, impl, sp] = answers(stats, cotangents, [hidden, weight])
        for impl in SHARDED:
            results["zero", size, impl] = reduced_zero_distance(
                token_stats, z, targets, columns, {**common, "impl": impl}
            )
    return results


def reduced_zero_distance(token_stats, z, targets, columns, common):
    stats = token_stats(z[:, columns], targets, reference_logits=z[:, columns].clone(), **common)
    return float(stats.hellinger.abs().max()), float(stats.reverse_kl.abs().max())


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, 4)


def oracle(z, reference, targets, cotangents, inputs):
    p, q = (torch.softmax(x / 0.8, -1) for x in (z, reference))
    rows = torch.arange(TOKENS)
    values = {
        "log_probs": p[rows, targets].log(),
        "entropy": -(p * p.log()).sum(-1),
        "hellinger": 1 - (p * q).sqrt().sum(-1),
        "reference_log_probs": q[rows, targets].log(),
        "reverse_kl": (p * (p.log() - q.log())).sum(-1),
    }
    loss = (cotangents[0] * values["log_probs"] + cotangents[1] * values["entropy"]).sum()
    return {k: v.detach() for k, v in values.items()}, torch.autograd.grad(loss, inputs)


def check_values(got, want, tolerance):
    for name in FIELDS:
        limit = 1e-6 if name == "hellinger" else tolerance
        assert (got[name].double() - want[name]).abs().max() <= limit, name


def bound(z, logit_error=0.0):
    """float32 rounding of the shift, the exponential and the sums (see test_ops.py), plus the effect of
    logits that are off by logit_error."""
    return (4 * float(z.abs().max()) / 0.8 + 32) * UNIT * 4 + 12 * logit_error


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_logit_shards(ranks, size, impl):
    z, reference, targets, cotangents = logits()
    z64 = z[:, :VOCAB].double().requires_grad_()
    want, (grad,) = oracle(z64, reference[:, :VOCAB].double(), targets, cotangents.double(), [z64])
    tolerance = bound(z64.detach())
    found = [r["logits", size, impl] for r in ranks[:size]]
    for values, _ in found:
        check_values(values, want, tolerance)
        if impl in SHARDED:
            assert all(torch.equal(values[n], found[0][0][n]) for n in FIELDS)
    got = torch.cat([grads[0] for _, grads in found[:size]], 1)
    assert (got[:, :VOCAB].double() - grad).abs().max() <= 4 * tolerance / 0.8
    assert torch.equal(got[:, VOCAB:], torch.zeros(TOKENS, PADDED - VOCAB))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", list(HALVES))
def test_half_logit_shards(ranks, size, impl, dtype):
    z, reference, targets, cotangents = logits()
    z64 = z[:, :VOCAB].to(dtype).double().requires_grad_()
    q64 = reference[:, :VOCAB].to(dtype).double()
    want, (grad,) = oracle(z64, q64, targets, cotangents.double(), [z64])
    tolerance = bound(z64.detach())
    found = [r["logits", size, impl, dtype] for r in ranks[:size]]
    for values, _ in found:
        check_values(values, want, tolerance)
    got = torch.cat([grads[0] for _, grads in found[:size]], 1)
    assert got.dtype == dtype
    slack = 4 * tolerance / 0.8 + 2 * HALVES[dtype] * grad.abs()
    assert ((got[:, :VOCAB].double() - grad).abs() <= slack).all()
    assert torch.equal(got[:, VOCAB:], torch.zeros(TOKENS, PADDED - VOCAB, dtype=dtype))


@pytest.mark.parametrize(
    ("kind", "size", "impl", "sp"),
    [("linear", *case) for case in CASES] + [("rows", *case) for case in CASES if case[:2] in ROWS_CASES],
)
def test_linear_shards(ranks, kind, size, impl, sp):
    h, w, h0, w0, targets, cotangents = data()
    wanted = torch.ones(TOKENS)
    if kind == "rows":
        wanted = torch.zeros(TOKENS).index_fill(0, torch.tensor(ROWS), 1)
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    z = h64 @ w64[:VOCAB].t()
    reference = h0.double() @ w0.double()[:VOCAB].t()
    want, grads = oracle(z, reference, targets, wanted * cotangents.double(), [h64, w64])
    want = {name: wanted * values for name, values in want.items()}
    logit_error = 25 * UNIT * float((h64.abs() @ w64[:VOCAB].abs().t()).detach().max()) / 0.8
    tolerance = bound(z.detach(), logit_error)
    found = [r[kind, size, impl, sp] for r in ranks[:size]]
    for values, _ in found:
        check_values(values, want, tolerance)
        if impl in SHARDED:
            assert all(torch.equal(values[n], found[0][0][n]) for n in FIELDS)
    weight = torch.cat([g[1] for _, g in found[:size]])
    hidden = torch.cat([g[0] for _, g in found[:size]]) if sp else found[0][1][0]
    if not sp:
        assert all(torch.equal(g[0], hidden) for _, g in found)
    assert hidden.shape == h.shape and weight.shape == w.shape
    slack = 4 * tolerance / 0.8
    assert ((hidden.double() - grads[0]).abs() <= slack * w64[:VOCAB].abs().sum(0)).all()
    assert ((weight.double() - grads[1]).abs() <= slack * h64.abs().sum(0)).all()
    assert torch.equal(weight[VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", SHARDED)
def test_sequence_parallel_changes_nothing(ranks, size, impl):
    plain = [r["linear", size, impl, False] for r in ranks[:size]]
    scattered = [r["linear", size, impl, True] for r in ranks[:size]]
    for name in FIELDS:
        assert torch.equal(plain[0][0][name], scattered[0][0][name])
    assert torch.equal(plain[0][1][0], torch.cat([g[0] for _, g in scattered]))
    for (_, a), (_, b) in zip(plain, scattered, strict=True):
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("impl", SHARDED)
def test_distance_is_exactly_zero_at_the_reference(ranks, size, impl):
    assert all(r["zero", size, impl] == (0.0, 0.0) for r in ranks[:size])
