"""GRPO (arXiv 2402.03300): one advantage for all tokens of a response."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.base import Algorithm, ClippedSettings, Metrics, feature, masked_mean, only
from megatron_dgpo.algorithms.surrogate import k3_kl
from megatron_dgpo.types import PackedBatch, TokenStats


class GrpoSettings(ClippedSettings, Protocol):
    kl_coef: float


class Grpo(Algorithm):
    """Clipped surrogate with, for kl_coef > 0, a penalty kl_coef * k3 towards the reference (Eq. 3 and 4,
    arXiv 2402.03300)."""

    def __init__(
        self, config: GrpoSettings, *, vocab_size: int, cp_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(config, vocab_size=vocab_size, cp_group=cp_group)
        if not config.kl_coef >= 0:
            raise ValueError(f"kl_coef={config.kl_coef}: must be at least 0")
        self.config = config

    @property
    def needs_reference(self) -> bool:
        return self.config.kl_coef > 0

    def loss(self, stats: TokenStats, batch: PackedBatch) -> tuple[torch.Tensor, Metrics]:
        log_probs_T, objective_T, coefficients_T, metrics = self._surrogate(stats, batch)
        loss = -(coefficients_T * objective_T).sum()
        if self.needs_reference:
            reference_T = only(feature(batch, "reference_log_probs"), batch.loss_mask_T)
            kl_T = k3_kl(log_probs_T, reference_T)
            loss = loss + self.config.kl_coef * (coefficients_T * kl_T).sum()
            metrics["kl_penalty"] = masked_mean(kl_T, batch.loss_mask_T)
        return loss, metrics
