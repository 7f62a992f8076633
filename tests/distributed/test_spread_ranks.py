"""Quantiles and spread of credit whose tokens lie on several ranks: the same numbers as on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from spread_reference import token_quantiles
from test_credit_cp import LENGTHS, data, share

from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.algorithms.quantiles import quantiles
from megatron_dgpo.algorithms.segments import gather_over
from megatron_dgpo.algorithms.spread import credit_spread
from megatron_dgpo.types import PackedBatch

SIZES = (40, 0, 900, 73)
"""Values of each rank: one has none."""


def values(name: int) -> np.ndarray:
    return np.random.default_rng(name).gamma(0.4, size=sum(SIZES)).astype(np.float32)


def batch(distance, entropy, mask, place, cu, group):
    credit = credit_weights(
        distance, entropy, cu, vocab_size=46, tau=0.1, kappa=1.0, loss_mask=mask, cp_group=group
    )
    ids = torch.zeros_like(place)
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.0])
    return credit.weights, PackedBatch(ids, ids, place, mask, cu, advantages)


def places() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])


def work(rank, world_size):
    ends = np.cumsum((0, *SIZES))
    cut = slice(ends[rank], ends[rank + 1]) if world_size == 4 else slice(rank, None, world_size)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: (calls.append(tensor.numel()), real(tensor, *a, **k))[1]
    mine = [torch.from_numpy(values(name)[cut].copy()) for name in (1, 2)]
    found = quantiles([*mine, torch.zeros(0)], group=dist.group.WORLD)
    dist.all_reduce = real
    spread = None
    if world_size == 2:
        where, cu = share(rank, world_size)
        tokens = [x[where] for x in (*data(), places())]
        ids = torch.arange(len(cu) - 1).repeat_interleave(cu.diff())
        rows, ids = gather_over(where.double().unsqueeze(0), ids, dist.group.WORLD)
        # The longer rank's tokens are padded by none, the shorter one's padding is gone again.
        assert sorted(rows[0].tolist()) == list(range(sum(LENGTHS)))
        assert torch.equal(
            ids, torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[rows[0].long()]
        )
        spread = credit_spread(*batch(*tokens, cu, dist.group.WORLD), dist.group.WORLD)
    return found, calls, spread


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_what_one_finds(world_size: int) -> None:
    want = [list(token_quantiles("x", values(name)).values()) for name in (1, 2)]
    whole = credit_spread(*batch(*data(), places(), torch.tensor([0, 7, 8, 48, 60], dtype=torch.int32), None))
    assert float(whole["credit_effective_fraction"][1]) == 3
    for found, calls, spread in run_ranks(work, world_size):
        assert found == [*want, []]
        assert calls == [3, *[3 * 4 * 15] * 8]  # the counts, then four bits at a time
        for name, (total, count) in (spread or {}).items():
            assert float(count) == float(whole[name][1])
            # Weights are a rounding of float32 apart.
            assert float(total) == pytest.approx(float(whole[name][0]), rel=1e-6), name
