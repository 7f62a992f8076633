"""The peak memory of the LM head's statistics is that of a chunk of logits, whatever the vocabulary:
measured, from the allocator's record of every allocation and release."""

from __future__ import annotations

import gc

import pytest
import torch
from memory import measured
from test_ops import NO_FUSED, SHARDED

from megatron_dgpo.ops import linear_token_stats

HIDDEN = 16
VOCABS = (4096, 16384, 65536)
BUDGET = 32 << 20
"""Bytes of a chunk's float32 logits, where no chunk_size is given."""
FORWARD = {"eager": 4, "fused": 2}
"""Tensors of a chunk's size: the logits of policy and reference; eager has two more for exponentials
and roots (see shards.reduce_shard), the kernels have theirs in registers."""
BACKWARD = {"eager": 2, "fused": 1}
"""The policy's logits; eager has one more for the probabilities, the kernels overwrite."""
TILE = 4096


@pytest.fixture(autouse=True)
def the_interpreter_lets_go(monkeypatch):
    """Triton's interpreter (not the compiled launch) leaves its arguments in a reference cycle."""
    if NO_FUSED:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_and_collect(*args, **kwargs):
        launch(*args, **kwargs)
        gc.collect()

    monkeypatch.setattr(GridExecutor, "__call__", launch_and_collect)
    gc.freeze()  # what is there already need not be looked through each time
    yield
    gc.unfreeze()


def small(tokens, vocab):
    """Numbers of a token and of its tiles: 9 are reduced from a chunk, joined and merged, and 9 from each
    tile of the kernels; ids, results and incoming gradients come to a dozen more."""
    return 4 * tokens * (64 + 9 * max(vocab // TILE, 1))


def step(impl, tokens, vocab, chunk_size):
    """Memory of the forward and of the backward pass, and the bytes of the gradients."""
    g = torch.Generator().manual_seed(0)
    h, h0 = torch.randn(2, tokens, HIDDEN, generator=g).unbind(0)
    w, w0 = torch.randn(2, vocab, HIDDEN, generator=g).unbind(0)
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    stats, forward = measured(
        lambda: linear_token_stats(
            h,
            w,
            targets,
            reference_hidden=h0,
            reference_weight=w0,
            chunk_size=chunk_size,
            temperature=0.9,
            entropy_grad=True,
            impl=impl,
        )
    )
    loss = (stats.log_probs + 0.1 * stats.entropy).sum()
    grads, backward = measured(lambda: torch.autograd.grad(loss, (h, w)))
    return forward, backward, sum(grad.nbytes for grad in grads)


def check(impl, tokens, vocab, chunk_size, of_one_chunk):
    forward, backward, gradients = step(impl, tokens, vocab, chunk_size)
    slack = small(tokens, vocab)
    # At least the pair's logits, or nothing was measured.
    assert 2 * of_one_chunk <= forward.peak <= FORWARD[impl] * of_one_chunk + slack
    assert gradients <= backward.peak <= BACKWARD[impl] * of_one_chunk + gradients + slack
    # Rounded up to the allocator's alignment; the weight's gradient is no larger than a chunk here.
    assert max(forward.largest, backward.largest) <= of_one_chunk + 64
    assert forward.kept <= slack and backward.kept <= gradients + slack
    return forward.peak, backward.peak - gradients


@pytest.mark.parametrize("impl", SHARDED)
def test_peak_is_one_chunks_whatever_the_vocabulary(impl):
    tokens, peaks = 520, {}
    for vocab in VOCABS:
        of_one_chunk = min(4 * vocab * tokens, BUDGET)
        peaks[vocab] = check(impl, tokens, vocab, None, of_one_chunk)
    # From 16384 columns on, the tokens take more than one chunk: 4 times the columns change nothing.
    for a, b in zip(peaks[16384], peaks[65536], strict=True):
        assert b <= a + small(tokens, 65536)


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("vocab", VOCABS)
def test_peak_is_that_of_the_chunk_that_was_asked_for(impl, vocab):
    check(impl, 48, vocab, 16, 4 * vocab * 16)
