"""Distribution-guided credit: how a response's advantage is spread over its tokens
(section 4, arXiv 2605.03327).

Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.segments import max_over, segment_ids, segment_sums, sum_over
from megatron_dgpo.types import CreditWeights

ENTROPY_NORMALIZATIONS = ("log_vocab", "none")


def check_credit(vocab_size: int, tau: float, kappa: float, entropy_normalization: str) -> None:
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau={tau}: must be a finite number greater than 0")
    if not (kappa >= 0 and math.isfinite(kappa)):
        raise ValueError(f"kappa={kappa}: must be a finite number, at least 0")
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size}: must be at least 2")
    if entropy_normalization not in ENTROPY_NORMALIZATIONS:
        raise ValueError(
            f"entropy_normalization={entropy_normalization!r}: "
            f"choose one of {', '.join(ENTROPY_NORMALIZATIONS)}"
        )


def normalized_entropy(entropy_T: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Entropy in nats over ln V: in [0, 1]."""
    return (entropy_T / math.log(vocab_size)).clamp(0.0, 1.0)


def effective_fraction(
    sums_S: torch.Tensor, square_sums_S: torch.Tensor, counts_S: torch.Tensor
) -> torch.Tensor:
    """(sum w)^2 / (T_i sum w^2), in (0, 1]; 1 is uniform credit, and is also given to a sequence without
    counted tokens. Any multiple of w gives the same."""
    fraction = sums_S.square() / (counts_S * square_sums_S)
    return torch.where(counts_S > 0, fraction, torch.ones_like(fraction)).clamp(max=1.0)


@torch.no_grad()
def credit_scores(
    distance: torch.Tensor,
    entropy: torch.Tensor,
    *,
    vocab_size: int,
    kappa: float,
    entropy_normalization: str = "log_vocab",
) -> torch.Tensor:
    """s = d Hn^kappa of each token (section 4.4), (T,) float64.

    distance (T,): squared Hellinger distance to the reference (Eq. 2), in [0, 1]; for the ablation the
    reverse KL divergence in nats takes its place (any finite number may). entropy (T,): nats; Hn is it over
    ln V, or itself with entropy_normalization "none". kappa = 0 turns the gate off (0^0 = 1).
    """
    # float64 for a few numbers a token: sums over long responses keep the mean of the weights at 1.
    gate_T = entropy.double().clamp(min=0.0)
    if entropy_normalization == "log_vocab":
        gate_T = normalized_entropy(gate_T, vocab_size)
    return distance.double() * gate_T.pow(kappa)


@torch.no_grad()
def spread_credit(
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    tau: float,
    loss_mask: torch.Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> CreditWeights:
    """w_{i,t} = T_i softmax_t(s_{i,t} / tau) of scores (T,) float64 (Eq. 6).

    loss_mask (T,) bool: tokens outside get weight 0 and are not counted in T_i; None counts all. cp_group:
    each sequence's tokens are spread over these ranks (same sequences on each), joined by two all-reduces of
    numbers per sequence.

    The mean of w over the counted tokens of a response is 1, and w is exactly 1 where all of its scores
    are equal.
    """
    num_tokens, num_sequences = scores.shape[0], cu_seqlens.shape[0] - 1
    ids_T = segment_ids(cu_seqlens, num_tokens)
    mask_T = torch.ones_like(ids_T, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    scores_T = torch.where(mask_T, scores, torch.zeros_like(scores))
    logits_T = torch.where(mask_T, scores_T / tau, torch.full_like(scores_T, -torch.inf))
    peaks_S = logits_T.new_full((num_sequences,), -torch.inf)
    peaks_S = max_over(peaks_S.scatter_reduce_(0, ids_T, logits_T, "amax"), cp_group)
    e_T = torch.where(mask_T, (logits_T - peaks_S[ids_T]).exp(), torch.zeros_like(logits_T))
    rows = torch.stack([e_T, e_T.square(), mask_T.double()])
    sums_S, square_sums_S, counts_S = sum_over(segment_sums(rows, ids_T, num_sequences), cp_group).unbind(0)
    scale_S = torch.where(counts_S > 0, counts_S / sums_S, torch.zeros_like(sums_S))
    return CreditWeights(
        weights=(e_T * scale_S[ids_T]).float(),
        scores=scores_T.float(),
        effective_fraction=effective_fraction(sums_S, square_sums_S, counts_S).float(),
    )


def credit_weights(
    hellinger: torch.Tensor,
    entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    vocab_size: int,
    tau: float,
    kappa: float,
    entropy_normalization: str = "log_vocab",
    loss_mask: torch.Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> CreditWeights:
    """Scores of `credit_scores`, spread by `spread_credit`.

    Carries no gradient. Raises ValueError for settings out of range.
    """
    check_credit(vocab_size, tau, kappa, entropy_normalization)
    scores_T = credit_scores(
        hellinger, entropy, vocab_size=vocab_size, kappa=kappa, entropy_normalization=entropy_normalization
    )
    return spread_credit(scores_T, cu_seqlens, tau=tau, loss_mask=loss_mask, cp_group=cp_group)
