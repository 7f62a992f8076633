"""What the trainer asks of an algorithm, composed of pieces that a subclass replaces one by one.

Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.advantages import group_advantages
from megatron_dgpo.algorithms.assignment import CreditSettings, build_credit
from megatron_dgpo.algorithms.batch import Metrics, feature, masked_mean, only
from megatron_dgpo.algorithms.credit import normalized_entropy
from megatron_dgpo.algorithms.segments import segment_ids
from megatron_dgpo.algorithms.surrogate import (
    clipped_surrogate,
    k3_kl,
    policy_ratio,
    sequence_mask,
    token_coefficients,
    truncated_importance_weights,
)
from megatron_dgpo.types import Group, PackedBatch, Sample, TokenStats


class Settings(CreditSettings, Protocol):
    """The settings that every algorithm has."""

    clip_low: float
    clip_high: float
    advantage_eps: float
    normalize_by_std: bool
    aggregation: str
    tis_cap: float
    sequence_mask_cap: float


@dataclass
class Tokens:
    """A micro-batch as the surrogate sees it. Tokens that do not train have 0 for their log-probs, and so
    stay out of exp(), where they could overflow to inf * 0."""

    batch: PackedBatch
    log_probs_T: torch.Tensor
    """Of the current policy; gradients flow."""
    old_T: torch.Tensor
    """Of the policy at the start of the rollout batch, by the trainer."""
    advantage_T: torch.Tensor

    @property
    def mask_T(self) -> torch.Tensor:
        return self.batch.loss_mask_T


class Algorithm:
    """A policy-gradient algorithm: advantages, credit, ratio, objective, aggregation, corrections.

    As it stands: group-relative advantages (Eq. 1), the token's ratio and PPO's clip (Eq. 7, arXiv
    2605.03327). Subclasses replace `advantages`, `ratio`, `objective`, `penalty`.

    Args:
        vocab_size: the true size, for the normalised entropy.
        max_response_tokens: the longest response, for aggregation "fixed_length".
        cp_group: each packed sequence's tokens are spread over these ranks.

    Raises ValueError for settings out of range.
    """

    needs_critic = False
    """Whether token advantages come from a value model (`megatron_dgpo.critic`)."""

    def __init__(
        self,
        config: Settings,
        *,
        vocab_size: int,
        max_response_tokens: int = 0,
        cp_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, cap in (("tis_cap", config.tis_cap), ("sequence_mask_cap", config.sequence_mask_cap)):
            if cap and not cap >= 1:
                raise ValueError(f"{name}={cap}: must be at least 1, or 0 to turn it off")
        self._settings = config
        self.vocab_size = vocab_size
        self.max_response_tokens = max_response_tokens
        self.cp_group = cp_group
        self.credit = build_credit(config, vocab_size=vocab_size, cp_group=cp_group)

    # --- pieces -----------------------------------------------------------------------------------

    def advantages(self, rewards: list[list[float | None]]) -> list[list[float | None]]:
        """One for each reward of each group; None where it failed."""
        c = self._settings
        return group_advantages(rewards, eps=c.advantage_eps, normalize_by_std=c.normalize_by_std)

    def ratio(self, tokens: Tokens) -> torch.Tensor:
        """(T,) current over old policy; 1 on policy."""
        return policy_ratio(tokens.log_probs_T, tokens.old_T)

    def objective(self, tokens: Tokens, ratio_T: torch.Tensor) -> torch.Tensor:
        """(T,) to be maximised, before credit and corrections, which multiply it."""
        c = self._settings
        return clipped_surrogate(ratio_T, tokens.advantage_T, c.clip_low, c.clip_high)

    def penalty(self, tokens: Tokens) -> tuple[torch.Tensor, Metrics] | None:
        """(T,) to be minimised beside it, and its metrics."""
        return None

    # --- what the trainer calls -------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:
        """Whether the rollout pass has to have the reference's statistics."""
        return self.credit.needs_reference

    @property
    def needs_rollout_pass(self) -> bool:
        """Whether the statistics of all micro-batches have to be there before the first of an only update, or
        without one."""
        return self.needs_reference or self.needs_critic

    @property
    def update_needs_reference(self) -> bool:
        """Whether every update pass has to have them too."""
        return self.credit.update_needs_reference

    def assign_advantages(self, groups: list[Group]) -> None:
        """Set the advantage of every scored sample; failed ones get 0."""
        found = self.advantages([[sample.reward for sample in group.samples] for group in groups])
        for group, row in zip(groups, found, strict=True):
            for sample, advantage in zip(group.samples, row, strict=True):
                sample.advantage = 0.0 if advantage is None else advantage

    def select(self, groups: list[Group]) -> list[Sample]:
        """The samples that train, in order: all whose reward did not fail."""
        return [s for group in groups for s in group.samples if s.reward is not None]

    def begin_step(self, progress: float) -> None:
        """A rollout batch is about to be prepared, at this part of the run, from 0 to 1."""
        self.credit.begin_step(progress)

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
        return features | self.credit.rollout_features(stats, batch)

    def settle(self, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None = None) -> None:
        """All micro-batches of the rollout have their features; fix what depends on all of them. Who does
        has `needs_rollout_pass`.

        group: the data-parallel ranks, which hold the other micro-batches; collective over it.
        """
        self.credit.settle(batches, group)

    def token_coefficients(self, batch: PackedBatch, num_sequences: int, num_tokens: int) -> torch.Tensor:
        """(T,) float32 for batch.coefficients_T, from counts of the whole mini-batch over all ranks."""
        return token_coefficients(
            batch.cu_seqlens,
            batch.loss_mask_T,
            self._settings.aggregation,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_response_tokens=self.max_response_tokens,
            cp_group=self.cp_group,
        )

    def loss(self, stats: TokenStats, batch: PackedBatch) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's part of the mini-batch's loss, to be minimised and summed over micro-batches
        and data-parallel ranks, and the metrics over its loss_mask tokens."""
        if batch.coefficients_T is None:
            raise ValueError("batch.coefficients_T is None: set it from token_coefficients before the loss")
        tokens = self._tokens(stats, batch)
        ratio_T = self.ratio(tokens)
        objective_T = self.objective(tokens, ratio_T)
        metrics = self._metrics(stats, tokens, ratio_T.detach())
        weights_T = self._credit(stats, batch, metrics)
        if batch.record is not None:
            batch.record |= self._record(stats, tokens, ratio_T.detach(), weights_T)
        for factor_T in (weights_T, *self._corrections(tokens, metrics)):
            if factor_T is not None:
                objective_T = factor_T * objective_T
        loss = -(batch.coefficients_T * objective_T).sum()
        if (penalty := self.penalty(tokens)) is not None:
            penalty_T, more = penalty
            loss = loss + (batch.coefficients_T * penalty_T).sum()
            metrics |= more
        return loss, metrics

    # --- the inside of the loss -------------------------------------------------------------------

    def _tokens(self, stats: TokenStats, batch: PackedBatch) -> Tokens:
        mask_T = batch.loss_mask_T
        log_probs_T = only(stats.log_probs, mask_T)
        if "advantages" in batch.features:  # of single tokens, as a value model gives them
            advantage_T = only(batch.features["advantages"], mask_T).to(log_probs_T.dtype)
        else:
            ids_T = segment_ids(batch.cu_seqlens, batch.num_tokens)
            advantage_T = batch.advantages_S.to(log_probs_T.dtype)[ids_T]
        return Tokens(batch, log_probs_T, only(feature(batch, "old_log_probs"), mask_T), advantage_T)

    def _credit(self, stats: TokenStats, batch: PackedBatch, metrics: Metrics) -> torch.Tensor | None:
        """The weights w > 0: w min(rho A, clip(rho) A) is the min with A w in place of A."""
        weights_T = self.credit.weights(stats, batch)
        if weights_T is not None:
            metrics |= self.credit.metrics(weights_T, batch)
        return weights_T

    def _corrections(self, tokens: Tokens, metrics: Metrics) -> list[torch.Tensor]:
        """Factors for samples that the engine drew from another policy than the trainer's pi_old."""
        c, mask_T = self._settings, tokens.mask_T
        factors: list[torch.Tensor] = []
        if not (c.tis_cap or c.sequence_mask_cap):
            return factors
        engine_T = only(feature(tokens.batch, "engine_log_probs"), mask_T)
        if c.tis_cap:
            weights_T, capped_T = truncated_importance_weights(tokens.old_T, engine_T, c.tis_cap)
            metrics["tis_weight"] = masked_mean(weights_T, mask_T)
            metrics["tis_capped"] = masked_mean(capped_T, mask_T)
            factors.append(weights_T)
        if c.sequence_mask_cap:
            kept_T = sequence_mask(
                tokens.old_T, engine_T, mask_T, tokens.batch.cu_seqlens, c.sequence_mask_cap, self.cp_group
            )
            metrics["sequence_masked"] = masked_mean(~kept_T, mask_T)
            factors.append(kept_T.to(tokens.old_T.dtype))
        return factors

    def _clipped(self, tokens: Tokens, ratio_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) bool each: where the clip below, and the one above, takes the gradient away."""
        c = self._settings
        low_T = (ratio_T < 1.0 - c.clip_low) & (tokens.advantage_T < 0)
        return low_T, (ratio_T > 1.0 + c.clip_high) & (tokens.advantage_T > 0)

    def _record(
        self, stats: TokenStats, tokens: Tokens, ratio_T: torch.Tensor, weights_T: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """For `PackedBatch.record`."""
        low_T, high_T = self._clipped(tokens, ratio_T)
        found = {"ratio": ratio_T, "clipped": low_T | high_T}
        if weights_T is not None:
            found["credit_weights"] = weights_T
        if self.update_needs_reference:  # otherwise the weights come from batch.features
            found["entropy"] = stats.entropy.detach()
            for name, values_T in (("hellinger", stats.hellinger), ("kl_reference", stats.reverse_kl)):
                if values_T is not None:
                    found[name] = values_T
        return found

    def _metrics(self, stats: TokenStats, tokens: Tokens, ratio_T: torch.Tensor) -> Metrics:
        mask_T = tokens.mask_T
        clipped_low_T, clipped_high_T = self._clipped(tokens, ratio_T)
        entropy_T = stats.entropy.detach()
        metrics: Metrics = {
            "clip_fraction": masked_mean(clipped_low_T | clipped_high_T, mask_T),
            "clip_low_fraction": masked_mean(clipped_low_T, mask_T),
            "ratio_mean": masked_mean(ratio_T, mask_T),
            "entropy": masked_mean(entropy_T, mask_T),
            "entropy_normalized": masked_mean(normalized_entropy(entropy_T, self.vocab_size), mask_T),
            "approx_kl": masked_mean(k3_kl(tokens.old_T, tokens.log_probs_T.detach()), mask_T),
        }
        for name, values_T in (
            ("hellinger", stats.hellinger),
            ("kl_reference", stats.reverse_kl),
        ):
            values_T = values_T if values_T is not None else tokens.batch.features.get(name)
            if values_T is not None:
                metrics[name] = masked_mean(values_T, mask_T)
        return metrics
