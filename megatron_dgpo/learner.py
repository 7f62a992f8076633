"""Where the algorithm meets the model: statistics of a rollout batch, and the updates on it.

Shape suffixes: T packed tokens, H hidden size, K local vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.algorithms import Algorithm
from megatron_dgpo.algorithms.batch import only
from megatron_dgpo.algorithms.quantiles import PERCENTS, quantiles
from megatron_dgpo.data.packing import PackItem, pack
from megatron_dgpo.mcore.policy import (
    Frozen,
    NonFiniteUpdate,
    OnBatch,
    Policy,
    ignore,
    pad_for_sequence_parallel,
)
from megatron_dgpo.observe.meters import Sums
from megatron_dgpo.ops import linear_token_stats
from megatron_dgpo.ops.kept_rows import KeptRows
from megatron_dgpo.types import PackedBatch, Sample, TokenStats


@dataclass
class MiniBatch:
    """The samples of one optimizer step that this data-parallel replica holds."""

    batches: list[PackedBatch]
    samples: list[Sample]
    num_sequences: int
    """Over all replicas, like num_tokens: the denominators of the loss."""
    num_tokens: int
    imbalance: float = 0.0
    """By how much the replica with the most positions has more than the mean, as a part of it: while it
    works, the others wait."""


@contextmanager
def saved_for_replay(minibatch: MiniBatch, path: Path) -> Iterator[None]:
    """Where an update on it is not finite, write the mini-batch to `path` and say so in the error."""
    try:
        yield
    except NonFiniteUpdate as error:
        torch.save(minibatch, path)
        raise NonFiniteUpdate(f"{error}; the mini-batch is in {path}") from error


class Learner:
    """Turns scored samples into updates of the policy.

    Args:
        temperature: of the sampling; the policy that is trained is the one that was sampled.
        max_tokens: token budget of a micro-batch.
        share_prompts: compute a prompt once for the responses to it in a micro-batch (see `pack`), unless the
            model's rotary embedding is Transformer Engine's own, which counts positions itself.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        *,
        temperature: float,
        max_tokens: int,
        share_prompts: bool = True,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.temperature = temperature
        self.max_tokens = max_tokens
        self._share_prompts = share_prompts and policy.model.own_rotation
        self._kept = KeptRows(policy.groups.tp, sequence_parallel=policy.config.sequence_parallel)
        """The reference's hidden states, where updates need them."""

    # --- one rollout batch --------------------------------------------------------------------------

    def passes(self, *, only_update: bool = False) -> int:
        """Of `prepare` over the micro-batches."""
        if self.algorithm.needs_reference:
            return 2
        return 0 if only_update and not self.algorithm.needs_rollout_pass else 1

    def pack(self, samples_by_minibatch: Sequence[Sequence[Sample]]) -> list[MiniBatch]:
        """Pack each mini-batch's samples and fix every token's coefficient from global counts.

        A mini-batch without a single sample on any replica (every reward failed) is left out.
        """
        device = self.policy.groups.device
        minibatches = []
        for samples in samples_by_minibatch:
            items = [PackItem(s.prompt.token_ids, s.token_ids, s.advantage) for s in samples]
            batches = pack(
                items, max_tokens=self.max_tokens, device=device, share_prompts=self._share_prompts
            )
            if self.policy.config.sequence_parallel:  # before anything of length T is made for them
                batches = [pad_for_sequence_parallel(b, self.policy.groups.tp.size()) for b in batches]
            minibatches.append(MiniBatch(batches, list(samples), len(samples), _num_tokens(samples)))
        dp = self.policy.groups.dp
        positions = [sum(b.num_tokens for b in m.batches) for m in minibatches]
        counts = torch.tensor(
            [[m.num_sequences, m.num_tokens, n] for m, n in zip(minibatches, positions, strict=True)],
            device=device,
        )
        most = counts[:, 2].clone() if minibatches else counts
        dist.all_reduce(counts, group=dp)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=dp)
        for minibatch, (sequences, tokens, total), longest in zip(
            minibatches, counts.tolist(), most.tolist(), strict=True
        ):
            minibatch.num_sequences, minibatch.num_tokens = sequences, tokens
            minibatch.imbalance = longest * dp.size() / total - 1.0
            for batch in minibatch.batches if sequences else []:
                batch.coefficients_T = self.algorithm.token_coefficients(batch, sequences, tokens)
                batch.features["engine_log_probs"] = _engine_log_probs(batch, minibatch.samples)
        return [m for m in minibatches if m.num_sequences]

    def prepare(
        self, minibatches: Sequence[MiniBatch], on_batch: OnBatch = ignore, *, only_update: bool = False
    ) -> Sums:
        """Old log-probs, reference statistics and credit, once per rollout batch.

        With `only_update`, a single update follows, whose policy is the old one: its own pass gives all that
        an algorithm without a reference needs, and none is made for it here.

        Returns the gap between the engine's log-probs and the trainer's, and the quantiles of entropy and
        distance (or that update does).
        """
        batches = [b for m in minibatches for b in m.batches]
        self._kept.clear()
        sums = Sums()
        for minibatch in minibatches:
            sums.add("packing_imbalance", minibatch.imbalance)
        if not self.passes(only_update=only_update):
            return sums
        if self.algorithm.needs_reference:
            self.policy.forward_with_reference(
                batches, lambda h, w, b, reference: self._rollout_features(h, w, b, sums, reference), on_batch
            )
        else:
            self.policy.forward(batches, lambda h, w, b: self._rollout_features(h, w, b, sums), on_batch)
        self.algorithm.settle(batches, self.policy.groups.dp)
        self._add_quantiles(batches, sums)
        return sums

    def _add_quantiles(self, batches: Sequence[PackedBatch], sums: Sums) -> None:
        if self.policy.groups.speaks_for_tokens:
            sums.merge(feature_quantiles(batches, self.policy.groups.dp))

    def _rollout_features(
        self, hidden: Tensor, weight: Tensor, batch: PackedBatch, sums: Sums, reference: Tensor | None = None
    ) -> None:
        self._take_features(self._stats(hidden, weight, batch, reference), batch, sums)
        if reference is not None and self.algorithm.update_needs_reference:
            batch.features["reference_hidden"] = self._kept.keep(reference)

    @torch.no_grad()
    def _take_features(self, stats: TokenStats, batch: PackedBatch, sums: Sums) -> None:
        batch.features.update(self.algorithm.rollout_features(stats, batch))
        engine = batch.features["engine_log_probs"]
        gap_T = only((stats.log_probs - engine).abs().double(), batch.loss_mask_T)
        sums.add("log_prob_gap", gap_T.sum(), batch.loss_mask_T.sum())
        sums.add_max("log_prob_gap_max", gap_T.max())

    def update(self, minibatch: MiniBatch, *, save_bad_batch_to: Path, on_batch: OnBatch = ignore) -> Sums:
        """One optimizer step.

        Raises:
            NonFiniteUpdate: on all ranks, after saving the mini-batch for replay.
        """
        sums = Sums()
        first = not any("old_log_probs" in b.features for b in minibatch.batches)
        with saved_for_replay(minibatch, save_bad_batch_to / f"bad_batch_rank{self.policy.groups.rank}.pt"):
            result = self.policy.update(minibatch.batches, partial(self._loss, sums), on_batch)
        if first:  # `prepare` has made no pass
            self._add_quantiles(minibatch.batches, sums)
        # Every replica adds its part of the one loss, and each counts for its share of it.
        replicas = self.policy.groups.dp.size()
        sums.add("loss", 0.0, 1 / replicas)
        for loss, metrics in result.metrics:
            sums.add("loss", loss, 0)
            for name, (total, count) in metrics.items():
                sums.add(name, total, count)
        sums.add("grad_norm", result.grad_norm / replicas, 1 / replicas)
        sums.add("learning_rate", result.learning_rate / replicas, 1 / replicas)
        return sums

    # --- one micro-batch ----------------------------------------------------------------------------

    def _loss(self, sums: Sums, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> tuple[Tensor, Any]:
        reference = None
        if self.algorithm.update_needs_reference:
            # The bits of the model's precision: at the reference the distance is 0.
            reference = self._kept.bring(batch.features["reference_hidden"], hidden, batch.num_tokens)
        stats = self._stats(hidden, weight, batch, reference)
        if "old_log_probs" not in batch.features:
            self._take_features(stats, batch, sums)
        loss, metrics = self.algorithm.loss(stats, batch)
        return loss, (loss.detach(), metrics)

    def _stats(
        self, hidden: Tensor, weight: Tensor, batch: PackedBatch, reference: Tensor | None
    ) -> TokenStats:
        return policy_stats(
            self.policy, hidden, weight, batch, temperature=self.temperature, reference_hidden=reference
        )


def feature_quantiles(batches: Sequence[PackedBatch], group: dist.ProcessGroup) -> Sums:
    """Quantiles of entropy and of the distance to the reference, where there is one, over the response tokens
    of the rollout batch on all replicas, under the policy that starts its updates.

    Collective over `group`, the data-parallel ranks, each of which has micro-batches. For what it costs see
    `quantiles`; it is taken once a rollout batch, not at every update.
    """
    names = [name for name in ("entropy", "hellinger") if name in batches[0].features]
    values = [torch.cat([b.features[name][b.loss_mask_T] for b in batches]) for name in names]
    sums = Sums()
    for name, found in zip(names, quantiles(values, PERCENTS, group) if names else [], strict=True):
        for percent, value in zip(PERCENTS, found, strict=False):  # none without a token
            sums.add(f"{name}_p{percent}", value)
    return sums


def policy_stats(
    policy: Policy | Frozen,
    hidden: Tensor,
    weight: Tensor,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    reference_hidden: Tensor | None = None,
) -> TokenStats:
    """TokenStats of a micro-batch from what `Policy` hands to a MicrobatchFn; 0 where its loss_mask_T is not
    set, for which the LM head makes no product."""
    return linear_token_stats(
        hidden,
        weight,
        batch.targets_T,
        reference_hidden=reference_hidden,
        reference_weight=None if reference_hidden is None else policy.reference.head_weight,  # type: ignore[union-attr]
        tp_group=policy.groups.tp,
        vocab_size=policy.shape.vocab_size,
        temperature=temperature,
        rows=batch.loss_rows,
        sequence_parallel=policy.config.sequence_parallel,
    )


def score_sequences(
    policy: Policy | Frozen, sequences: Sequence[Sequence[int]], *, max_tokens: int
) -> list[list[float]]:
    """The policy's log-probs of given token ids at temperature 1, on every rank; collective.

    Entry t of a result is of token t + 1 after tokens 0..t, in nats.
    """
    groups = policy.groups
    items = [PackItem(tuple(ids[:1]), list(ids[1:]), 0.0) for ids in sequences]
    batches = pack(items, max_tokens=max_tokens, device=groups.device, min_batches=1)

    def rows(hidden: Tensor, weight: Tensor, batch: PackedBatch) -> dict[int, list[float]]:
        left = iter(policy_stats(policy, hidden, weight, batch).log_probs[batch.loss_mask_T].tolist())
        return {i: [next(left) for _ in sequences[i][1:]] for i in batch.sample_ids if i >= 0}

    found: dict[int, list[float]] = {}
    for part in platform.gather_objects(policy.forward(batches, rows), groups.replica):
        for scored in part:  # none before the last stage
            found |= scored
    return [found[i] for i in range(len(sequences))]


def supervised_loss(policy: Policy) -> Callable[[Tensor, Tensor, PackedBatch], tuple[Tensor, Any]]:
    """Cross-entropy with the batch's coefficients, for `Policy.update`."""

    def loss(hidden: Tensor, weight: Tensor, batch: PackedBatch) -> tuple[Tensor, Any]:
        stats = policy_stats(policy, hidden, weight, batch)
        assert batch.coefficients_T is not None, "fixed when the batch was made"
        value = -(batch.coefficients_T * stats.log_probs).sum()
        return value, value.detach()

    return loss


def _num_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(s.token_ids) for s in samples)


def _engine_log_probs(batch: PackedBatch, samples: Sequence[Sample]) -> Tensor:
    """(T,) the engine's log-probs at the response tokens, 0 elsewhere."""
    out = torch.zeros(batch.num_tokens, dtype=torch.float32)
    values = [x for i in batch.sample_ids if i >= 0 for x in samples[i].log_probs]
    out[batch.loss_mask_T.cpu()] = torch.tensor(values, dtype=torch.float32)
    return out.to(batch.tokens_T.device)
