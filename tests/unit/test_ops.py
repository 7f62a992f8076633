"""Token statistics against a float64 oracle that is written here, from the definitions.

The fused implementation runs in Triton's interpreter here (see conftest.py); tests/gpu runs it compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from patience import patience
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dgpo.ops import linear_token_stats, token_stats
from megatron_dgpo.ops.driver import Plan
from megatron_dgpo.ops.shards import merge_shards, reduce_shard

UNIT = 2.0**-24
"""float32 unit roundoff."""
HALF_STEP = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
NO_FUSED = (
    "Triton is not installed"
    if importlib.util.find_spec("triton") is None
    else "Triton compiles for the GPU here: tests/gpu/test_fused.py runs the kernels"
    if os.environ.get("TRITON_INTERPRET") != "1"
    else ""
)
FUSED = pytest.param("fused", marks=pytest.mark.skipif(bool(NO_FUSED), reason=NO_FUSED))
IMPLS = ("eager", FUSED, "reference")
SHARDED = ("eager", FUSED)
FIELDS = ("log_probs", "entropy", "hellinger", "reference_log_probs", "reverse_kl")


def oracle(z, targets, reference=None):
    """The definitions, in float64 over the full vocabulary; z is already over the temperature."""
    z = z.double()
    p = torch.exp(z - z.detach().amax(-1, keepdim=True))
    p = p / p.sum(-1, keepdim=True)
    out = {"log_probs": p.gather(1, targets[:, None])[:, 0].log(), "entropy": -torch.xlogy(p, p).sum(-1)}
    if reference is not None:
        q = torch.softmax(reference.double(), -1)
        out["hellinger"] = 1.0 - (p * q).sqrt().sum(-1)
        out["reference_log_probs"] = q.gather(1, targets[:, None])[:, 0].log()
        out["reverse_kl"] = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
    return {k: v for k, v in out.items()}


def bound(z, logit_error=0.0):
    """What float32 may lose in a log-probability or an entropy in nats.

    Shifting and exponentiating a logit costs a relative error of (|z - m| + 4) u, which is what the log
    of the partition sum inherits; the sum adds a few u; an entropy weighs these with |z - m| e^(z-m) < H + 1.
    A logit that is itself off by e moves a log-probability by at most 2 e and an entropy by 2 e (H + 1).
    """
    span = float(z.detach().double().masked_fill(z == -torch.inf, 0.0).abs().max()) * 2
    return (2 * span + 32) * UNIT * 4 + 2 * logit_error * 6


def make(tokens=60, vocab=46, spread=3.0, shift=0.5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, vocab, generator=g) * spread
    reference = (z + shift * torch.randn(tokens, vocab, generator=g)).to(dtype)
    return z.to(dtype), reference, torch.randint(0, vocab, (tokens,), generator=g)


def gradient(log_probs, entropy, x, seed=1):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(log_probs.shape, generator=g).to(log_probs.dtype)
    b = torch.randn(log_probs.shape, generator=g).to(log_probs.dtype)
    return torch.autograd.grad((a * log_probs + b * entropy).sum(), x)


def needs_half_or_single(impl, dtype):
    if impl == "fused" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32: float64 is refused (test_fused_refuses)")


def shard_numbers(impl, z, columns, reference):
    """What a rank says of its shard."""
    if impl == "eager":
        return reduce_shard(z, columns, reference)
    from megatron_dgpo.ops.fused import KERNELS

    plan = Plan(None, 0, z.shape[1], 1.0, max(z.shape[0], 1), False)
    return KERNELS.reduce(z, columns, reference, plan, False)


def check(stats, want, tolerance):
    for name in FIELDS:
        got = getattr(stats, name)
        limit = 1e-6 if name == "hellinger" and tolerance > 1e-9 else tolerance
        assert (got.double() - want[name].detach()).abs().max() <= limit, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("vocab", [46, 1500, 5000])
@pytest.mark.parametrize("dtype", list(HALF_STEP))
def test_values_and_gradients(impl, temperature, vocab, dtype):
    needs_half_or_single(impl, dtype)
    z, reference, targets = make(vocab=vocab, dtype=dtype)
    z.requires_grad_()
    before = z.detach().clone(), reference.clone(), targets.clone()
    stats = token_stats(
        z, targets, reference_logits=reference, temperature=temperature, entropy_grad=True, impl=impl
    )
    z64 = z.detach().double().requires_grad_()
    want = oracle(z64 / temperature, targets, reference.double() / temperature)
    tolerance = 1e-12 if dtype == torch.float64 else bound(z64 / temperature)
    check(stats, want, tolerance)
    (got,) = gradient(stats.log_probs, stats.entropy, z)
    (expected,) = gradient(want["log_probs"], want["entropy"], z64)
    assert got.dtype == dtype
    # Incoming gradients are below 4; an entropy's weighs p with |log p + H| < span.
    slack = 4 * tolerance / temperature + 2 * HALF_STEP[dtype] * expected.abs()
    assert ((got.double() - expected).abs() <= slack).all()
    for now, then in zip((z.detach(), reference, targets), before, strict=True):
        assert torch.equal(now, then)
    for name in ("hellinger", "reference_log_probs", "reverse_kl"):
        assert not getattr(stats, name).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_is_constant_unless_asked(impl):
    z, _, targets = make()
    z.requires_grad_()
    stats = token_stats(z, targets, impl=impl)
    assert not stats.entropy.requires_grad and stats.log_probs.requires_grad
    assert stats.hellinger is None and stats.reference_log_probs is None and stats.reverse_kl is None
    (only_log_probs,) = torch.autograd.grad(stats.log_probs.sum(), z)
    both = token_stats(z, targets, entropy_grad=True, impl=impl)
    (same,) = torch.autograd.grad(both.log_probs.sum(), z, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(both.entropy.sum(), z)
    assert torch.equal(only_log_probs, same)
    z64 = z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle(z64, targets)["entropy"].sum(), z64)
    assert (of_entropy - expected).abs().max() <= bound(z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fill", [1e4, float("nan"), float("inf")])
def test_padding_contributes_nothing(impl, fill):
    z, reference, targets = make()
    pad = torch.full((z.shape[0], 18), fill)
    wide = torch.cat([z, pad], 1).requires_grad_()
    wide_reference = torch.cat([reference, pad], 1)
    z.requires_grad_()
    narrow = token_stats(z, targets, reference_logits=reference, entropy_grad=True, impl=impl)
    padded = token_stats(
        wide, targets, reference_logits=wide_reference, vocab_size=46, entropy_grad=True, impl=impl
    )
    check(padded, {n: getattr(narrow, n).double() for n in FIELDS}, bound(z))
    (a,) = gradient(narrow.log_probs, narrow.entropy, z)
    (b,) = gradient(padded.log_probs, padded.entropy, wide)
    assert (b[:, :46] - a).abs().max() <= bound(z)
    assert torch.equal(b[:, 46:], torch.zeros_like(b[:, 46:]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [46, 20000])
def test_distance_is_exactly_zero_at_the_reference(impl, vocab):
    z, _, targets = make(tokens=40, vocab=vocab, spread=5.0)
    stats = token_stats(z, targets, reference_logits=z.clone(), impl=impl)
    assert torch.equal(stats.hellinger, torch.zeros(40))
    assert torch.equal(stats.reverse_kl, torch.zeros(40))
    assert torch.equal(stats.log_probs, stats.reference_log_probs)


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("shift", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 30.0])
def test_distance_near_the_reference(impl, shift, shards):
    z, reference, targets = make(tokens=64, vocab=10240, spread=4.0, shift=shift)
    width = 10240 // shards
    rows = [
        shard_numbers(impl, a, targets - r * width, b)
        for r, (a, b) in enumerate(zip(z.split(width, 1), reference.split(width, 1), strict=True))
    ]
    got = merge_shards(torch.stack(rows)).hellinger.double()
    p, q = torch.softmax(z.double(), -1), torch.softmax(reference.double(), -1)
    want = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
    assert (got - want).abs().max() <= 1e-6
    assert got.min() >= 0 and got.max() <= 1
    # Roots are off by a relative e = (span + 8) u, so half a sum of squares d by 2 e sqrt(2 d) + 2 e^2.
    e = (2 * float(z.abs().max() + reference.abs().max()) + 8) * UNIT
    assert ((got - want).abs() <= 2 * e * (2 * want).sqrt() + 2 * e * e + 4 * UNIT * want).all()


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
def test_merging_shards(impl, shards, dtype):
    needs_half_or_single(impl, dtype)
    z, reference, targets = make(tokens=50, vocab=46, spread=6.0, shift=2.0)
    z, reference = z.to(dtype), reference.to(dtype)
    width = 16 if shards > 2 else 46 // shards  # from 4 shards on, whole shards are padding
    starts = range(0, shards * width, width)
    rows = [
        shard_numbers(impl, a, targets - r * width, b)
        for r, (a, b) in enumerate((z[:, s : s + width], reference[:, s : s + width]) for s in starts)
    ]
    merged = merge_shards(torch.stack(rows))
    want = oracle(z, targets, reference)
    check(merged, want, 1e-12 if dtype == torch.float64 else bound(z))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_columns(impl):
    z, reference, targets = make()
    for logits in (z, reference):
        logits[:, 10:20] = -torch.inf
    z[0, 20:] = -torch.inf
    targets = targets % 10
    z.requires_grad_()
    stats = token_stats(z, targets, reference_logits=reference, entropy_grad=True, impl=impl)
    keep = torch.tensor([i for i in range(46) if not 10 <= i < 20])
    z64 = z.detach()[1:, keep].double().requires_grad_()
    columns = torch.searchsorted(keep, targets[1:])
    want = oracle(z64, columns, reference[1:, keep])
    for name in FIELDS:
        got = getattr(stats, name)
        assert got.isfinite().all(), name
        assert (got[1:].double() - want[name].detach()).abs().max() <= bound(z64), name
    (grad,) = gradient(stats.log_probs, stats.entropy, z)
    assert grad.isfinite().all() and torch.equal(grad[:, 10:20], torch.zeros(60, 10))
    # A masked target has no probability.
    assert token_stats(z.detach(), torch.full((60,), 12), impl=impl).log_probs.max() == -torch.inf


@pytest.mark.parametrize("impl", SHARDED)
def test_masking_a_whole_shard(impl):
    z, reference, targets = make(vocab=48)
    z[:, 16:32] = reference[:, 16:32] = -torch.inf
    targets = targets % 16
    rows = [shard_numbers(impl, z[:, s : s + 16], targets - s, reference[:, s : s + 16]) for s in (0, 16, 32)]
    check(merge_shards(torch.stack(rows)), oracle(z, targets, reference), bound(z))
    # A shard that only the reference masks: distance stays right, KL (truly infinite) stays a number.
    reference[:, 32:] = -torch.inf
    rows = [shard_numbers(impl, z[:, s : s + 16], targets - s, reference[:, s : s + 16]) for s in (0, 16, 32)]
    merged = merge_shards(torch.stack(rows))
    assert (merged.hellinger - oracle(z, targets, reference)["hellinger"]).abs().max() <= 1e-6
    assert merged.reverse_kl.isfinite().all() and merged.reverse_kl.min() > 1e20


def make_linear(dtype=torch.float32, tokens=37, hidden=24, vocab=46, padded=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=g)
    w = torch.randn(padded, hidden, generator=g) * 0.6
    h0 = h + 0.2 * torch.randn(tokens, hidden, generator=g)
    w0 = w + 0.05 * torch.randn(padded, hidden, generator=g)
    w[vocab:], w0[vocab:] = 1e4, -1e4
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    return [x.to(dtype) for x in (h, w, h0, w0)], targets


ROWS = torch.tensor([36, 0, 3, 4, 5, 20, 19, 11])
"""Of the 37 tokens, those whose statistics are wanted, in any order."""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("chunk_size", "rows"), [(1, ROWS), (5, None), (5, ROWS), (None, ROWS)])
@pytest.mark.parametrize("dtype", list(HALF_STEP))
def test_linear_values_and_gradients(impl, chunk_size, rows, dtype):
    needs_half_or_single(impl, dtype)
    (h, w, h0, w0), targets = make_linear(dtype)
    wanted = torch.ones_like(targets) if rows is None else torch.zeros_like(targets).index_fill(0, rows, 1)
    h.requires_grad_(), w.requires_grad_()
    stats = linear_token_stats(
        h,
        w,
        targets,
        reference_hidden=h0,
        reference_weight=w0,
        vocab_size=46,
        temperature=0.8,
        rows=rows,
        chunk_size=chunk_size,
        entropy_grad=True,
        impl=impl,
    )
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    z64 = h64 @ w64[:46].t() / 0.8
    want = oracle(z64, targets, h0.double() @ w0.double()[:46].t() / 0.8)
    want = {name: values * wanted for name, values in want.items()}
    # A dot product of n float32 terms is off by at most (n + 1) u sum |h w|.
    logit_error = 25 * UNIT * float((h64.abs() @ w64[:46].abs().t()).detach().max()) / 0.8
    tolerance = 1e-11 if dtype == torch.float64 else bound(z64.detach(), logit_error)
    for name in FIELDS:
        assert (getattr(stats, name).double() - want[name].detach()).abs().max() <= tolerance, name
    got = gradient(stats.log_probs, stats.entropy, (h, w))
    expected = gradient(want["log_probs"], want["entropy"], (h64, w64))
    # Each entry of dz is off by at most 4 tolerances; the products sum them over columns or tokens.
    factors = (w64[:46].abs().sum(0), h64.abs().sum(0))
    for a, b, factor in zip(got, expected, factors, strict=True):
        slack = 4 * tolerance * factor.detach() / 0.8 + 2 * HALF_STEP[dtype] * b.abs()
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= slack).all()
    assert torch.equal(got[1][46:], torch.zeros_like(got[1][46:]))


@pytest.mark.parametrize("impl", SHARDED)
def test_linear_keeps_float32_logits_for_half_inputs(impl):
    """Logits rounded to bfloat16 would miss this bound a thousandfold."""
    (h, w, h0, w0), targets = make_linear(torch.bfloat16)
    stats = linear_token_stats(
        h, w, targets, reference_hidden=h0, reference_weight=w0, vocab_size=46, impl=impl
    )
    want = oracle(h.double() @ w.double()[:46].t(), targets, h0.double() @ w0.double()[:46].t())
    assert (stats.hellinger - want["hellinger"]).abs().max() <= 1e-6
    rounded = oracle((h @ w.t())[:, :46], targets, (h0 @ w0.t())[:, :46])
    assert (rounded["hellinger"] - want["hellinger"]).abs().max() > 1e-4


@pytest.mark.parametrize("impl", SHARDED)
def test_linear_is_exactly_zero_at_the_reference(impl):
    (h, w, _, _), targets = make_linear()
    stats = linear_token_stats(
        h,
        w,
        targets,
        reference_hidden=h.clone(),
        reference_weight=w.clone(),
        vocab_size=46,
        chunk_size=8,
        impl=impl,
    )
    assert torch.equal(stats.hellinger, torch.zeros(37)) and torch.equal(stats.reverse_kl, torch.zeros(37))


class _LargestLogits(TorchDispatchMode):
    """Most tokens that any tensor with a vocabulary side holds."""

    def __init__(self, vocab, hidden):
        super().__init__()
        self.vocab, self.hidden, self.tokens = vocab, hidden, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.dim() == 2 and self.vocab in t.shape:
                other = t.shape[1] if t.shape[0] == self.vocab else t.shape[0]
                if other != self.hidden:
                    self.tokens = max(self.tokens, other)
        return out


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("chunk_size", [4, 37])
def test_logits_exist_for_one_chunk_only(impl, chunk_size):
    (h, w, h0, w0), targets = make_linear()
    h.requires_grad_(), w.requires_grad_()
    with _LargestLogits(50, 24) as seen:
        stats = linear_token_stats(
            h, w, targets, reference_hidden=h0, reference_weight=w0, chunk_size=chunk_size, impl=impl
        )
        stats.log_probs.sum().backward()
    assert seen.tokens == chunk_size


@pytest.mark.parametrize("impl", SHARDED)
def test_frozen_inputs_get_no_gradient(impl):
    (h, w, _, _), targets = make_linear()
    h.requires_grad_()
    linear_token_stats(h, w, targets, vocab_size=46, impl=impl).log_probs.sum().backward()
    assert h.grad is not None and w.grad is None
    both = h.detach().clone().requires_grad_(), w.clone().requires_grad_()
    linear_token_stats(*both, targets, vocab_size=46, impl=impl).log_probs.sum().backward()
    assert torch.equal(both[0].grad, h.grad)


@pytest.mark.parametrize("impl", SHARDED)
def test_the_policys_numbers_have_the_same_bits_without_a_reference(impl):
    z, reference, targets = make(vocab=5000)
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    runs = [
        token_stats(leaf, targets, reference_logits=r, entropy_grad=True, impl=impl)
        for leaf, r in zip(leaves, (None, reference), strict=True)
    ]
    assert torch.equal(runs[0].log_probs, runs[1].log_probs)
    assert torch.equal(runs[0].entropy, runs[1].entropy)
    grads = [gradient(s.log_probs, s.entropy, leaf)[0] for s, leaf in zip(runs, leaves, strict=True)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [1, 3, 17, 65])
def test_any_number_of_tokens(impl, tokens):
    z, reference, targets = make(tokens=tokens, vocab=4200)
    z.requires_grad_()
    stats = token_stats(z, targets, reference_logits=reference, entropy_grad=True, impl=impl)
    z64 = z.detach().double().requires_grad_()
    want = oracle(z64, targets, reference)
    check(stats, want, bound(z64))
    (got,) = gradient(stats.log_probs, stats.entropy, z)
    (expected,) = gradient(want["log_probs"], want["entropy"], z64)
    assert ((got - expected).abs() <= 4 * bound(z64) + HALF_STEP[torch.float32] * expected.abs()).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_extreme_logits(impl, temperature):
    """Whole tiles far above and below the others; targets that have next to no probability."""
    z, reference, targets = make(tokens=24, vocab=5000, spread=2.0)
    z[:8, :2100] += 1e4
    reference[4:12, 2100:] -= 1e4
    z[8:16] -= 1e4
    z[16:] = z[16:].sign() * 1e4
    z.requires_grad_()
    stats = token_stats(
        z,
        targets,
        reference_logits=reference,
        temperature=temperature,
        entropy_grad=True,
        impl=impl,
    )
    z64 = z.detach().double().requires_grad_()
    want = oracle(z64 / temperature, targets, reference.double() / temperature)
    # A probability of e^-10000 is 0 in the oracle too: take log-softmax itself.
    rows = torch.arange(24)
    log_p = torch.log_softmax(z64 / temperature, -1)
    log_q = torch.log_softmax(reference.double() / temperature, -1)
    want["log_probs"], want["reference_log_probs"] = log_p[rows, targets], log_q[rows, targets]
    want["reverse_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    # Dividing by a temperature rounds each logit, and so the probabilities by a factor.
    rounding = 0.0 if temperature == 1.0 else 4 * 1e4 / temperature * UNIT
    largest_ratio = float((log_p - log_q).detach().abs().max())
    limits = {name: bound(z64 / temperature) for name in FIELDS}
    limits["hellinger"] = 1e-6 + rounding
    limits["reverse_kl"] += rounding * largest_ratio
    for name, limit in limits.items():
        error = (getattr(stats, name).double() - want[name].detach()).abs().max()
        assert error <= limit, name
    (got,) = gradient(stats.log_probs, stats.entropy, z)
    (expected,) = gradient(log_p[rows, targets], -(log_p.exp() * log_p).sum(-1), z64)
    assert got.isfinite().all()
    assert (got - expected).abs().max() <= 4 * bound(z64 / temperature) / temperature


@pytest.mark.parametrize("impl", SHARDED)
def test_a_nan_logit_reaches_the_results(impl):
    z, reference, targets = make(tokens=6, vocab=5000)
    z[1, 7], z[2, 4999], reference[4, 3000] = torch.nan, torch.inf, torch.nan
    stats = token_stats(z, targets, reference_logits=reference, impl=impl)
    of_policy, of_reference = [False, True, True, False, False, False], [False] * 4 + [True, False]
    assert stats.log_probs.isnan().tolist() == of_policy and stats.entropy.isnan().tolist() == of_policy
    assert stats.reference_log_probs.isnan().tolist() == of_reference
    both = [a or b for a, b in zip(of_policy, of_reference, strict=True)]
    assert stats.hellinger.isnan().tolist() == both and stats.reverse_kl.isnan().tolist() == both


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_logits(impl):
    z, reference, targets = make(tokens=9, vocab=60)
    plain = token_stats(z, targets, reference_logits=reference, impl=impl)
    leaf = z.t().contiguous().requires_grad_()
    wide = torch.cat([reference, reference], 1)[:, :60]
    stats = token_stats(leaf.t(), targets, reference_logits=wide, impl=impl)
    check(stats, {n: getattr(plain, n).double() for n in FIELDS}, bound(z))
    (got,) = torch.autograd.grad(stats.log_probs.sum(), leaf)
    want = torch.nn.functional.one_hot(targets, 60) - torch.softmax(z.double(), -1)
    assert (got.t() - want).abs().max() <= bound(z)


def test_auto_is_eager_on_the_cpu(caplog):
    z, reference, targets = make(tokens=5)
    with caplog.at_level("INFO"):
        a = token_stats(z, targets, reference_logits=reference)
    b = token_stats(z, targets, reference_logits=reference, impl="eager")
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in FIELDS)
    assert len([r for r in caplog.records if "impl=auto" in r.message]) <= 1


@pytest.mark.skipif(bool(NO_FUSED), reason=NO_FUSED)
def test_fused_refuses():
    z, _, targets = make(tokens=5, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl='fused': torch.float64 inputs: needs float32"):
        token_stats(z, targets, impl="fused")


@pytest.mark.skipif(bool(NO_FUSED), reason=NO_FUSED)
def test_fused_needs_a_gpu_or_the_interpreter():
    code = (
        "import torch; from megatron_dgpo.ops import token_stats; "
        "token_stats(torch.zeros(1, 4), torch.tensor([0]), impl='fused')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=patience()
    )
    assert run.returncode == 1
    assert "ValueError: impl='fused': tensors on cpu: needs a CUDA device" in run.stderr


def test_fused_needs_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None; from megatron_dgpo.ops import token_stats; "
        "token_stats(torch.zeros(1, 4), torch.tensor([0])); "
        "token_stats(torch.zeros(1, 4), torch.tensor([0]), impl='fused')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience())
    assert run.returncode == 1 and "ValueError: impl='fused': Triton is not installed" in run.stderr


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    (h, w, _, _), _ = make_linear()
    h = h[:0].requires_grad_()
    stats = linear_token_stats(h, w, torch.zeros(0, dtype=torch.int64), impl=impl)
    stats.log_probs.sum().backward()
    assert stats.log_probs.shape == (0,) and h.grad.shape == (0, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, "impl='triton'.*auto, eager, fused, reference"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"vocab_size": 51}, "vocab_size=51"),
        ({"targets": torch.tensor([0, 1, 46])}, "targets: ids span 0..46, need 0..45"),
        ({"targets": torch.tensor([0, 1])}, "targets: got torch.int64"),
        ({"targets": torch.tensor([0.0, 1.0, 2.0])}, "targets: got torch.float32"),
        ({"reference_logits": torch.zeros(3, 49)}, "reference_logits: got"),
        ({"policy_logits": torch.zeros(3, 50, 1)}, "policy_logits: got"),
    ],
)
def test_refuses(change, message):
    call = {"policy_logits": torch.zeros(3, 50), "targets": torch.tensor([0, 1, 2]), "vocab_size": 46}
    with pytest.raises(ValueError, match=message):
        token_stats(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"reference_hidden": torch.zeros(3, 8)}, "both or neither"),
        ({"policy_weight": torch.zeros(50, 9)}, "policy_weight: got"),
        ({"policy_hidden": torch.zeros(4, 8)}, "policy_hidden: got 4 rows, need 3"),
        ({"rows": torch.tensor([True, False, True])}, r"rows: got torch.bool \(3,\)"),
        ({"targets": torch.tensor([[0], [1], [2]])}, r"targets: got torch.int64 \(3, 1\)"),
        ({"policy_hidden": torch.zeros(1, 8), "targets": torch.tensor(2)}, r"targets: got torch.int64 \(\)"),
    ],
)
def test_linear_refuses(change, message):
    call = {
        "policy_hidden": torch.zeros(3, 8),
        "policy_weight": torch.zeros(50, 8),
        "targets": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**{**call, **change})


def test_imports_without_megatron_or_sglang():
    code = (
        "import sys; sys.modules['megatron'] = sys.modules['sglang'] = None; "
        "import megatron_dgpo.ops, megatron_dgpo.algorithms"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=patience())
