"""Peak memory of the loss and of a whole training step, as the vocabulary grows: measured.

Live bytes are counted as torch allocates and frees storages, so the figures are exact and the same on
every machine.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from spawn import run_ranks
from tiny import config, scored_groups, split
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dgpo.config import DGPOConfig, OptimizerConfig
from megatron_dgpo.ops import linear_token_stats

MIB = 1 << 20
CHUNK = 32 * MIB
"""Documented size of a chunk's float32 logits on a CPU."""
BUFFERS = 8
"""Of a chunk's size at a time: logits, shifted logits, exponentials and their roots, of policy and
reference each."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there: now, at most, and of the
    largest one."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in before | self._seen.keys():
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)

    def _gone(self, key, size):
        self.now -= size
        del self._seen[key]


def id_of(tensor):
    return tensor.untyped_storage()._cdata


def test_live_bytes_are_counted():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = (a + 1) * 2  # one temporary
        view = b[10:]
        assert live.now == 8000 and live.peak == 12000
        del a, b
        assert live.now == 4000 and view.sum() == 1980
        del view
    assert live.now <= 4 and live.largest == 4000


def loss_peak(vocab, chunk_size, impl):
    """(live bytes at most, less the returned gradients; the largest storage)."""
    tokens, hidden = 512, 8
    g = torch.Generator().manual_seed(0)
    h, h0 = (torch.randn(tokens, hidden, generator=g) for _ in range(2))
    w, w0 = (torch.randn(vocab, hidden, generator=g) for _ in range(2))
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    h.requires_grad_(), w.requires_grad_()
    with LiveBytes() as live:
        stats = linear_token_stats(
            h, w, targets, reference_hidden=h0, reference_weight=w0, chunk_size=chunk_size, impl=impl
        )
        grads = torch.autograd.grad(stats.log_probs.sum(), (h, w))
    return live.peak - sum(x.nbytes for x in grads), live.largest


@pytest.mark.parametrize("vocab", [4096, 16384, 65536])
def test_the_loss_takes_a_few_chunks_whatever_the_vocabulary(vocab):
    chunk = 1 << 18  # logits
    peak, largest = loss_peak(vocab, chunk // vocab, "eager")
    rows = 64 * 4 * 512  # the numbers of each token, forward and backward
    weights = 4 * vocab * 8  # the returned gradient is the largest storage where V H > chunk
    assert peak <= BUFFERS * 4 * chunk + rows
    assert largest <= max(4 * chunk, weights) < 4 * 512 * vocab


def test_the_loss_grows_with_the_chunk_alone():
    small, large = (loss_peak(16384, size, "eager")[0] for size in (8, 32))
    assert 4 * 16384 * 24 <= large - small <= BUFFERS * 4 * 16384 * 24


# --- a whole step ------------------------------------------------------------------------------------

HIDDEN, TOKENS = 16, 1000


def write_wide_model(folder, vocab):
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def long_groups():
    """Scored groups whose responses add up to about TOKENS tokens."""
    groups = scored_groups(prompts=2, n=3)
    for group in groups:
        for sample in group.samples:
            sample.token_ids = [i % 40 for i in range(TOKENS // 6)]
            sample.log_probs = [-1.0] * len(sample.token_ids)
    return groups


VOCABS = (16384, 32768)  # of which a chunk holds 512 and 256 tokens
TIMINGS = ("rollout", "update")


def step_peaks(rank, world_size, folder):
    return {(v, timing): step_peak(folder / str(v), v, timing) for v in VOCABS for timing in TIMINGS}


def step_peak(folder, vocab, timing):
    """(live bytes at most of a rollout batch's statistics and update; largest storage)."""
    from megatron_dgpo.algorithms import build_algorithm
    from megatron_dgpo.learner import Learner
    from megatron_dgpo.run import build_policy

    c = config(folder, optimizer=OptimizerConfig(lr=1e-3), algorithm=DGPOConfig(credit_timing=timing))
    c = c.model_copy(update={"model": c.model.model_copy(update={"init": "random"})})
    with split(c) as groups:
        algorithm = build_algorithm(c.algorithm, vocab_size=vocab)
        policy = build_policy(c, groups, total_updates=2, keep_reference=True)
        learner = Learner(policy, algorithm, temperature=1.0, max_tokens=4096)
        samples = long_groups()
        algorithm.assign_advantages(samples)
        with LiveBytes() as live:
            (minibatch,) = learner.pack([algorithm.select(samples)])
            learner.prepare([minibatch])
            learner.update(minibatch, save_bad_batch_to=folder)
        assert len(minibatch.batches) == 1
        return live.peak, live.largest


def test_a_step_holds_chunks_and_never_the_logits(tmp_path):
    for vocab in VOCABS:
        write_wide_model(tmp_path / str(vocab), vocab)
    (found,) = run_ranks(step_peaks, 1, tmp_path)
    peaks = {}
    for (vocab, timing), (peak, largest) in found.items():
        assert largest <= CHUNK + 4096, f"V = {vocab}: a tensor of {largest / MIB:.1f} MiB"
        # Beside the loss: the policy's weights in host memory while the reference is in their place, and
        # what autograd and the optimizer make of a weight's size.
        weights = 2 * 4 * vocab * HIDDEN  # embedding and head
        peaks[vocab, timing] = peak - 4 * weights
        assert peaks[vocab, timing] <= BUFFERS * CHUNK + 24 * MIB
    few, many = VOCABS
    logits = 4 * TOKENS * (many - few)
    for timing in TIMINGS:
        assert peaks[many, timing] - peaks[few, timing] <= 0.05 * logits
