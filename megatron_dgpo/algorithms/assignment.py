"""Credit as a component: how an algorithm gives the tokens of a response their shares of its advantage.

Every algorithm takes either. Shape suffixes: T packed tokens, S packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dgpo.algorithms.batch import Metrics, feature
from megatron_dgpo.algorithms.credit import (
    check_credit,
    credit_scores,
    spread_credit,
)
from megatron_dgpo.algorithms.schedules import scheduled
from megatron_dgpo.algorithms.segments import segment_ids, segment_sums, sum_over
from megatron_dgpo.algorithms.spread import credit_spread
from megatron_dgpo.types import PackedBatch, TokenStats

DISTANCES = ("hellinger", "reverse_kl")
TIMINGS = ("rollout", "update")
AUTO = "auto"
LEAST_TAU, GREATEST_TAU = 1e-4, 1e3
"""Bounds of tau = "auto". Distances carry errors of 1e-7 (float32), which the lower one keeps harmless."""
_HALVINGS = 40
_EQUAL = 1.0 - 1e-6
"""A fraction above this at LEAST_TAU: the scores of every response are equal, up to their errors."""


class CreditSettings(Protocol):
    credit: str
    tau: float | str
    tau_final: float
    tau_schedule: str
    effective_fraction: float
    kappa: float
    kappa_final: float
    kappa_schedule: str
    entropy_normalization: str
    distance: str
    credit_timing: str


class Credit:
    """Uniform credit: every token of a response gets the response's whole advantage."""

    needs_reference = False
    """Whether the rollout pass has to have the reference's statistics."""
    update_needs_reference = False
    """Whether every update pass has to have them too."""

    def begin_step(self, progress: float) -> None:
        """A rollout batch is about to be prepared, at this part of the run, from 0 to 1."""

    def rollout_features(self, stats: TokenStats, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """What is fixed once per rollout batch, (T,) each."""
        return {}

    def settle(self, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None) -> None:
        """All batches of the rollout have their features; `group`: the ranks that share them out."""

    def weights(self, stats: TokenStats, batch: PackedBatch) -> torch.Tensor | None:
        """(T,) weights with mean 1 over each response, without gradient; None where all are 1."""
        return None

    def metrics(self, weights_T: torch.Tensor, batch: PackedBatch) -> Metrics:
        return {}


class DistributionCredit(Credit):
    """DGPO's weights (Eq. 6, arXiv 2605.03327), from distance to the reference and entropy.

    The paper leaves open when they are taken. credit_timing "rollout": once per rollout batch, under pi_old;
    "update": under the current policy at each update. tau and kappa may follow a schedule over the run
    (named as future work there); tau = "auto" finds, for each rollout batch, the tau at which the mean
    effective token fraction of its responses is `effective_fraction`. It follows from the batch alone, so a
    resumed run finds the same. It needs weights that are taken at the rollout: those of later updates have
    other scores (at the start policy all are equal, and every tau meets any fraction or none).

    Raises ValueError for settings out of range.
    """

    needs_reference = True

    def __init__(
        self, config: CreditSettings, *, vocab_size: int, cp_group: dist.ProcessGroup | None
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.cp_group = cp_group
        _check(config, vocab_size)
        self.auto = config.tau == AUTO
        self.tau = 1.0 if config.tau == AUTO else float(config.tau)
        self.kappa = config.kappa

    @property
    def update_needs_reference(self) -> bool:  # type: ignore[override]
        return self.config.credit_timing == "update"

    def begin_step(self, progress: float) -> None:
        c = self.config
        self.kappa = scheduled(c.kappa, c.kappa_final, c.kappa_schedule, progress)
        if not self.auto:
            self.tau = scheduled(float(c.tau), c.tau_final, c.tau_schedule, progress)

    def rollout_features(self, stats: TokenStats, batch: PackedBatch) -> dict[str, torch.Tensor]:
        if self.auto:
            return {"credit_scores": self._scores(stats)}
        if self.update_needs_reference:
            return {}
        return {"credit_weights": self._spread(self._scores(stats), batch)}

    def settle(self, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None) -> None:
        if not self.auto:
            return
        scored = [(b.features.pop("credit_scores"), b) for b in batches if "credit_scores" in b.features]
        if not scored:  # a pipeline stage without the LM head
            return
        self.tau = self._solve(scored, group)
        for scores_T, batch in scored:
            batch.features["credit_weights"] = self._spread(scores_T, batch)

    def weights(self, stats: TokenStats, batch: PackedBatch) -> torch.Tensor:
        if self.update_needs_reference:
            return self._spread(self._scores(stats), batch)
        return feature(batch, "credit_weights")

    def _scores(self, stats: TokenStats) -> torch.Tensor:
        distance_T = stats.hellinger if self.config.distance == "hellinger" else stats.reverse_kl
        if distance_T is None:
            raise ValueError(
                f"credit_timing={self.config.credit_timing!r} needs the reference's statistics in every pass"
            )
        return credit_scores(
            distance_T,
            stats.entropy.detach(),
            vocab_size=self.vocab_size,
            kappa=self.kappa,
            entropy_normalization=self.config.entropy_normalization,
        )

    def _spread(self, scores_T: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return spread_credit(
            scores_T, batch.cu_seqlens, tau=self.tau, loss_mask=batch.loss_mask_T, cp_group=self.cp_group
        ).weights

    def _solve(
        self, scored: Sequence[tuple[torch.Tensor, PackedBatch]], group: dist.ProcessGroup | None
    ) -> float:
        """The tau at which the mean effective fraction meets the target, by bisection of its logarithm.

        The fraction rises with tau: d ln(sum e^2bs / (sum e^bs)^2) / db = 2 (E_2b[s] - E_b[s]) >= 0 for
        b = 1 / tau. Where no tau in the bounds gives it, the nearer bound is taken, and where the scores of
        every response are equal, so that all weights are 1 whatever tau is, 1.0.
        """
        if self._mean_fraction(scored, LEAST_TAU, group) > _EQUAL:
            return 1.0
        low, high = math.log(LEAST_TAU), math.log(GREATEST_TAU)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._mean_fraction(scored, math.exp(middle), group) < self.config.effective_fraction:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def _mean_fraction(
        self,
        scored: Sequence[tuple[torch.Tensor, PackedBatch]],
        tau: float,
        group: dist.ProcessGroup | None,
    ) -> float:
        total = scored[0][0].new_zeros(2)
        for scores_T, batch in scored:
            found = spread_credit(
                scores_T, batch.cu_seqlens, tau=tau, loss_mask=batch.loss_mask_T, cp_group=self.cp_group
            )
            counted_S = self._counted(batch)
            total += torch.stack([found.effective_fraction.double()[counted_S].sum(), counted_S.sum()])
        fraction, count = sum_over(total, group).tolist()
        return fraction / count if count else 1.0

    def _counted(self, batch: PackedBatch) -> torch.Tensor:
        """(S,) bool: the sequences that have tokens to train."""
        ids_T = segment_ids(batch.cu_seqlens, batch.num_tokens)
        counts = segment_sums(batch.loss_mask_T.double().unsqueeze(0), ids_T, batch.num_sequences)
        return sum_over(counts, self.cp_group)[0] > 0

    @torch.no_grad()
    def metrics(self, weights_T: torch.Tensor, batch: PackedBatch) -> Metrics:
        """The spread of w (`credit_spread`), and the settings in force."""
        found = credit_spread(weights_T, batch, self.cp_group)
        count = torch.as_tensor(found["credit_effective_fraction"][1]).double()  # float32 rounds tau
        return found | {"credit_tau": (self.tau * count, count), "credit_kappa": (self.kappa * count, count)}


def build_credit(config: CreditSettings, *, vocab_size: int, cp_group: dist.ProcessGroup | None) -> Credit:
    """The component that config.credit names. Raises ValueError for an unknown one."""
    if config.credit == "uniform":
        return Credit()
    if config.credit == "distribution":
        return DistributionCredit(config, vocab_size=vocab_size, cp_group=cp_group)
    raise ValueError(f"credit={config.credit!r}: choose one of uniform, distribution")


def _check(config: CreditSettings, vocab_size: int) -> None:
    for name, value, choices in (
        ("distance", config.distance, DISTANCES),
        ("credit_timing", config.credit_timing, TIMINGS),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
    taus = [] if config.tau == AUTO else [config.tau]
    taus += [config.tau_final] if config.tau_schedule != "constant" else []
    kappas = [config.kappa, *([config.kappa_final] if config.kappa_schedule != "constant" else [])]
    for tau in taus or [1.0]:
        if isinstance(tau, str):
            raise ValueError(f"tau={tau!r}: must be a number greater than 0, or {AUTO!r}")
        for kappa in kappas:
            check_credit(vocab_size, tau, kappa, config.entropy_normalization)
    if config.tau == AUTO and not 0.0 < config.effective_fraction < 1.0:
        raise ValueError(f"effective_fraction={config.effective_fraction}: must be between 0 and 1")
    if config.tau == AUTO and config.tau_schedule != "constant":
        raise ValueError("tau='auto' has no schedule: tau follows from effective_fraction")
    if config.tau == AUTO and config.credit_timing != "rollout":
        raise ValueError(
            f"tau='auto' is found for the scores of the rollout, and credit_timing={config.credit_timing!r} "
            "takes others; use 'rollout'"
        )
