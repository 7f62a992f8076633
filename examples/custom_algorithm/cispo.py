"""An algorithm of your own: one class, named in the config by its import path.

CISPO (MiniMax-M1, arXiv 2506.13585) clips the importance ratio instead of the objective: every token keeps a
gradient, weighed by the clipped ratio, which carries none itself.
"""

from __future__ import annotations

import torch

from megatron_dgpo.algorithms.base import Algorithm, Tokens


class Cispo(Algorithm):
    """sg(min(rho, cap)) A log pi of each token (Eq. 4 and 5 there, without a lower bound)."""

    def __init__(self, config, **world) -> None:
        super().__init__(config, **world)
        self._cap = config.options.get("ratio_cap", 3.0)
        if not self._cap >= 1:
            raise ValueError(f"options.ratio_cap: {self._cap} must be at least 1")

    def objective(self, tokens: Tokens, ratio_T: torch.Tensor) -> torch.Tensor:
        return ratio_T.detach().clamp(max=self._cap) * tokens.advantage_T * tokens.log_probs_T
