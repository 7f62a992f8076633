"""The truth that the fast implementations are measured against.

Shape suffixes: T packed tokens, V vocabulary, K local vocabulary shard, H hidden size.

Gathers the whole vocabulary, computes in the inputs' precision (float64 stays float64; half
becomes float32) and leaves every gradient to autograd. For tests and small models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dgpo.ops.driver import Plan
from megatron_dgpo.types import TokenStats


class _Gather(torch.autograd.Function):
    """Shards end to end along a dimension; backward keeps this rank's slice of the gradient.

    Right where every rank goes on to compute the same loss from the whole.
    """

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.rank, ctx.length = dim, dist.get_rank(group), shard.shape[dim]
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return torch.cat(shards, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.narrow(ctx.dim, ctx.rank * ctx.length, ctx.length), None, None


def _whole(shard: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    return shard if group is None else _Gather.apply(shard, dim, group)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _stats(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    reference_TV: torch.Tensor | None,
    temperature: float,
    entropy_grad: bool,
) -> TokenStats:
    log_p = torch.log_softmax(logits_TV / temperature, dim=-1)
    p = log_p.exp()
    # A masked column has log p = -inf and adds nothing.
    entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    stats = TokenStats(
        log_probs=log_p.gather(1, targets_T[:, None])[:, 0],
        entropy=entropy if entropy_grad else entropy.detach(),
    )
    if reference_TV is not None:
        with torch.no_grad():
            log_q = torch.log_softmax(reference_TV / temperature, dim=-1)
            stats.hellinger = 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)
            stats.hellinger = stats.hellinger.clamp(max=1.0)
            stats.reference_log_probs = log_q.gather(1, targets_T[:, None])[:, 0]
            terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
            stats.reverse_kl = terms.sum(-1).clamp(min=0.0)
    return stats


def token_stats(
    logits_TK: torch.Tensor,
    targets_T: torch.Tensor,
    reference_TK: torch.Tensor | None,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
    entropy_grad: bool,
) -> TokenStats:
    logits_TV = _whole(_wide(logits_TK), 1, group)[:, :vocab_size]
    reference_TV = None
    if reference_TK is not None:
        reference_TV = _whole(_wide(reference_TK.detach()), 1, group)[:, :vocab_size]
    return _stats(logits_TV, targets_T, reference_TV, temperature, entropy_grad)


def linear_token_stats(
    hidden: torch.Tensor,
    weight_KH: torch.Tensor,
    targets_T: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight_KH: torch.Tensor | None,
    rows_R: torch.Tensor | None,
    plan: Plan,
    vocab_size: int,
) -> TokenStats:
    def logits(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if plan.sequence_parallel and rows.shape[0] != targets_T.shape[0]:
            rows = _whole(rows, 0, plan.group)
        rows = rows if rows_R is None else rows[rows_R]
        with torch.autocast(rows.device.type, enabled=False):
            return _wide(rows) @ _whole(_wide(weight), 0, plan.group)[:vocab_size].t()

    reference_TV = None
    if reference_hidden is not None and reference_weight_KH is not None:
        reference_TV = logits(reference_hidden.detach(), reference_weight_KH.detach())
    targets_R = targets_T if rows_R is None else targets_T[rows_R]
    logits_RV = logits(hidden, weight_KH)
    return _stats(logits_RV, targets_R, reference_TV, plan.temperature, plan.entropy_grad)
