"""Generalised advantage estimation (GAE, arXiv 1506.02438). Shape suffixes: T packed tokens, S sequences,
L counted tokens of the longest sequence."""

from __future__ import annotations

import torch

from megatron_dgpo.algorithms.segments import segment_ids


@torch.no_grad()
def generalized_advantages(
    values_T: torch.Tensor,
    rewards_S: torch.Tensor,
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), (T,) float64 each, 0 outside loss_mask (T,) bool.

    A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t (section 3 there), over a response's
    counted tokens: V_t is the value of what comes before token t, the response's reward comes with its last
    token, and nothing after it (also where it was cut). The return is A_t + V_t.
    """
    mask_T = loss_mask_T.bool()
    ids_T = segment_ids(cu_seqlens, values_T.shape[0])[mask_T]
    counts_S = torch.bincount(ids_T, minlength=rewards_S.shape[0])
    longest = int(counts_S.max()) if len(ids_T) else 0
    firsts_S = counts_S.cumsum(0) - counts_S
    # Every response against the right edge: the steps from the end then go over all of them at once.
    columns = torch.arange(len(ids_T), device=ids_T.device) - firsts_S[ids_T] + longest - counts_S[ids_T]
    values_SL = values_T.new_zeros((len(counts_S), longest), dtype=torch.float64)
    values_SL[ids_T, columns] = values_T[mask_T].double()
    advantages_SL = torch.zeros_like(values_SL)
    reward = rewards_S.double()
    later, following = torch.zeros_like(reward), torch.zeros_like(reward)
    for t in range(longest - 1, -1, -1):
        delta = reward + gamma * following - values_SL[:, t]
        later = advantages_SL[:, t] = delta + gamma * lam * later
        reward, following = torch.zeros_like(reward), values_SL[:, t]
    advantages_T, returns_T = (torch.zeros_like(values_T, dtype=torch.float64) for _ in range(2))
    advantages_T[mask_T] = advantages_SL[ids_T, columns]
    returns_T[mask_T] = advantages_T[mask_T] + values_T[mask_T].double()
    return advantages_T, returns_T


def clipped_value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """(T,) half of the larger of (V - R)^2 and (clip(V, V_old - clip, V_old + clip) - R)^2.

    A value gains nothing by moving further than `clip` in one rollout batch (value clipping of PPO's first
    implementation; section 3 of arXiv 2005.12729). 0 turns the clip off.
    """
    error_T = (values_T - returns_T).square()
    if clip:
        near_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
        error_T = torch.maximum(error_T, (near_T - returns_T).square())
    return 0.5 * error_T
