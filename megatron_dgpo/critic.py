"""PPO's critic: values of a rollout batch, token advantages made of them, and its own updates.

Shape suffixes: T packed tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dgpo.algorithms.batch import feature, masked_mean, only
from megatron_dgpo.algorithms.gae import clipped_value_loss, generalized_advantages
from megatron_dgpo.algorithms.segments import sum_over
from megatron_dgpo.learner import MiniBatch, saved_for_replay
from megatron_dgpo.mcore.policy import OnBatch, Policy, ignore
from megatron_dgpo.mcore.value import token_values
from megatron_dgpo.observe.meters import Sums
from megatron_dgpo.types import PackedBatch


class Critic:
    """A value model in training, beside the policy.

    Args:
        policy: of a `ValueModel`.
        config: PPOConfig.
    """

    def __init__(self, policy: Policy, config: Any) -> None:
        self.policy = policy
        self.warmup_steps: int = config.critic_warmup_steps
        self._c = config

    def prepare(self, minibatches: Sequence[MiniBatch], on_batch: OnBatch = ignore) -> Sums:
        """Give every micro-batch its tokens' values, returns and advantages, fixed for its updates.

        Advantages have mean 0 and deviation 1 over all tokens of the rollout batch. Returns how much of the
        returns' variance the values explain: 0 for equal values, 1 for perfect ones. The returns are GAE's,
        advantage + value, so for lam < 1 they contain the values of later tokens: values that agree with
        each other explain some of it even where they are wrong. With lam = 1 and gamma = 1 the returns are
        the responses' rewards.
        """
        batches = [b for m in minibatches for b in m.batches]
        values = self.policy.forward(batches, self._values, on_batch)
        for batch, values_T in zip(batches, values, strict=False):  # none before the last stage
            advantages_T, returns_T = generalized_advantages(
                values_T,
                batch.advantages_S,
                batch.loss_mask_T,
                batch.cu_seqlens,
                gamma=self._c.gamma,
                lam=self._c.lam,
            )
            batch.features |= {"values": values_T, "returns": returns_T, "advantages": advantages_T}
        sums = Sums()
        if values:
            self._whiten(batches, sums)
        return sums

    def _whiten(self, batches: Sequence[PackedBatch], sums: Sums) -> None:
        dp = self.policy.groups.dp
        rows = [
            torch.stack([b.features[n][b.loss_mask_T].double() for n in ("advantages", "returns", "values")])
            for b in batches
        ]
        advantage, returns, values = torch.cat(rows, dim=1)
        error = returns - values
        columns = [advantage, advantage.square(), returns, returns.square(), error, error.square()]
        totals = torch.stack([*(c.sum() for c in columns), torch.ones_like(advantage).sum()])
        count = sum_over(totals, dp)[-1].item()
        means = [x / count for x in totals.tolist()[:-1]]
        deviation, *variances = (max(s - m * m, 0.0) for m, s in zip(means[::2], means[1::2], strict=True))
        for batch in batches:
            centred_T = (batch.features["advantages"] - means[0]) / (deviation**0.5 + 1e-8)
            batch.features["advantages"] = only(centred_T, batch.loss_mask_T)
        replicas = dp.size()
        if variances[0] > 0:
            explained = 1.0 - variances[1] / variances[0]
            sums.add("explained_variance", explained / replicas, 1 / replicas)
        sums.add("value", means[2] / replicas - means[4] / replicas, 1 / replicas)

    def update(self, minibatch: MiniBatch, *, save_bad_batch_to: Path, on_batch: OnBatch = ignore) -> Sums:
        """One optimizer step of the value model.

        Raises:
            NonFiniteUpdate: on all ranks, after saving the mini-batch for replay.
        """
        groups = self.policy.groups
        with saved_for_replay(minibatch, save_bad_batch_to / f"bad_critic_batch_rank{groups.rank}.pt"):
            result = self.policy.update(minibatch.batches, self._loss, on_batch)
        sums, replicas = Sums(), groups.dp.size()
        sums.add("value_loss", 0.0, 1 / replicas)
        for loss, metrics in result.metrics:
            sums.add("value_loss", loss, 0)
            for name, (total, count) in metrics.items():
                sums.add(name, total, count)
        sums.add("value_grad_norm", result.grad_norm / replicas, 1 / replicas)
        return sums

    def _values(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Tensor:
        return token_values(hidden, weight, self.policy.config, self.policy.groups)

    def _loss(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> tuple[Tensor, Any]:
        assert batch.coefficients_T is not None, "fixed when the batch was packed"
        mask_T = batch.loss_mask_T
        values_T = only(self._values(hidden, weight, batch), mask_T)
        old_T = only(feature(batch, "values"), mask_T)
        error_T = clipped_value_loss(values_T, old_T, feature(batch, "returns").float(), self._c.value_clip)
        moved_T = (values_T - old_T).abs() > self._c.value_clip
        loss = (batch.coefficients_T * error_T).sum()
        return loss, (loss.detach(), {"value_clip_fraction": masked_mean(moved_T, mask_T)})
