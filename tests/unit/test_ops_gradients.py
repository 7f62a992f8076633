"""Gradients of the token statistics: by finite differences, into Megatron's gradient buffer, and under
autocast."""

from __future__ import annotations

import pytest
import torch
from test_ops import FIELDS, IMPLS, SHARDED, UNIT, make, make_linear, oracle

from megatron_dgpo import ops
from megatron_dgpo.ops import linear_token_stats, token_stats

HIDDEN, PADDED, VOCAB, TOKENS = 3, 9, 7, 5
TARGETS = torch.tensor([0, 6, 3, 3, 5])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- finite differences, in float64 (which is never "fused") ------------------------------------------


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_logits(impl, masked, monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK_BYTES", {"cpu": 4 * PADDED * 2})  # chunks of 2, 2 and 1 tokens
    z = random(TOKENS, PADDED)
    constant = torch.zeros(PADDED, dtype=torch.float64)
    if masked:
        constant[[1, 4]] = -torch.inf
    reference = z + 0.3 * random(TOKENS, PADDED, seed=1)

    def values(z):
        stats = token_stats(
            z + constant,
            TARGETS,
            reference_logits=reference + constant,
            vocab_size=VOCAB,
            temperature=0.8,
            entropy_grad=True,
            impl=impl,
        )
        return stats.log_probs, stats.entropy

    assert torch.autograd.gradcheck(values, z.requires_grad_())


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_gradcheck_of_the_lm_head(impl):
    h, w = random(TOKENS, HIDDEN), random(PADDED, HIDDEN, seed=1)

    def values(h, w):
        stats = linear_token_stats(
            h,
            w,
            TARGETS,
            reference_hidden=h.detach() + 0.1,
            reference_weight=w.detach() - 0.1,
            vocab_size=VOCAB,
            temperature=0.8,
            chunk_size=2,
            entropy_grad=True,
            impl=impl,
        )
        return stats.log_probs, stats.entropy

    assert torch.autograd.gradcheck(values, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("impl", SHARDED)
def test_a_second_derivative_is_refused(impl):
    """The backward pass takes the partition sum for a constant: differentiating it would be wrong."""
    z, _, targets = make(tokens=5)
    z.requires_grad_()
    (h, w, _, _), linear_targets = make_linear()
    h.requires_grad_()
    for stats, x in (
        (token_stats(z, targets, impl=impl), z),
        (linear_token_stats(h, w, linear_targets, impl=impl), h),
    ):
        (grad,) = torch.autograd.grad(stats.log_probs.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()
        (grad,) = torch.autograd.grad(stats.log_probs.sum(), x, create_graph=True)
        assert not grad.requires_grad


# --- Megatron's gradient buffer -----------------------------------------------------------------------


def head(dtype=torch.float32, main_grad=None, **attributes):
    """(hidden, LM-head weight with what Megatron's DDP puts on it, targets)."""
    (h, w, _, _), targets = make_linear(dtype)
    w.requires_grad_()
    if main_grad is not None:
        w.main_grad = torch.zeros(w.shape, dtype=main_grad)
        w.grad_added_to_main_grad = False
    for name, value in attributes.items():
        setattr(w, name, value)
    return h.requires_grad_(), w, targets


def run(h, w, targets, impl, part=slice(None)):
    stats = linear_token_stats(
        h[part], w, targets[part], vocab_size=46, chunk_size=8, entropy_grad=True, impl=impl
    )
    (stats.log_probs + 0.3 * stats.entropy).sum().backward()


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_main_grad_takes_the_gradient_before_it_is_rounded(impl, dtype):
    """The same sums, in the same order, as on the way to weight.grad; and on a CPU, where half operands are
    widened, the same as those of widened inputs, not a bit lost."""
    h, w, targets = head(dtype, torch.float32)
    run(h, w, targets, impl)
    plain_h, plain_w, _ = head(dtype)
    run(plain_h, plain_w, targets, impl)
    assert torch.equal(w.main_grad.to(dtype), plain_w.grad) and torch.equal(h.grad, plain_h.grad)
    assert w.grad_added_to_main_grad
    # DDP's hook runs where there is a .grad, and adds none that is in main_grad already.
    assert w.grad.dtype == dtype and not w.grad.any()
    assert w.main_grad[:46].any(1).all() and not w.main_grad[46:].any()
    wide_h, wide_w = (x.detach().float().requires_grad_() for x in (h, w))
    run(wide_h, wide_w, targets, impl)
    assert torch.equal(w.main_grad, wide_w.grad)
    assert torch.equal(w.main_grad, w.main_grad.to(dtype).float()) == (dtype == torch.float32)


@pytest.mark.parametrize("impl", SHARDED)
def test_main_grad_adds_up_over_micro_batches(impl):
    h, w, targets = head(torch.float32, torch.float32)
    w.main_grad[:] = 7.0
    plain_h, plain_w, _ = head()
    for part in (slice(0, 20), slice(20, None)):
        run(h, w, targets, impl, part)
        run(plain_h, plain_w, targets, impl, part)
    # In any order n float32 numbers add up to within (n - 1) u sum |x|: here 37 products and the 7, twice.
    z = (h.detach().double() @ w.detach().double()[:46].t()).requires_grad_()
    want = oracle(z, targets)
    (grad,) = torch.autograd.grad((want["log_probs"] + 0.3 * want["entropy"]).sum(), z)
    sizes = 7.0 + grad.abs().t() @ h.detach().double().abs()
    gap = (w.main_grad - 7.0 - plain_w.grad)[:46].abs()
    assert (gap <= 2 * 39 * UNIT * sizes).all()
    assert not w.main_grad[46:].ne(7.0).any()


@pytest.mark.parametrize("impl", SHARDED)
def test_a_tied_embeddings_gradient_reaches_the_hook(impl):
    """With zero_out_wgrad Megatron's hook adds .grad too: the embedding's part, and zeros of the head."""
    ids = torch.arange(37) % 5
    h, w, targets = head(torch.float32, torch.float32, zero_out_wgrad=True)
    factors = torch.randn(37, 24, generator=torch.Generator().manual_seed(4))

    def tied(h, w):
        stats = linear_token_stats(h, w, targets, vocab_size=46, impl=impl)
        embedded = torch.nn.functional.embedding(ids, w)
        (stats.log_probs.sum() + (factors * embedded).sum()).backward()

    tied(h, w)
    assert not w.grad_added_to_main_grad
    of_the_embedding = torch.zeros(50, 24).index_add_(0, ids, factors)
    # Sums of 8 float32 numbers below 4, in any order.
    assert (w.grad - of_the_embedding).abs().max() <= 8 * 32 * 2.0**-24
    plain_h, plain_w, _ = head()
    tied(plain_h, plain_w)
    assert torch.equal(w.main_grad + w.grad, plain_w.grad)


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_of_another_dtype_is_left_alone(impl, dtype):
    h, w, targets = head(dtype, torch.bfloat16)
    run(h, w, targets, impl)
    plain_h, plain_w, _ = head(dtype)
    run(plain_h, plain_w, targets, impl)
    assert not w.main_grad.any() and not w.grad_added_to_main_grad
    assert w.grad.any() and torch.equal(w.grad, plain_w.grad)


@pytest.mark.parametrize("impl", SHARDED)
def test_a_frozen_heads_buffer_is_left_alone(impl):
    h, w, targets = head(torch.float32, torch.float32)
    run(h, w.requires_grad_(False), targets, impl)
    assert h.grad.any() and not w.main_grad.any() and not w.grad_added_to_main_grad


# --- autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    (h, w, h0, w0), targets = make_linear()

    def answers(autocast):
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stats = linear_token_stats(
                *leaves,
                targets,
                reference_hidden=h0,
                reference_weight=w0,
                vocab_size=46,
                temperature=0.8,
                entropy_grad=True,
                impl=impl,
            )
        # The reference leaves its backward pass to torch, which would cast in it.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and impl != "reference"):
            grads = torch.autograd.grad((stats.log_probs + stats.entropy).sum(), leaves)
        return [*(getattr(stats, name).detach() for name in FIELDS), *grads]

    for a, b in zip(answers(False), answers(True), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
