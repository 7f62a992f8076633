"""What is patched so that Megatron runs without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from patience import patience
from spawn import run_ranks
from tiny import split

from megatron_dgpo import platform

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
    with split(ALONE) as groups, platform.megatron_calls():
        ours = get_grad_norm_fp32(gradients, grad_stats_parallel_group=groups.world)
        none = get_grad_norm_fp32([gradients[-1]], grad_stats_parallel_group=groups.world)
    exact = sum(float(x.double().square().sum()) for x in gradients) ** 0.5
    return ours, none, exact


def test_gradient_norm_of_large_tensors_is_exact():
    ((ours, none, exact),) = run_ranks(norms, 1)
    assert ours == pytest.approx(exact, rel=2e-7)
    assert none == 0.0
