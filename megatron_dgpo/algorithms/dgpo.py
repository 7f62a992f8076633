"""DGPO (arXiv 2605.03327): a response's advantage goes to the tokens where the policy has moved away
from the reference and is still undecided."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.base import Algorithm, ClippedSettings, Metrics, feature, masked_mean
from megatron_dgpo.algorithms.credit import credit_weights, effective_fraction
from megatron_dgpo.algorithms.segments import segment_ids, segment_sums, sum_over
from megatron_dgpo.types import CreditWeights, PackedBatch, TokenStats

DISTANCES = ("hellinger", "reverse_kl")
CREDIT_TIMINGS = ("rollout", "update")


class DgpoSettings(ClippedSettings, Protocol):
    tau: float
    kappa: float
    entropy_normalization: str
    distance: str
    credit_timing: str


class Dgpo(Algorithm):
    """The clipped surrogate of Eq. 7 with each token's advantage A_i w_{i,t}; no KL term.

    The paper leaves open when the weights are taken. credit_timing "rollout": once per rollout batch,
    under pi_old; "update": under the current policy at each update, without gradient.
    """

    def __init__(
        self, config: DgpoSettings, *, vocab_size: int, cp_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(config, vocab_size=vocab_size, cp_group=cp_group)
        for name, value, choices in (
            ("distance", config.distance, DISTANCES),
            ("credit_timing", config.credit_timing, CREDIT_TIMINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
        self.config = config

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def update_needs_reference(self) -> bool:
        return self.config.credit_timing == "update"

    def credit(self, stats: TokenStats, batch: PackedBatch) -> CreditWeights:
        """Weights of the batch's tokens under the policy that `stats` describes (Eq. 6)."""
        distance_T = stats.hellinger if self.config.distance == "hellinger" else stats.reverse_kl
        if distance_T is None:
            raise ValueError(
                f"credit_timing={self.config.credit_timing!r} needs the reference's statistics in every pass"
            )
        return credit_weights(
            distance_T,
            stats.entropy.detach(),
            batch.cu_seqlens,
            vocab_size=self.vocab_size,
            tau=self.config.tau,
            kappa=self.config.kappa,
            entropy_normalization=self.config.entropy_normalization,
            loss_mask=batch.loss_mask_T,
            cp_group=self.cp_group,
        )

    def rollout_features(self, stats: TokenStats, batch: PackedBatch) -> dict[str, torch.Tensor]:
        features = super().rollout_features(stats, batch)
        if self.config.credit_timing == "rollout":
            features["credit_weights"] = self.credit(stats, batch).weights
        return features

    def loss(self, stats: TokenStats, batch: PackedBatch) -> tuple[torch.Tensor, Metrics]:
        _, objective_T, coefficients_T, metrics = self._surrogate(stats, batch)
        if self.config.credit_timing == "rollout":
            weights_T = feature(batch, "credit_weights")
        else:
            weights_T = self.credit(stats, batch).weights
        # w > 0, so w min(rho A, clip(rho) A) is the min of Eq. 7 with A w in place of A.
        loss = -(coefficients_T * (weights_T * objective_T)).sum()
        metrics.update(self._credit_metrics(weights_T, batch))
        return loss, metrics

    @torch.no_grad()
    def _credit_metrics(self, weights_T: torch.Tensor, batch: PackedBatch) -> Metrics:
        """The spread of w. Its mean over a response is 1, so the square root of
        credit_weight_variance is its standard deviation."""
        w_T, mask_T = weights_T.double(), batch.loss_mask_T
        ids_T = segment_ids(batch.cu_seqlens, batch.num_tokens)
        rows = torch.stack([w_T, w_T.square(), mask_T.double()])
        sums = sum_over(segment_sums(rows, ids_T, batch.num_sequences), self.cp_group)
        counted_S = sums[2] > 0
        fraction_S = effective_fraction(*sums.unbind(0))
        return {
            "credit_weight_variance": masked_mean((w_T - 1.0).square(), mask_T),
            "credit_effective_fraction": (fraction_S[counted_S].sum(), counted_S.sum()),
        }
