"""Host memory for tensors of a GPU. Needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

from megatron_dgpo.hostmemory import HostMemory
from megatron_dgpo.ops.kept_rows import KeptRows

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (make test-gpu)", allow_module_level=True)


def test_copies_are_pinned_and_their_memory_is_used_again() -> None:
    memory = HostMemory()
    tensors = [torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (3, 1000, 70_001)]
    first = [memory.copy(x) for x in tensors]
    torch.cuda.synchronize()
    assert all(x.is_pinned() for x in first)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(first, tensors, strict=True))
    storages = {x.untyped_storage().data_ptr() for x in first}
    assert len(storages) == 1
    memory.clear()
    assert {memory.copy(x).untyped_storage().data_ptr() for x in tensors} == storages


def test_hidden_states_come_back_as_they_were() -> None:
    kept = KeptRows(None, sequence_parallel=False)
    hidden = torch.randn(101, 32, device="cuda", dtype=torch.bfloat16)
    waiting = kept.keep(hidden)
    assert waiting.device.type == "cpu"
    assert torch.equal(kept.bring(waiting, hidden, 101), hidden)
