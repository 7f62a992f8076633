"""How far credit departs from uniform: what a micro-batch's weights say of its responses.

Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.batch import Metrics
from megatron_dgpo.algorithms.credit import effective_fraction
from megatron_dgpo.algorithms.segments import gather_over, segment_ids, segment_sums
from megatron_dgpo.types import PackedBatch

_INFINITY_BITS = 0x7F800000
"""Of float32. The bit patterns of numbers that are at least 0 order as the numbers do."""


@torch.no_grad()
def credit_spread(
    weights_T: torch.Tensor, batch: PackedBatch, cp_group: dist.ProcessGroup | None = None
) -> Metrics:
    """(sum, count) of each, over the responses that have counted tokens, or over these tokens:

    - credit_weight_variance: (w - 1)^2, a mean over tokens. The mean of w over a response is 1, so its
      square root is their standard deviation.
    - credit_effective_fraction: (sum w)^2 / (T_i sum w^2) of a response.
    - credit_weight_max: the greatest w of a response.
    - credit_top1_share, credit_top10_share: the part of a response's weights that its heaviest
      ceil(T_i / 100) and ceil(T_i / 10) tokens have.
    - credit_position_correlation: Pearson's, of a response's weights with the places of their tokens, over
      the responses of which it exists: with two tokens or more, and weights that are not all equal.
    - ..._right, ..._wrong: the fraction and the top 10% of responses with an advantage above and below 0
      (PPO, which has rewards there: a reward above and below 0). An advantage of 0 is neither.

    weights_T: float32, 0 outside the loss mask. cp_group: each sequence's tokens are spread over these
    ranks; one gather joins them, and all ranks return the same.
    """
    ids_T = segment_ids(batch.cu_seqlens, batch.num_tokens)
    rows = torch.stack([weights_T.double(), batch.positions_T.double(), batch.loss_mask_T.double()])
    rows, ids_T = gather_over(rows, ids_T, cp_group)
    w_T, position_T, one_T = rows.unbind(0)
    num_sequences = batch.num_sequences
    sums = segment_sums(torch.stack([w_T * one_T, w_T.square() * one_T, one_T]), ids_T, num_sequences)
    total_S, square_S, count_S = sums.unbind(0)
    counted_S = count_S > 0
    sorted_T, ids_sorted_T = _heaviest_first(w_T * one_T, ids_T)
    fraction_S = effective_fraction(total_S, square_S, count_S)
    greatest_S = w_T.new_zeros(num_sequences).scatter_reduce_(0, ids_T, w_T * one_T, "amax")
    top10_S = _top_share(sorted_T, ids_sorted_T, count_S, total_S, 10)
    correlation_S, exists_S = _correlation(w_T, position_T, one_T, ids_T, sums)
    metrics: Metrics = {
        "credit_weight_variance": ((w_T - 1.0).square().mul(one_T).sum(), one_T.sum()),
        "credit_effective_fraction": _mean(fraction_S, counted_S),
        "credit_weight_max": _mean(greatest_S, counted_S),
        "credit_top1_share": _mean(_top_share(sorted_T, ids_sorted_T, count_S, total_S, 100), counted_S),
        "credit_top10_share": _mean(top10_S, counted_S),
        "credit_position_correlation": _mean(correlation_S, exists_S),
    }
    for side, on_S in (("right", batch.advantages_S > 0), ("wrong", batch.advantages_S < 0)):
        metrics[f"credit_effective_fraction_{side}"] = _mean(fraction_S, counted_S & on_S)
        metrics[f"credit_top10_share_{side}"] = _mean(top10_S, counted_S & on_S)
    return metrics


def _mean(values_S: torch.Tensor, on_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(on_S, values_S, torch.zeros_like(values_S)).sum(), on_S.sum()


def _heaviest_first(w_T: torch.Tensor, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and sequences of the tokens by sequence, in each from the greatest weight down; one sort."""
    bits_T = w_T.float().view(torch.int32).long().clamp(0, _INFINITY_BITS)
    order_T = ((ids_T << 32) | (_INFINITY_BITS - bits_T)).argsort()
    return w_T[order_T], ids_T[order_T]


def _top_share(
    sorted_T: torch.Tensor, ids_T: torch.Tensor, count_S: torch.Tensor, total_S: torch.Tensor, parts: int
) -> torch.Tensor:
    """(S,) share of the total that the heaviest ceil(count / parts) tokens have, in (0, 1]."""
    lengths_S = segment_sums(torch.ones_like(sorted_T).unsqueeze(0), ids_T, count_S.shape[0])[0].long()
    starts_S = lengths_S.cumsum(0) - lengths_S
    place_T = torch.arange(ids_T.shape[0], device=ids_T.device) - starts_S[ids_T]
    most_S = (count_S.long() + parts - 1) // parts
    top_T = torch.where(place_T < most_S[ids_T], sorted_T, torch.zeros_like(sorted_T))
    return segment_sums(top_T.unsqueeze(0), ids_T, count_S.shape[0])[0] / total_S


def _correlation(
    w_T: torch.Tensor, position_T: torch.Tensor, one_T: torch.Tensor, ids_T: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) Pearson's correlation of weight and position, and (S,) bool: where it exists."""
    total_S, _, count_S = sums.unbind(0)
    n = count_S.shape[0]
    position_S = segment_sums((position_T * one_T).unsqueeze(0), ids_T, n)[0]
    dw_T = (w_T - (total_S / count_S)[ids_T]) * one_T
    dp_T = (position_T - (position_S / count_S)[ids_T]) * one_T
    products = segment_sums(torch.stack([dw_T * dp_T, dw_T.square(), dp_T.square()]), ids_T, n)
    covariance_S, w_variance_S, p_variance_S = products.unbind(0)
    # float32 weights add up without rounding in float64, so that equal ones have exactly no variance.
    exists_S = (count_S > 1) & (w_variance_S > 0)
    return covariance_S / (w_variance_S * p_variance_S).sqrt(), exists_S
