"""How often and with how much the ranks talk: one collective of a few numbers a token, never a gather of
the vocabulary, whatever the number of chunks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from test_ops_tp import SHARDED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS, HIDDEN, VOCAB = 40, 24, 64
POLICY, PAIR = 4, 9
"""Numbers of a token that a rank has to say, without and with a reference."""


class Collectives(TorchDispatchMode):
    """The c10d operators that are called, each with the numbers of its largest tensor."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.calls.append((func.__name__.partition(".")[0].strip("_"), max(sizes)))
        return func(*args, **(kwargs or {}))


def recorded(call):
    with Collectives() as seen:
        result = call()
    return result, seen.calls


def work(rank, world_size):
    from megatron_dgpo.ops import linear_token_stats, token_stats

    group = dist.new_group(list(range(world_size)))
    g = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, HIDDEN, generator=g)
    w = torch.randn(VOCAB, HIDDEN, generator=g).chunk(world_size)[rank]
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    found = {}
    for impl in SHARDED:
        for pair in (False, True):
            z = (h @ w.t()).requires_grad_()
            reference = {"reference_logits": z.detach() + 0.1} if pair else {}
            stats, forward = recorded(
                lambda z=z, r=reference, i=impl: token_stats(z, targets, tp_group=group, impl=i, **r)
            )
            _, backward = recorded(stats.log_probs.sum().backward)
            found["logits", impl, pair] = forward, backward
            for sp in (False, True):
                rows = h.chunk(world_size)[rank] if sp else h
                x, head = rows.clone().requires_grad_(), w.clone().requires_grad_()
                reference = {"reference_hidden": h, "reference_weight": w} if pair else {}
                stats, forward = recorded(
                    lambda x=x, head=head, r=reference, i=impl, sp=sp: linear_token_stats(
                        x, head, targets, tp_group=group, chunk_size=3, sequence_parallel=sp, impl=i, **r
                    )
                )
                _, backward = recorded(stats.log_probs.sum().backward)
                found["linear", impl, pair, sp] = forward, backward
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, 2)


def numbers(calls):
    return [size for _, size in calls]


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("pair", [False, True])
def test_logits(ranks, impl, pair):
    for rank in ranks:
        forward, backward = rank["logits", impl, pair]
        assert numbers(forward) == [2 * TOKENS * (PAIR if pair else POLICY)]
        assert backward == []


@pytest.mark.parametrize("impl", SHARDED)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("sp", [False, True])
def test_hidden_states(ranks, impl, pair, sp):
    """14 chunks. What sequence parallelism adds is the gather of its own rows, in both passes."""
    for rank in ranks:
        forward, backward = rank["linear", impl, pair, sp]
        rows = [TOKENS * HIDDEN] if sp else []
        assert numbers(forward) == [*rows, 2 * TOKENS * (PAIR if pair else POLICY)]
        assert numbers(backward) == [*rows, TOKENS * HIDDEN]
