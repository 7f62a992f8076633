"""What one split does with the saved rollout batch: a whole training step, its gradients kept.

Shape suffixes: P prompts, G samples.
"""

from __future__ import annotations

import pickle
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from splits import Split
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.algorithms import build_algorithm
from megatron_dgpo.config import Config
from megatron_dgpo.data.packing import unpack
from megatron_dgpo.learner import Learner, MiniBatch
from megatron_dgpo.mcore.model import ModelShape
from megatron_dgpo.mcore.policy import Policy
from megatron_dgpo.run import build_policy, merge_over_ranks
from megatron_dgpo.types import Group, PackedBatch, Prompt, Sample, TokenStats
from megatron_dgpo.weights import convert
from megatron_dgpo.weights.convert import TensorSource
from megatron_dgpo.weights.export import export_stream, local_entries
from megatron_dgpo.weights.shards import shard, to_full

OLD_NOISE, UPDATE_NOISE = 0.05, 0.05
"""How far the old policy is from the reference, and the updated one from the old: Gaussian noise on every
tensor, in units of its root mean square. Distances, ratios and clips are then not trivial."""


@dataclass
class Replay:
    """What came out of a step, on rank 0."""

    metrics: dict[str, float]
    """Over all replicas: `loss`, `grad_norm`, `advantage_size` (mean absolute advantage) and more."""
    microbatches: list[int]
    """Of each replica."""
    credit: list[dict[tuple[str, int], Tensor]]
    """(prompt id, sample) -> (response tokens,) weights, of each rank that holds the loss; empty for an
    algorithm without credit."""
    copies: tuple[float, str]
    """Largest difference of a gradient between ranks that hold the same parameter, or of a shard from
    its place in the whole, over the tensor's largest gradient; and the tensor's name."""


# --- the batch ----------------------------------------------------------------------------------------


def rollout_batch(
    prompts: Sequence[Prompt], *, samples: int, response_tokens: int, vocab_size: int, seed: int
) -> list[Group]:
    """Groups (P, G) with random responses of 1 to `response_tokens` tokens, rewards and engine log-probs."""
    g = random.Random(seed)
    groups = []
    for prompt in prompts:
        rows = []
        for index in range(samples):
            ids = [g.randrange(vocab_size) for _ in range(g.randint(1, response_tokens))]
            log_probs = [-g.uniform(1.0, 5.0) for _ in ids]
            rows.append(Sample(prompt, index, ids, log_probs, "length", (), reward=g.random()))
        groups.append(Group(prompt, rows))
    return groups


def positions(sample: Sample) -> int:
    """Tokens that a sample takes in a micro-batch."""
    return len(sample.prompt.token_ids) + len(sample.token_ids) - 1


# --- the step -----------------------------------------------------------------------------------------


def replay(config: Config, split: Split, batch_file: Path, folder: Path) -> Replay:
    """A training step at the split on this rank; rank 0 writes the gradients to `folder`.

    The reference pass, the old log-probs and the update each see other weights.
    """
    config = split.apply(config)
    groups = platform.start(config.parallel, config.run.seed)
    vocab_size = ModelShape.of(config.model).vocab_size
    algorithm = build_algorithm(config.algorithm, vocab_size=vocab_size)
    policy = build_policy(config, groups, total_updates=1, keep_reference=algorithm.needs_reference)
    learner = Learner(policy, algorithm, temperature=config.rollout.temperature, max_tokens=split.max_tokens)
    copies: list[tuple[float, str]] = []
    _keep_credit(learner)
    _keep_gradients(policy, folder, copies)

    names, start = _start_weights(config)
    if split.moved:
        start = moved(start, torch.finfo(policy.config.params_dtype).eps)
    old = perturbed(start, "old", OLD_NOISE)
    minibatch = _my_minibatch(learner, pickle.loads(batch_file.read_bytes()))
    sizes = [abs(sample.advantage) for sample in minibatch.samples]
    convert.load_hf(policy.model, groups, names, old)
    sums = learner.prepare([minibatch])
    convert.load_hf(policy.model, groups, names, perturbed(old, "update", UPDATE_NOISE))
    sums.merge(learner.update(minibatch, save_bad_batch_to=folder))
    sums.add("advantage_size", sum(sizes), len(sizes))

    world = groups.world
    credit = platform.gather_objects(_credit(minibatch, groups), world)
    counts = platform.gather_objects(len(minibatch.batches) if groups.speaks_for_tokens else 0, world)
    return Replay(
        metrics=merge_over_ranks(sums, groups),
        microbatches=[count for count in counts if count],
        credit=[weights for weights in credit if weights],
        copies=max(pair for pairs in platform.gather_objects(copies, world) for pair in pairs),
    )


