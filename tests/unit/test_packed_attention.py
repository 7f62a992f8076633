"""The torch layer spec's attention on packed sequences, against each sequence's own softmax in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_dgpo.mcore.layers import PackedLayout, PackedSDPA, similar

HEADS, GROUPS, SIZE = 4, 2, 16
LENGTHS = {
    "one": [37],
    "equal": [20] * 5,
    "similar, out of order": [18, 23, 12, 20, 23, 1],
    "log-normal": [3, 400, 31, 129, 1, 64, 70, 260, 12, 5],
    "falling": [300, 300, 90, 90, 8],
}


def layout_of(lengths: list[int]) -> PackedLayout:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout.from_cu_seqlens(ends, torch.cat([torch.arange(n) for n in lengths]))


def by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """(T, N * D): softmax of the masked scores of one sequence after the other."""
    outs = []
    for q_LND, k_LGD, v_LGD in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        k_LND, v_LND = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k_LGD, v_LGD))
        scores_NLL = torch.einsum("lnd,mnd->nlm", q_LND, k_LND) / math.sqrt(SIZE)
        later = torch.ones(scores_NLL.shape[1:], dtype=torch.bool).triu(1)
        weights_NLL = scores_NLL.masked_fill(later, -math.inf).softmax(-1)
        outs.append(torch.einsum("nlm,mnd->lnd", weights_NLL, v_LND).flatten(1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", LENGTHS)
def test_outputs_and_gradients_are_those_of_each_sequence_by_itself(name: str) -> None:
    lengths = LENGTHS[name]
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    wide = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    weight = torch.randn(sum(lengths), HEADS * SIZE, generator=draw, dtype=torch.float64)
    config: Any = SimpleNamespace(context_parallel_size=1)
    got, want = PackedSDPA(config)(*narrow, layout_of(lengths)), by_sequence(*wide, lengths)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got_gradients = torch.autograd.grad(got, narrow, weight.float())
    for a, b in zip(got_gradients, torch.autograd.grad(want, wide, weight), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_sequences_share_a_grid_while_padding_costs_less_than_a_call(lengths: list[int]) -> None:
    groups = similar(lengths)
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
    for group in groups:
        rows = [lengths[n] for n in group]
        assert rows[0] == max(rows)
        real = sum(n**2 for n in rows)
        assert len(rows) * rows[0] ** 2 - real <= max(4096, 0.1 * real)
    longest = [lengths[group[0]] for group in groups]
    assert longest == sorted(longest, reverse=True)


def test_nothing_is_moved_where_nothing_is_padded() -> None:
    assert layout_of([20] * 5).place_T is None and layout_of([300, 300, 90]).place_T is None
    moved = layout_of([90, 300])
    assert moved.place_T is not None and moved.places == 390
    assert moved.place_T[:90].tolist() == list(range(300, 390))
