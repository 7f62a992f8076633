"""The compiled Triton kernels against a float64 oracle, at the sizes of a training step.

Needs a CUDA device and Triton. Without one every test here is skipped; tests/unit/test_ops.py and
tests/distributed/test_ops_tp.py then run the same kernels in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from megatron_dgpo.ops import linear_token_stats, token_stats

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (make test-gpu)", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: the kernels would not be compiled", allow_module_level=True)

UNIT = 2.0**-24
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit roundoff: relative error of one rounding."""
FIELDS = ("log_probs", "entropy", "hellinger", "reference_log_probs", "reverse_kl")
VOCAB = 152064
SHARD = VOCAB // 8


def make(tokens, vocab, *, spread=3.0, shift=0.5, dtype=torch.float32, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    z = torch.randn(tokens, vocab, generator=g, device="cuda") * spread
    reference = (z + shift * torch.randn(tokens, vocab, generator=g, device="cuda")).to(dtype)
    return z.to(dtype), reference, torch.randint(0, vocab, (tokens,), generator=g, device="cuda")


def oracle(z, targets, reference):
    """The definitions, in float64; z is already over the temperature."""
    rows = torch.arange(z.shape[0], device="cuda")
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(reference, -1)
    p = log_p.exp()
    return {
        "log_probs": log_p[rows, targets],
        "entropy": -(p * log_p).sum(-1),
        "hellinger": 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1),
        "reference_log_probs": log_q[rows, targets],
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
    }


def bound(z, logit_error=0.0):
    """As in tests/unit/test_ops.py. The hardware's exp2 adds two units in the last place."""
    span = float(z.detach().double().abs().max()) * 2
    return (2 * span + 32) * UNIT * 4 + 2 * logit_error * 6


def check(stats, want, tolerance):
    for name in FIELDS:
        error = (getattr(stats, name).double() - want[name].detach()).abs().max()
        assert error <= (1e-6 if name == "hellinger" else tolerance), (name, float(error))
    assert stats.hellinger.min() >= 0 and stats.hellinger.max() <= 1


def gradient(log_probs, entropy, inputs, seed=1):
    g = torch.Generator(device="cuda").manual_seed(seed)
    a, b = torch.randn(2, *log_probs.shape, generator=g, device="cuda").clamp(-4, 4)
    return torch.autograd.grad((a * log_probs + b * entropy).sum(), inputs)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, SHARD), (129, SHARD), (33, VOCAB), (257, 46), (65, 4097)])
def test_values_and_gradients(tokens, vocab, temperature, dtype):
    z, reference, targets = make(tokens, vocab, dtype=dtype)
    z.requires_grad_()
    before = z.detach().clone(), reference.clone()
    stats = token_stats(
        z, targets, reference_logits=reference, temperature=temperature, entropy_grad=True, impl="fused"
    )
    z64 = z.detach().double().requires_grad_()
    want = oracle(z64 / temperature, targets, reference.double() / temperature)
    tolerance = bound(z64 / temperature)
    check(stats, want, tolerance)
    (got,) = gradient(stats.log_probs, stats.entropy, z)
    (expected,) = gradient(want["log_probs"], want["entropy"], z64)
    assert got.dtype == dtype
    # Incoming gradients are at most 4; an entropy's weighs p with |log p + H| < span.
    slack = 4 * tolerance / temperature + 1.01 * ROUNDING[dtype] * expected.abs()
    assert ((got.double() - expected).abs() <= slack).all()
    assert torch.equal(z.detach(), before[0]) and torch.equal(reference, before[1])


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_error_is_that_of_eager_plus_a_margin(dtype):
    z, reference, targets = make(64, VOCAB, spread=4.0, dtype=dtype)
    want = oracle(z.double(), targets, reference.double())
    fused, eager = (
        token_stats(z, targets, reference_logits=reference, impl=impl) for impl in ("fused", "eager")
    )
    for name in FIELDS:
        errors = [(getattr(s, name).double() - want[name]).abs().max() for s in (fused, eager)]
        # Margin: two units of rounding of a log-probability of about 25 nats.
        assert errors[0] <= errors[1] + 50 * UNIT, (name, errors)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("vocab", [46, SHARD, VOCAB])
def test_exactly_zero_at_the_reference(vocab, dtype, temperature):
    z, _, targets = make(64, vocab, spread=5.0, dtype=dtype)
    stats = token_stats(z, targets, reference_logits=z.clone(), temperature=temperature, impl="fused")
    assert stats.hellinger.abs().max() == 0 and stats.reverse_kl.abs().max() == 0
    assert torch.equal(stats.log_probs, stats.reference_log_probs)


@pytest.mark.parametrize("shift", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 30.0])
def test_distance_near_the_reference(shift):
    z, reference, targets = make(64, VOCAB, spread=4.0, shift=shift)
    got = token_stats(z, targets, reference_logits=reference, impl="fused").hellinger.double()
    want = oracle(z.double(), targets, reference.double())["hellinger"]
    assert (got - want).abs().max() <= 1e-6
    assert got.min() >= 0 and got.max() <= 1


def test_the_policys_numbers_do_not_depend_on_the_reference_or_on_other_tokens():
    z, reference, targets = make(100, SHARD, dtype=torch.bfloat16)
    both = token_stats(z, targets, reference_logits=reference, impl="fused")
    alone = token_stats(z, targets, impl="fused")
    few = token_stats(z[7:20], targets[7:20], reference_logits=reference[7:20], impl="fused")
    for name in ("log_probs", "entropy"):
        assert torch.equal(getattr(both, name), getattr(alone, name))
    for name in FIELDS:
        assert torch.equal(getattr(both, name)[7:20], getattr(few, name))


