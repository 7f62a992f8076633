"""The policy-gradient surrogate: ratio, clip, aggregation, KL penalty. Pure functions of tensors.

Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.segments import segment_ids, segment_sums, sum_over

AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum", "fixed_length")


def policy_ratio(log_probs_T: torch.Tensor, old_log_probs_T: torch.Tensor) -> torch.Tensor:
    """rho = pi / pi_old of each token (Eq. 7, arXiv 2605.03327); greater than 0, 1 on policy."""
    return torch.exp(log_probs_T - old_log_probs_T)


def sequence_ratio(
    log_probs_T: torch.Tensor,
    old_log_probs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """(T,) at every counted token the length-normalised ratio of its sequence, exp(mean_t log rho_t) (GSPO,
    Eq. 7, arXiv 2507.18071), 1 elsewhere.

    Its gradient goes to each token's own log-prob (GSPO-token, Eq. 14 there): with a mean over the
    sequence's tokens after it, the gradient of the sequence's ratio comes out.
    """
    difference_T = torch.where(
        loss_mask_T, (log_probs_T - old_log_probs_T).detach(), torch.zeros_like(log_probs_T)
    )
    means_S = sequence_means(difference_T, loss_mask_T, cu_seqlens, cp_group)
    ids_T = segment_ids(cu_seqlens, log_probs_T.shape[0])
    return torch.exp(means_S[ids_T].to(log_probs_T.dtype) + log_probs_T - log_probs_T.detach())


def sequence_means(
    values_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """(S,) float64 means over each sequence's counted tokens, 0 where it has none."""
    ids_T = segment_ids(cu_seqlens, values_T.shape[0])
    mask_T = loss_mask_T.double()
    rows = torch.stack([values_T.double() * mask_T, mask_T])
    sums_S, counts_S = sum_over(segment_sums(rows, ids_T, cu_seqlens.shape[0] - 1), cp_group).unbind(0)
    return sums_S / counts_S.clamp(min=1.0)


def clipped_surrogate(
    ratio_T: torch.Tensor, advantage_T: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A) of each token, to be maximised (PPO, arXiv 1707.06347;
    Eq. 7 has low = high; DAPO, arXiv 2503.14476, has high > low)."""
    clipped_T = ratio_T.clamp(1.0 - low, 1.0 + high)
    return torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)


@torch.no_grad()
def truncated_importance_weights(
    old_log_probs_T: torch.Tensor, engine_log_probs_T: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(cap, pi_old / pi_engine) of each token, in (0, cap], and where the cap was met (bool).

    The samples come from pi_engine, which is not the trainer's pi_old: the engine's kernels and
    precision differ, and its weights may be older. Weighing each token's term of the surrogate by the
    ratio corrects its expectation; the cap bounds the variance at the price of a bias (Ionides,
    "Truncated importance sampling", 2008; between engine and trainer: Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025). Carries no gradient.

    Both are at the sampling temperature and before top-k, top-p and min-p. So with filters on, the
    weight corrects for engine and weights alone, and not for the filters: a token that passed them was
    drawn with its probability over the mass that passed (at least top_p), and is taken as if it had
    been drawn from the unfiltered policy.
    """
    ratio_T = torch.exp(old_log_probs_T - engine_log_probs_T)
    return ratio_T.clamp(max=cap), ratio_T > cap


@torch.no_grad()
def sequence_mask(
    old_log_probs_T: torch.Tensor,
    engine_log_probs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cap: float,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """(T,) bool: the tokens of sequences whose geometric mean of pi_old / pi_engine is in [1 / cap, cap].

    Sequences that engine and trainer see too differently teach nothing (masked importance sampling at the
    level of the sequence; Liu et al., "When speed kills stability", 2025).
    """
    means_S = sequence_means(old_log_probs_T - engine_log_probs_T, loss_mask_T, cu_seqlens, cp_group)
    kept_S = means_S.abs() <= math.log(cap)
    return kept_S[segment_ids(cu_seqlens, loss_mask_T.shape[0])]


def k3_kl(log_probs_T: torch.Tensor, reference_log_probs_T: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p) at tokens drawn from p: an unbiased estimate of KL(p || q) in nats that is never
    negative (GRPO, Eq. 4, arXiv 2402.03300). p = exp(log_probs), q = exp(reference_log_probs)."""
    log_ratio_T = reference_log_probs_T - log_probs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


@torch.no_grad()
def token_coefficients(
    cu_seqlens: torch.Tensor,
    loss_mask: torch.Tensor,
    mode: str,
    *,
    num_sequences: int,
    num_tokens: int,
    max_response_tokens: int = 0,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Each token's share of the mini-batch's loss, (T,) float32, 0 outside loss_mask (T,) bool.

    "sequence_mean" (Eq. 7): 1 / (num_sequences T_i), with T_i the counted tokens of the sequence;
    "token_mean" (DAPO, Eq. 8, arXiv 2503.14476): 1 / num_tokens; "sequence_sum": 1 / num_sequences;
    "fixed_length" (Dr. GRPO, arXiv 2503.20783): 1 / (num_sequences max_response_tokens). The counts are of
    the whole mini-batch over all ranks, fixed before the backward pass, so its split into micro-batches and
    ranks does not matter. cp_group: each sequence's tokens are spread over these ranks. Raises ValueError for
    an unknown mode or a count < 1.
    """
    counts = {
        "sequence_mean": {"num_sequences": num_sequences},
        "token_mean": {"num_tokens": num_tokens},
        "sequence_sum": {"num_sequences": num_sequences},
        "fixed_length": {"num_sequences": num_sequences, "max_response_tokens": max_response_tokens},
    }
    if mode not in counts:
        raise ValueError(f"aggregation={mode!r}: choose one of {', '.join(AGGREGATIONS)}")
    for name, count in counts[mode].items():
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1, counted over the whole mini-batch")
    mask_T = loss_mask.bool()
    if mode != "sequence_mean":
        return mask_T.double().div_(math.prod(counts[mode].values())).float()
    ids_T = segment_ids(cu_seqlens, mask_T.shape[0])
    lengths = segment_sums(mask_T.double().unsqueeze(0), ids_T, cu_seqlens.shape[0] - 1)
    lengths_S = sum_over(lengths, cp_group)[0].clamp(min=1.0)
    return (mask_T.double() / (num_sequences * lengths_S[ids_T])).float()
