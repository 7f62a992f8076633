"""The policy-gradient surrogate: ratio, clip, aggregation, KL penalty. Pure functions of tensors.

Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.segments import segment_ids, segment_sums, sum_over

AGGREGATIONS = ("sequence_mean", "token_mean")


def policy_ratio(log_probs_T: torch.Tensor, old_log_probs_T: torch.Tensor) -> torch.Tensor:
    """rho = pi / pi_old of each token (Eq. 7, arXiv 2605.03327); greater than 0, 1 on policy."""
    return torch.exp(log_probs_T - old_log_probs_T)


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
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Each token's share of the mini-batch's loss, (T,) float32, 0 outside loss_mask (T,) bool.

    "sequence_mean" (Eq. 7): 1 / (num_sequences T_i), with T_i the counted tokens of the sequence;
    "token_mean": 1 / num_tokens. Both numbers are of the whole mini-batch over all ranks, fixed before
    the backward pass, so its split into micro-batches and ranks does not matter. cp_group: each
    sequence's tokens are spread over these ranks. Raises ValueError for an unknown mode or a count < 1.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation={mode!r}: choose one of {', '.join(AGGREGATIONS)}")
    count, name = (num_sequences, "num_sequences") if mode == "sequence_mean" else (num_tokens, "num_tokens")
    if count < 1:
        raise ValueError(f"{name}={count}: must be at least 1, counted over the whole mini-batch")
    mask_T = loss_mask.bool()
    if mode == "token_mean":
        return mask_T.double().div_(num_tokens).float()
    ids_T = segment_ids(cu_seqlens, mask_T.shape[0])
    counts = segment_sums(mask_T.double().unsqueeze(0), ids_T, cu_seqlens.shape[0] - 1)
    counts_S = sum_over(counts, cp_group)[0].clamp(min=1.0)
    return (mask_T.double() / (num_sequences * counts_S[ids_T])).float()
