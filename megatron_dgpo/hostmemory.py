"""Host memory in which tensors of a GPU wait."""

from __future__ import annotations

import torch

_BLOCK, _ALIGNMENT = 1 << 28, 512
"""Bytes."""


class HostMemory:
    """Host memory for copies of tensors, pinned for those of a GPU: they can come back while it works.

    It is taken in blocks, because torch rounds each piece that it pins up to a power of two, and blocks are
    used again after `clear`.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._used: list[int] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that is valid until `clear`; of one on a GPU, once the GPU has done what it was given."""
        if not tensor.is_cuda:
            return tensor.clone()
        return self._take(tensor).copy_(tensor, non_blocking=True)

    def clear(self) -> None:
        """No copy is needed any more."""
        self._used = [0] * len(self._blocks)

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        size = like.numel() * like.element_size()
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        for n, block in enumerate(self._blocks):
            if self._used[n] + room <= block.numel():
                break
        else:
            n = len(self._blocks)
            block = torch.empty(max(_BLOCK, room), dtype=torch.uint8, pin_memory=True)
            self._blocks.append(block)
            self._used.append(0)
        start, self._used[n] = self._used[n], self._used[n] + room
        return block[start : start + size].view(like.dtype).view(like.shape)
