"""Packed sequences: which token belongs to which, and sums over them.

Shape suffixes: T packed tokens, S packed sequences. With context parallelism a sequence's tokens are
spread over ranks; `cu_seqlens` then delimits the tokens that this rank holds of each.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def segment_ids(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(T,) int64: the sequence of each token. Raises ValueError where cu_seqlens does not span T."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, need integers (S + 1,)"
        )
    lengths = cu_seqlens.diff()
    bounds = torch.stack([cu_seqlens[0], cu_seqlens[-1], lengths.min() if lengths.numel() else cu_seqlens[0]])
    first, last, shortest = bounds.tolist()
    if first != 0 or last != num_tokens or shortest < 0:
        raise ValueError(
            f"cu_seqlens: goes from {first} to {last} (shortest sequence {shortest}), "
            f"need 0 to {num_tokens} without a descent"
        )
    index = torch.arange(lengths.shape[0], device=cu_seqlens.device)
    return torch.repeat_interleave(index, lengths, output_size=num_tokens)


def segment_sums(values_NT: torch.Tensor, ids_T: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """(N, S) sums over each sequence of N rows of per-token values."""
    sums = values_NT.new_zeros(values_NT.shape[0], num_sequences)
    return sums.index_add_(1, ids_T, values_NT)


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the ranks of a group, in place; None is one rank."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def max_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Maximum over the ranks of a group, in place; None is one rank."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def gather_over(
    values_NT: torch.Tensor, ids_T: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of per-token values and the tokens' sequences, of all ranks of a group, end to end in the order of
    the ranks; None is one rank. Every rank has the same sequences."""
    if group is None or (size := dist.get_world_size(group)) == 1:
        return values_NT, ids_T
    longest = max_over(torch.tensor(ids_T.shape[0], device=ids_T.device), group)
    padding = int(longest) - ids_T.shape[0]
    values_NT = torch.nn.functional.pad(values_NT, (0, padding))
    ids_T = torch.nn.functional.pad(ids_T, (0, padding), value=-1)
    values, ids = (
        [torch.empty_like(mine) for _ in range(size)] for mine in (values_NT.contiguous(), ids_T.contiguous())
    )
    dist.all_gather(values, values_NT.contiguous(), group=group)
    dist.all_gather(ids, ids_T.contiguous(), group=group)
    all_ids = torch.cat(ids)
    real = all_ids >= 0
    return torch.cat(values, dim=1)[:, real], all_ids[real]