def _start_weights(config: Config) -> tuple[list[str], TensorSource]:
    if config.model.init == "random":
        return convert.random_source(config.model.path, config.run.seed)
    return convert.folder_source(config.model.path, ModelShape.of(config.model))


def perturbed(read: TensorSource, salt: str, scale: float) -> TensorSource:
    """Weights moved by noise that depends on the tensor's name and the salt alone, made for one full
    tensor at a time: so it is the same at any split."""

    def read_moved(name: str) -> Tensor:
        tensor = read(name).float()
        step = scale * float(tensor.square().mean().sqrt())
        return tensor + step * torch.randn(tensor.shape, generator=_generator(salt, name))

    return read_moved


def moved(read: TensorSource, eps: float) -> TensorSource:
    """Weights times 1 + eps or 1 - eps, at random."""

    def read_moved(name: str) -> Tensor:
        tensor = read(name).float()
        up = torch.randint(2, tensor.shape, generator=_generator("moved", name))
        return tensor * (1 + eps * (2 * up - 1))

    return read_moved


def _generator(salt: str, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{salt} {name}".encode()))


def _my_minibatch(learner: Learner, everything: Sequence[Group]) -> MiniBatch:
    """This replica's share of the batch, packed: one mini-batch, one optimizer step."""
    dp = learner.policy.groups.dp
    mine = list(everything)[dp.rank() :: dp.size()]
    learner.algorithm.assign_advantages(mine)
    (minibatch,) = learner.pack([learner.algorithm.select(mine)])
    return minibatch


# --- what is compared ---------------------------------------------------------------------------------


def _keep_credit(learner: Learner) -> None:
    """Leave the weights in the micro-batch also when they are taken in the update."""
    credit = learner.algorithm.credit
    take = credit.weights

    def take_and_keep(stats: TokenStats, batch: PackedBatch) -> Tensor | None:
        weights = take(stats, batch)
        if weights is not None:
            batch.features["credit_weights"] = weights
        return weights

    credit.weights = take_and_keep  # type: ignore[method-assign]


def _credit(minibatch: MiniBatch, groups: platform.Groups) -> dict[tuple[str, int], Tensor]:
    if not groups.is_last_stage or "credit_weights" not in minibatch.batches[0].features:
        return {}
    values = [batch.features["credit_weights"] for batch in minibatch.batches]
    rows = unpack(minibatch.batches, values, len(minibatch.samples))
    return {(s.prompt.id, s.index): w.cpu() for s, w in zip(minibatch.samples, rows, strict=True)}


def _keep_gradients(policy: Policy, folder: Path, copies: list[tuple[float, str]]) -> None:
    """Have the gradients read where they are complete: after Megatron has reduced them over replicas,
    sequence-parallel ranks and tied embeddings, and before the optimizer clips them."""
    finalize = policy.config.finalize_model_grads_func
    assert finalize is not None, "the policy sets it"

    def finalize_and_keep(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        _gather_shards(policy)
        stream = export_stream(policy.model, policy.groups, value=_gradient)
        if policy.groups.rank == 0:
            convert.write_safetensors(stream, folder)
        else:
            for _ in stream:
                pass
        dist.barrier(group=policy.groups.world)
        copies.append(_compare_own_parts(policy, folder))

    policy.config.finalize_model_grads_func = finalize_and_keep


def _gradient(parameter: Tensor) -> Tensor:
    return parameter.main_grad  # type: ignore[attr-defined]


def _gather_shards(policy: Policy) -> None:
    """Complete every gradient buffer in place. The distributed optimizer reduces only its own shard of
    each bucket; the rest, which it never reads, holds the rank's own gradient."""
    for bucket_group in policy.ddp.bucket_groups:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _compare_own_parts(policy: Policy, folder: Path) -> tuple[float, str]:
    """This rank's gradients against its parts of the saved ones, vocabulary padding (where the gradient
    is 0) included: norms on every TP rank, tied embeddings on two stages, all on every replica."""
    _, read = convert.folder_source(folder)
    tp, shape = policy.groups.tp, policy.shape
    worst = (0.0, "")
    for entry, parameter in local_entries(policy.model, convert.name_table(shape)):
        full = to_full(entry, [read(n) for n in entry.hf], shape, shape.padded_vocab_size(tp.size()))
        part = shard(entry, full, tp.rank(), tp.size())
        apart = float((_gradient(parameter).cpu() - part).abs().max())
        difference = relative(apart, float(full.abs().max()))
        worst = (difference, entry.hf[0]) if difference > worst[0] else worst
    return worst


def relative(difference: float, scale: float) -> float:
    """difference / scale; 0 where there is no difference, infinite where it is one from nothing. A NaN
    counts as infinitely far."""
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 and difference == difference else float("inf")
