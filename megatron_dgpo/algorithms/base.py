"""What the trainer asks of an algorithm, and what group-relative algorithms share.

Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.advantages import group_advantages
from megatron_dgpo.algorithms.credit import normalized_entropy
from megatron_dgpo.algorithms.segments import segment_ids
from megatron_dgpo.algorithms.surrogate import (
    clipped_surrogate,
    k3_kl,
    policy_ratio,
    token_coefficients,
    truncated_importance_weights,
)
from megatron_dgpo.types import Group, PackedBatch, Sample, TokenStats

Metrics = dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]
"""name -> (sum, count): both add up over micro-batches and ranks; the metric is sum / count."""


class ClippedSettings(Protocol):
    """The settings that every clipped, group-relative algorithm has."""

    clip_low: float
    clip_high: float
    advantage_eps: float
    normalize_by_std: bool
    aggregation: str
    tis_cap: float


class Algorithm(ABC):
    """A group-relative policy-gradient algorithm with a clipped surrogate.

    cp_group: each packed sequence's tokens are spread over these ranks.
    """

    def __init__(
        self, config: ClippedSettings, *, vocab_size: int, cp_group: dist.ProcessGroup | None = None
    ) -> None:
        if config.tis_cap and not config.tis_cap >= 1:
            raise ValueError(f"tis_cap={config.tis_cap}: must be at least 1, or 0 to turn it off")
        self._clipping = config
        self.vocab_size = vocab_size
        self.cp_group = cp_group

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether the rollout pass has to have the reference's statistics."""

    @property
    def update_needs_reference(self) -> bool:
        """Whether every update pass has to have them too."""
        return False

    def rollout_features(self, stats: TokenStats, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Per-token tensors (T,) that are fixed once per rollout batch; they become batch.features.

        Raises ValueError where the reference's statistics are needed and missing.
        """
        features = {"old_log_probs": stats.log_probs.detach(), "entropy": stats.entropy.detach()}
        for name, values_T in (
            ("hellinger", stats.hellinger),
            ("kl_reference", stats.reverse_kl),
            ("reference_log_probs", stats.reference_log_probs),
        ):
            if values_T is not None:
                features[name] = values_T
            elif self.needs_reference:
                raise ValueError(f"{type(self).__name__} needs the reference's statistics: {name} is missing")
        return features

    @abstractmethod
    def loss(self, stats: TokenStats, batch: PackedBatch) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's part of the mini-batch's loss, to be minimised and summed over micro-batches
        and data-parallel ranks, and the metrics over its loss_mask tokens."""

    def assign_advantages(self, groups: list[Group]) -> None:
        """Set the advantage of every scored sample (Eq. 1, arXiv 2605.03327); failed ones get 0."""
        rewards = [[sample.reward for sample in group.samples] for group in groups]
        advantages = group_advantages(
            rewards, eps=self._clipping.advantage_eps, normalize_by_std=self._clipping.normalize_by_std
        )
        for group, row in zip(groups, advantages, strict=True):
            for sample, advantage in zip(group.samples, row, strict=True):
                sample.advantage = 0.0 if advantage is None else advantage

    def select(self, groups: list[Group]) -> list[Sample]:
        """The samples that train, in order: all whose reward did not fail."""
        return [s for group in groups for s in group.samples if s.reward is not None]

    def token_coefficients(self, batch: PackedBatch, num_sequences: int, num_tokens: int) -> torch.Tensor:
        """(T,) float32 for batch.coefficients_T, from counts of the whole mini-batch over all ranks."""
        return token_coefficients(
            batch.cu_seqlens,
            batch.loss_mask_T,
            self._clipping.aggregation,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            cp_group=self.cp_group,
        )

    def _surrogate(
        self, stats: TokenStats, batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Metrics]:
        """(log_probs_T, objective_T, coefficients_T, metrics): Eq. 7 before credit and sum, weighed by the
        truncated importance weights where tis_cap is set."""
        if batch.coefficients_T is None:
            raise ValueError("batch.coefficients_T is None: set it from token_coefficients before the loss")
        # Tokens that do not train stay out of exp(), where they could overflow to inf * 0.
        log_probs_T = only(stats.log_probs, batch.loss_mask_T)
        old_T = only(feature(batch, "old_log_probs"), batch.loss_mask_T)
        ids_T = segment_ids(batch.cu_seqlens, batch.num_tokens)
        advantage_T = batch.advantages_S.to(log_probs_T.dtype)[ids_T]
        ratio_T = policy_ratio(log_probs_T, old_T)
        low, high = self._clipping.clip_low, self._clipping.clip_high
        objective_T = clipped_surrogate(ratio_T, advantage_T, low, high)
        metrics = self._policy_metrics(stats, batch, ratio_T.detach(), advantage_T)
        metrics["approx_kl"] = masked_mean(k3_kl(old_T, log_probs_T.detach()), batch.loss_mask_T)
        if cap := self._clipping.tis_cap:
            engine_T = only(feature(batch, "engine_log_probs"), batch.loss_mask_T)
            weights_T, capped_T = truncated_importance_weights(old_T, engine_T, cap)
            objective_T = weights_T * objective_T
            metrics["tis_weight"] = masked_mean(weights_T, batch.loss_mask_T)
            metrics["tis_capped"] = masked_mean(capped_T, batch.loss_mask_T)
        return log_probs_T, objective_T, batch.coefficients_T, metrics

    def _policy_metrics(
        self, stats: TokenStats, batch: PackedBatch, ratio_T: torch.Tensor, advantage_T: torch.Tensor
    ) -> Metrics:
        mask_T = batch.loss_mask_T
        clipped_low_T = (ratio_T < 1.0 - self._clipping.clip_low) & (advantage_T < 0)
        clipped_high_T = (ratio_T > 1.0 + self._clipping.clip_high) & (advantage_T > 0)
        entropy_T = stats.entropy.detach()
        metrics: Metrics = {
            "clip_fraction": masked_mean(clipped_low_T | clipped_high_T, mask_T),
            "clip_low_fraction": masked_mean(clipped_low_T, mask_T),
            "ratio_mean": masked_mean(ratio_T, mask_T),
            "entropy": masked_mean(entropy_T, mask_T),
            "entropy_normalized": masked_mean(normalized_entropy(entropy_T, self.vocab_size), mask_T),
        }
        for name, values_T in (
            ("hellinger", stats.hellinger),
            ("kl_reference", stats.reverse_kl),
        ):
            values_T = values_T if values_T is not None else batch.features.get(name)
            if values_T is not None:
                metrics[name] = masked_mean(values_T, mask_T)
        return metrics


def feature(batch: PackedBatch, name: str) -> torch.Tensor:
    """batch.features[name], (T,). Raises KeyError naming what the batch has."""
    if name not in batch.features:
        raise KeyError(
            f"batch.features has no {name!r} (it has {sorted(batch.features)}): fill it before the update"
        )
    return batch.features[name]


def only(values_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """The values where mask_T, 0 elsewhere, whatever stands there."""
    return torch.where(mask_T, values_T, torch.zeros_like(values_T))


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, count) over the tokens of mask_T, on the device: reading them out is the caller's choice."""
    return only(values_T.detach().double(), mask_T).sum(), mask_T.sum()
