"""Rows of hidden states that wait in host memory until an update needs them.

Shape suffixes: T packed tokens, H hidden size.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_dgpo.hostmemory import HostMemory
from megatron_dgpo.ops.collectives import gather_rows, group_rank, group_size


class KeptRows:
    """The hidden states of a rollout batch, of which each TP rank keeps its share of the rows.

    Args:
        sequence_parallel: a rank has its share alone, and is given no more back.
    """

    def __init__(self, tp_group: dist.ProcessGroup | None, *, sequence_parallel: bool) -> None:
        self._group = tp_group
        self._share = group_size(tp_group) > 1 and not sequence_parallel
        self._memory = HostMemory()

    def clear(self) -> None:
        """What was kept is not needed any more; its memory is used again."""
        self._memory.clear()

    def keep(self, hidden_TH: Tensor) -> Tensor:
        """This rank's rows, for `bring`; valid until `clear`. Those of a CPU are not copied without need."""
        if self._share:
            rows = -(-hidden_TH.shape[0] // group_size(self._group))
            own = hidden_TH[group_rank(self._group) * rows :][:rows]
            hidden_TH = own.new_zeros(rows, own.shape[1])  # the last rank's may be fewer
            hidden_TH[: own.shape[0]] = own
        return self._memory.copy(hidden_TH) if hidden_TH.is_cuda else hidden_TH

    def bring(self, kept: Tensor, like: Tensor, num_tokens: int) -> Tensor:
        """What was kept of `num_tokens` tokens, on the device of `like`: (T, H), or this rank's rows under
        sequence parallelism. Collective over the TP ranks."""
        hidden = kept.to(like.device, non_blocking=True)
        return gather_rows(hidden, self._group)[:num_tokens] if self._share else hidden
