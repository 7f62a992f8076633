"""GRPO (arXiv 2402.03300): one advantage for all tokens of a response."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_dgpo.algorithms.base import Algorithm, Settings, Tokens
from megatron_dgpo.algorithms.batch import Metrics, feature, masked_mean, only
from megatron_dgpo.algorithms.surrogate import k3_kl


class GrpoSettings(Settings, Protocol):
    kl_coef: float


class Grpo(Algorithm):
    """Clipped surrogate with, for kl_coef > 0, a penalty kl_coef * k3 towards the reference (Eq. 3 and 4,
    arXiv 2402.03300).

    kl_coef is 0 by default, unlike the 0.04 there: beside DGPO, whose Eq. 7 has no such term, and DAPO, which
    leaves it out (section 2.3, arXiv 2503.14476), GRPO is to differ in credit alone.
    """

    def __init__(self, config: GrpoSettings, **world: Any) -> None:
        super().__init__(config, **world)
        if not config.kl_coef >= 0:
            raise ValueError(f"kl_coef={config.kl_coef}: must be at least 0")
        self._kl_coef = config.kl_coef

    @property
    def needs_reference(self) -> bool:
        return self._kl_coef > 0 or super().needs_reference

    def penalty(self, tokens: Tokens) -> tuple[torch.Tensor, Metrics] | None:
        if not self._kl_coef:
            return None
        reference_T = only(feature(tokens.batch, "reference_log_probs"), tokens.mask_T)
        kl_T = k3_kl(tokens.log_probs_T, reference_T)
        return self._kl_coef * kl_T, {"kl_penalty": masked_mean(kl_T, tokens.mask_T)}
