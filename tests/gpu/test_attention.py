"""The torch-native attention on a GPU against itself on a CPU. Needs a CUDA device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dgpo.mcore.layers import PackedLayout, PackedSDPA, packed_kernel

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (make test-gpu)", allow_module_level=True)

LENGTHS = (129, 1, 64, 700)
HEADS, GROUPS, SIZE = 8, 2, 64


def attention(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of queries, keys and values, on the CPU."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    layout = PackedLayout.from_cu_seqlens(ends.to(device), positions.to(device))
    config: Any = SimpleNamespace(context_parallel_size=1)
    q, k, v = (x.to(device).requires_grad_() for x in tensors)
    out = PackedSDPA(config)(q, k, v, layout)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    return tuple(x.detach().cpu() for x in (out, *gradients))


def test_grouped_heads_in_float32_are_those_of_the_cpu() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    tensors = tuple(torch.randn(shape, generator=draw) for shape in shapes)
    for got, want in zip(attention(tensors, "cuda"), attention(tensors, "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [GROUPS, HEADS])
def test_half_precision_takes_torchs_kernel_for_packed_sequences(groups: int) -> None:
    assert packed_kernel() is not None, "this torch has none that we know how to call"
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, SIZE) for heads in (HEADS, groups, groups)]
    tensors = tuple(torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    want = attention(tuple(x.float() for x in tensors), "cpu")
    for got, exact in zip(attention(tensors, "cuda"), want, strict=True):
        # 8 bits of a value, and of the weights that it is a sum over.
        torch.testing.assert_close(got.float(), exact, rtol=2**-6, atol=2**-6 * exact.abs().max().item())


def test_grouped_heads_in_float32_hold_no_matrix_of_scores() -> None:
    length, heads = 8192, 8
    config: Any = SimpleNamespace(context_parallel_size=1)
    ends, positions = (
        torch.tensor([0, length], device="cuda", dtype=torch.int32),
        torch.arange(length, device="cuda"),
    )
    layout = PackedLayout.from_cu_seqlens(ends, positions)
    q = torch.randn(length, heads, SIZE, device="cuda", requires_grad=True)
    k, v = (torch.randn(length, 2, SIZE, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PackedSDPA(config)(q, k, v, layout).sum().backward()
    scores = heads * length * length * 4
    assert torch.cuda.max_memory_allocated() - before < scores / 4
