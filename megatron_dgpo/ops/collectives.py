"""The collectives that the vocabulary-parallel operations use, on NCCL and gloo alike.

Shape suffixes: T packed tokens, R ranks of the group. A group of None is one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def stack_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`tensor` of every rank, in rank order: (R, *tensor.shape), the same bits on every rank."""
    size = group_size(group)
    if size == 1:
        return tensor.unsqueeze(0)
    out = tensor.new_empty(size * tensor.numel())
    dist.all_gather_into_tensor(out, tensor.contiguous().view(-1), group=group)
    return out.view(size, *tensor.shape)


def gather_rows(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Row shards (T/R, ...) end to end in rank order: (T, ...)."""
    if group_size(group) == 1:
        return tensor
    return stack_ranks(tensor, group).flatten(0, 1)


def sum_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the ranks, in place: for tensors that the caller owns."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def scatter_row_sums(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's rows (T/R, ...) of the sum over the ranks of `tensor` (T, ...), which is consumed."""
    size = group_size(group)
    if size == 1:
        return tensor
    rows = tensor.shape[0] // size
    if dist.get_backend(group) == dist.Backend.GLOO:
        # Not every gloo build has a reduce-scatter.
        first = group_rank(group) * rows
        return sum_ranks(tensor, group)[first : first + rows].clone()
    out = tensor.new_empty(rows, *tensor.shape[1:])
    dist.reduce_scatter_tensor(out, tensor.contiguous(), group=group)
    return out