def test_padding_masks_and_nan():
    z, reference, targets = make(12, SHARD, dtype=torch.bfloat16)
    targets = targets % 5000
    wide = torch.nn.functional.pad(z, (0, 128), value=torch.nan).requires_grad_()
    wide_reference = torch.nn.functional.pad(reference, (0, 128), value=torch.nan)
    z[:, 5000:14000] = reference[:, 5000:14000] = -torch.inf  # two whole tiles among others
    with torch.no_grad():
        wide[:, :SHARD] = z
    wide_reference[:, :SHARD] = reference
    stats = token_stats(
        wide, targets, reference_logits=wide_reference, vocab_size=SHARD, entropy_grad=True, impl="fused"
    )
    keep = torch.tensor([i for i in range(SHARD) if not 5000 <= i < 14000], device="cuda")
    check(stats, oracle(z[:, keep].double(), targets, reference[:, keep].double()), bound(z[:, keep]))
    (grad,) = gradient(stats.log_probs, stats.entropy, wide)
    assert grad.isfinite().all() and not grad[:, SHARD:].any() and not grad[:, 5000:14000].any()
    z[3, 17000] = torch.nan
    stats = token_stats(z, targets, reference_logits=reference, impl="fused")
    for name in ("log_probs", "entropy", "hellinger", "reverse_kl"):
        assert getattr(stats, name).isnan().nonzero().tolist() == [[3]], name


def test_extreme_logits():
    z, reference, targets = make(16, SHARD, spread=2.0)
    z[:8, :9000] += 1e4
    reference[4:12, 9000:] -= 1e4
    z[8:] -= 1e4
    stats = token_stats(z, targets, reference_logits=reference, entropy_grad=True, impl="fused")
    check(stats, oracle(z.double(), targets, reference.double()), bound(z))


def test_no_tokens():
    z = torch.zeros(0, SHARD, device="cuda", requires_grad=True)
    stats = token_stats(z, torch.zeros(0, dtype=torch.int64, device="cuda"), impl="fused")
    stats.log_probs.sum().backward()
    assert z.grad.shape == (0, SHARD)


def make_linear(tokens=300, hidden=512, vocab=SHARD, dtype=torch.bfloat16):
    g = torch.Generator(device="cuda").manual_seed(0)
    h = torch.randn(tokens, hidden, generator=g, device="cuda")
    w = torch.randn(vocab, hidden, generator=g, device="cuda") * (3.0 / hidden**0.5)
    h0 = h + 0.1 * torch.randn(tokens, hidden, generator=g, device="cuda")
    w0 = w + 0.01 * torch.randn(vocab, hidden, generator=g, device="cuda")
    targets = torch.randint(0, vocab, (tokens,), generator=g, device="cuda")
    return [x.to(dtype) for x in (h, w, h0, w0)], targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [64, None])
def test_linear_values_and_gradients(dtype, chunk_size):
    (h, w, h0, w0), targets = make_linear(dtype=dtype)
    targets = targets % (SHARD - 40)
    h.requires_grad_(), w.requires_grad_()
    stats = linear_token_stats(
        h,
        w,
        targets,
        reference_hidden=h0,
        reference_weight=w0,
        vocab_size=SHARD - 40,
        chunk_size=chunk_size,
        entropy_grad=True,
        impl="fused",
    )
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    z64 = h64 @ w64[: SHARD - 40].t()
    want = oracle(z64, targets, h0.double() @ w0.double()[: SHARD - 40].t())
    # A product of half values is exact in float32; a sum of n such terms is off by at most n u sum |h w|.
    logit_error = 513 * UNIT * float((h64.abs() @ w64.abs().t()).detach().max())
    tolerance = bound(z64, logit_error)
    check(stats, want, tolerance)
    got = gradient(stats.log_probs, stats.entropy, (h, w))
    (dz,) = gradient(want["log_probs"], want["entropy"], z64)
    # Entries of dz are off by at most 4 tolerances, and rounded to half for the products.
    dz_error = 4 * tolerance + ROUNDING[dtype] * dz.abs()
    limits = dz_error @ w64.detach()[: SHARD - 40].abs(), dz_error.t() @ h64.detach().abs()
    expected = dz @ w64.detach()[: SHARD - 40], dz.t() @ h64.detach()
    for a, b, limit in zip((got[0], got[1][: SHARD - 40]), expected, limits, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= 1.1 * limit + ROUNDING[dtype] * b.abs()).all()
    assert not got[1][SHARD - 40 :].any()


def test_linear_peak_memory():
    """No more than the logits of a chunk, for policy and reference, and the float32 sums of gradients."""
    (h, w, h0, w0), targets = make_linear(tokens=2048)
    h.requires_grad_(), w.requires_grad_()
    for chunk in (128, 256):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        stats = linear_token_stats(
            h, w, targets, reference_hidden=h0, reference_weight=w0, chunk_size=chunk, impl="fused"
        )
        torch.autograd.grad(stats.log_probs.sum(), (h, w))
        extra = torch.cuda.max_memory_allocated() - start
        gradients = (4 + 2) * (h.numel() + w.numel())
        workspace = 96 << 20  # the matrix library's own
        assert extra <= 2.5 * 4 * chunk * SHARD + gradients + workspace, (chunk, extra >> 20)


def test_auto_is_fused_here():
    z, reference, targets = make(8, SHARD)
    auto = token_stats(z, targets, reference_logits=reference)
    fused = token_stats(z, targets, reference_logits=reference, impl="fused")
    assert all(torch.equal(getattr(auto, n), getattr(fused, n)) for n in FIELDS)
    with pytest.raises(ValueError, match="impl='fused': tensors on cpu"):
        token_stats(z.cpu(), targets.cpu(), impl="fused")
