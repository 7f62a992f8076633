"""What a rank says about its vocabulary shard, and how the ranks' words are merged.

Shape suffixes: T packed tokens (C a chunk of them), K local vocabulary shard, R tensor-parallel ranks.

Each rank reduces its logits to a few numbers a token; one all-gather brings them together, and
every rank merges the same bits, so the results are equal on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOOR = -1.0e30
"""Stands for minus infinity where a product with 0 has to be 0: exp(FLOOR) is 0, 0 * FLOOR is 0."""

POLICY_ROWS = 4
PAIR_ROWS = 9


class Merged(NamedTuple):
    """Per-token numbers over the full vocabulary, each (T,)."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
    """max_a z(a), for the backward pass."""
    log_partition: torch.Tensor
    """log sum_a exp(z(a) - peak)."""
    hellinger: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    reverse_kl: torch.Tensor | None = None


def _shifted(z_CK: torch.Tensor, owned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(peak of each row, z - peak), with FLOOR for masked (-inf) columns; with `owned`, in place."""
    peak_C = z_CK.amax(-1).clamp_(min=FLOOR)
    shift_C1 = peak_C.unsqueeze(-1)
    return peak_C, (z_CK.sub_(shift_C1) if owned else z_CK - shift_C1).clamp_(min=FLOOR)


def _picked(z_CK: torch.Tensor, columns_C: torch.Tensor) -> torch.Tensor:
    """z at the target column where this shard holds it, else 0."""
    width = z_CK.shape[-1]
    held_C = (columns_C >= 0) & (columns_C < width)
    z_C = z_CK.gather(1, columns_C.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
    return torch.where(held_C, z_C, torch.zeros_like(z_C))


def padding_rows(z_CK: torch.Tensor, has_reference: bool, dtype: torch.dtype) -> torch.Tensor:
    """What `reduce_shard` says of a shard of padding only."""
    rows = z_CK.new_zeros(PAIR_ROWS if has_reference else POLICY_ROWS, z_CK.shape[0], dtype=dtype)
    rows[0] = FLOOR
    if has_reference:
        rows[4] = FLOOR
    return rows


def reduce_shard(
    z_CK: torch.Tensor,
    columns_C: torch.Tensor,
    reference_CK: torch.Tensor | None = None,
    *,
    owned: bool = False,
) -> torch.Tensor:
    """A shard's contribution, (4, C), or (9, C) with a reference.

    `z_CK` holds logits over the temperature in float32 or float64, padding already cut off;
    `columns_C` the targets as local columns (out of range: another rank holds the target). With
    `owned`, both logits are overwritten, and two more tensors of their size exist at a time; else four.

    Rows: peak m, partition sum S = sum e^(z-m), entropy numerator U = sum e^(z-m) (z-m), target
    logit; then for the reference m', S', target logit; the squared Hellinger distance d between
    the two distributions *conditional on the shard*; D = sum e^(z-m) ((z-m) - (z'-m')).
    """
    if z_CK.shape[-1] == 0:
        return padding_rows(z_CK, reference_CK is not None, z_CK.dtype)
    target = _picked(z_CK, columns_C)
    peak, shifted = _shifted(z_CK, owned)
    e = shifted.exp()
    total = e.sum(-1)
    if reference_CK is None:
        return torch.stack([peak, total, e.mul_(shifted).sum(-1), target])

    # The policy's numbers have the same bits with and without a reference.
    numerator = (e * shifted).sum(-1)
    reference_target = _picked(reference_CK, columns_C)
    reference_peak, reference_shifted = _shifted(reference_CK, owned)
    root = e.sqrt()
    difference = e.mul_(shifted.sub_(reference_shifted)).sum(-1)
    reference_root = reference_shifted.exp_()
    reference_total = reference_root.sum(-1)
    reference_root.sqrt_()
    # A shard that is masked as a whole has total 0; any other has total >= 1.
    root.mul_(total.clamp(min=1.0).rsqrt().unsqueeze(-1))
    reference_root.mul_(reference_total.clamp(min=1.0).rsqrt().unsqueeze(-1))
    distance = root.sub_(reference_root).square_().sum(-1).mul_(0.5)
    return torch.stack(
        [
            peak,
            total,
            numerator,
            target,
            reference_peak,
            reference_total,
            reference_target,
            distance,
            difference,
        ]
    )


def merge_shards(rows_RNT: torch.Tensor) -> Merged:
    """Merge what `reduce_shard` returned on each rank: (R, 4 or 9, T).

    With shard masses alpha_r, beta_r under policy and reference and shard-conditional distances d_r,

        1 - sum_a sqrt(p(a) q(a)) = 1/2 sum_r (sqrt alpha_r - sqrt beta_r)^2 + sum_r sqrt(alpha_r beta_r) d_r

    (the squared Hellinger distance of Eq. 2, arXiv 2605.03327, by the chain rule over shards): no
    term is negative, and each is exactly 0 where the logits are equal. The entropy in nats is
    log S - sum_r e^(m_r - M) (U_r + (m_r - M) S_r) / S, again a sum of non-negative terms.
    """
    peak_R, total_R, numerator_R, target_R = rows_RNT[:, :POLICY_ROWS].unbind(1)
    peak = peak_R.amax(0)
    scale_R = (peak_R - peak).exp()
    mass_R = scale_R * total_R
    total = mass_R.sum(0)
    log_partition = total.log()
    log_probs = (target_R.sum(0) - peak) - log_partition
    entropy = log_partition - (scale_R * (numerator_R + (peak_R - peak) * total_R)).sum(0) / total
    if rows_RNT.shape[1] == POLICY_ROWS:
        return Merged(log_probs, entropy, peak, log_partition)

    q_peak_R, q_total_R, q_target_R, distance_R, difference_R = rows_RNT[:, POLICY_ROWS:].unbind(1)
    q_peak = q_peak_R.amax(0)
    q_mass_R = (q_peak_R - q_peak).exp() * q_total_R
    q_total = q_mass_R.sum(0)
    q_log_partition = q_total.log()
    alpha_R = mass_R / total
    root_R, q_root_R = alpha_R.sqrt(), (q_mass_R / q_total).sqrt()
    hellinger = 0.5 * (root_R - q_root_R).square().sum(0) + (root_R * q_root_R * distance_R).sum(0)
    log_ratio_R = difference_R / total_R.clamp(min=1.0) + (peak_R - q_peak_R)
    reverse_kl = (alpha_R * log_ratio_R).sum(0) - (peak - q_peak) - (log_partition - q_log_partition)
    return Merged(
        log_probs,
        entropy,
        peak,
        log_partition,
        hellinger.clamp_(max=1.0),
        (q_target_R.sum(0) - q_peak) - q_log_partition,
        reverse_kl.clamp_(min=0.0),
    )


def logits_gradient(
    z_CK: torch.Tensor,
    columns_C: torch.Tensor,
    peak_C: torch.Tensor,
    log_partition_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_log_probs_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient with respect to z (C, K), which is consumed.

    d log p(y) / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H).
    """
    width = z_CK.shape[-1]
    if width == 0:
        return z_CK
    # Two subtractions: peak + log_partition would round away what log_partition adds.
    log_p = z_CK.sub_(peak_C.unsqueeze(-1)).sub_(log_partition_C.unsqueeze(-1)).clamp_(min=FLOOR)
    p = log_p.exp()
    if grad_entropy_C is None:
        grad = p.mul_(-grad_log_probs_C.unsqueeze(-1))
    else:
        slope = log_p.add_(entropy_C.unsqueeze(-1)).mul_(grad_entropy_C.unsqueeze(-1))
        grad = p.mul_(slope.add_(grad_log_probs_C.unsqueeze(-1)).neg_())
    held_C = (columns_C >= 0) & (columns_C < width)
    at_target = torch.where(held_C, grad_log_probs_C, torch.zeros_like(grad_log_probs_C))
    return grad.scatter_add_(1, columns_C.clamp(0, width - 1).unsqueeze(1), at_target.unsqueeze(1))
