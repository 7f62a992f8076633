"""REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740)."""

from __future__ import annotations

import torch

from megatron_dgpo.algorithms.advantages import leave_one_out_advantages
from megatron_dgpo.algorithms.base import Algorithm, Tokens


class Reinforce(Algorithm):
    """(r_i - mean of the group's other rewards) log pi(y_i): no ratio and no clip, the sum over a response's
    tokens, the mean over responses.

    It is on policy with one mini-batch a step; with more, the later ones are off by the earlier updates.
    """

    def advantages(self, rewards: list[list[float | None]]) -> list[list[float | None]]:
        return leave_one_out_advantages(rewards)

    def objective(self, tokens: Tokens, ratio_T: torch.Tensor) -> torch.Tensor:
        return tokens.log_probs_T * tokens.advantage_T
