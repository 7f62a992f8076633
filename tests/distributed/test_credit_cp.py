"""Credit and loss shares of sequences whose tokens are spread over context-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from spawn import run_ranks

from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.algorithms.surrogate import token_coefficients

LENGTHS = (7, 1, 40, 12)


def data():
    g = torch.Generator().manual_seed(2)
    total = sum(LENGTHS)
    distance, entropy = torch.rand(total, generator=g), torch.rand(total, generator=g) * 3
    mask = torch.rand(total, generator=g) > 0.3
    mask[48:] = False  # the last sequence counts nothing
    return distance, entropy, mask


def share(rank, world_size):
    """This rank's tokens, as positions in the whole, and where its part of each sequence ends. The second
    sequence lies on rank 0 alone."""
    parts, ends, start = [], [0], 0
    for length in LENGTHS:
        cut = (length * 2 + 2) // 3
        low, high = (start, start + cut) if rank == 0 else (start + cut, start + length)
        parts.append(torch.arange(low, high))
        ends.append(ends[-1] + parts[-1].numel())
        start += length
    return torch.cat(parts), torch.tensor(ends, dtype=torch.int32)


def work(rank, world_size):
    distance, entropy, mask = data()
    where, cu = share(rank, world_size)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: (calls.append(tensor.numel()), real(tensor, *a, **k))[1]
    credit = credit_weights(
        distance[where],
        entropy[where],
        cu,
        vocab_size=46,
        tau=0.1,
        kappa=1.0,
        loss_mask=mask[where],
        cp_group=dist.group.WORLD,
    )
    dist.all_reduce = real
    coefficients = token_coefficients(
        cu, mask[where], "sequence_mean", num_sequences=9, num_tokens=1, cp_group=dist.group.WORLD
    )
    return credit, coefficients, calls


def test_two_ranks_agree_with_one():
    distance, entropy, mask = data()
    cu = torch.tensor([0, 7, 8, 48, 60], dtype=torch.int32)
    whole = credit_weights(distance, entropy, cu, vocab_size=46, tau=0.1, kappa=1.0, loss_mask=mask)
    shares = token_coefficients(cu, mask, "sequence_mean", num_sequences=9, num_tokens=1)
    for rank, (credit, coefficients, calls) in enumerate(run_ranks(work, 2)):
        where, _ = share(rank, 2)
        # float64 sums in another order, then one rounding to float32.
        assert torch.allclose(credit.weights, whole.weights[where], rtol=2.0**-23, atol=0)
        assert torch.equal(credit.scores, whole.scores[where])
        assert torch.allclose(credit.effective_fraction, whole.effective_fraction, rtol=2.0**-23, atol=0)
        assert torch.equal(coefficients, shares[where])
        assert calls == [4, 12]  # a maximum, then three sums, a sequence
