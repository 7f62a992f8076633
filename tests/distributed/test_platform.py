"""What is patched so that Megatron runs without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from patience import patience
from spawn import run_ranks
from tiny import split

from megatron_dgpo import patches

ALONE = SimpleNamespace(
    parallel=SimpleNamespace(
        device="auto",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        timeout_seconds=patience(),
    )
)


def norms(rank, world_size):
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    g = torch.Generator().manual_seed(3)
    sizes = (3_000_000, 70_001, 1, 0)
    gradients = [torch.randn(n, generator=g).reshape(-1, 1) for n in sizes]
    with split(ALONE) as groups, patches.megatron_calls():
        ours = get_grad_norm_fp32(gradients, grad_stats_parallel_group=groups.world)
        none = get_grad_norm_fp32([gradients[-1]], grad_stats_parallel_group=groups.world)
    exact = sum(float(x.double().square().sum()) for x in gradients) ** 0.5
    return ours, none, exact


def test_gradient_norm_of_large_tensors_is_exact():
    ((ours, none, exact),) = run_ranks(norms, 1)
    assert ours == pytest.approx(exact, rel=2e-7)
    assert none == 0.0


RANKS, PART = 3, 10_000_000


def buffers(rank):
    """Whole numbers, whose sums are exact in float32, each rank its own."""
    g = torch.Generator().manual_seed(rank)
    return torch.randint(-1000, 1000, (RANKS * PART,), generator=g, dtype=torch.int32).float()


def collectives(rank, world_size):
    """Megatron's reduce-scatter and all-gather of a buffer: values, and the memory beside it."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer

    def peak():
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    with split(ALONE) as groups:
        whole = buffers(rank)
        own = whole.view(RANKS, PART)[rank]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        param_and_grad_buffer.dist_reduce_scatter_func(own, whole, op=dist.ReduceOp.SUM, group=groups.dp)
        summed = own.clone()
        param_and_grad_buffer.dist_all_gather_func(whole, own, group=groups.dp)
        grown = peak() - before
        elsewhere = torch.empty(PART)  # no part of the buffer: torch's own
        whole_again = buffers(rank)
        param_and_grad_buffer.dist_reduce_scatter_func(
            elsewhere, whole_again, op=dist.ReduceOp.SUM, group=groups.dp
        )
        return summed, whole if rank == 0 else whole.double().sum(), grown, torch.equal(elsewhere, summed)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
def test_buffers_are_summed_and_gathered_where_they_are():
    results = run_ranks(collectives, RANKS)
    expected = sum(buffers(rank) for rank in range(RANKS))
    for rank, (summed, whole, grown, by_torch) in enumerate(results):
        assert torch.equal(summed, expected.view(RANKS, PART)[rank])
        assert torch.equal(whole, expected) if rank == 0 else whole == expected.double().sum()
        assert by_torch
        # The clone of its part, and less than another: torch's own take the whole buffer anew.
        assert grown < 2 * 4 * PART
