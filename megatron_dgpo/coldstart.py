"""The parts of a supervised run, which the loop in `sft.py` calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.algorithms.surrogate import token_coefficients
from megatron_dgpo.config import SFTConfig, SyncConfig
from megatron_dgpo.data.packing import PackItem, pack
from megatron_dgpo.data.supervised import SupervisedExample
from megatron_dgpo.inputs import SupervisedData
from megatron_dgpo.learner import score_sequences
from megatron_dgpo.mcore.policy import Policy
from megatron_dgpo.observe.console import Console
from megatron_dgpo.rewards import build_reward
from megatron_dgpo.run import Evaluator, RunFolder, RunState, build_engine
from megatron_dgpo.types import PackedBatch
from megatron_dgpo.weights.sync import WeightSync


def batch_of_step(
    examples: Sequence[SupervisedExample], config: SFTConfig, groups: platform.Groups
) -> list[PackedBatch]:
    """This replica's share of a step's examples, packed; the loss is the mean over all answer tokens."""
    mine = examples[groups.dp.rank() :: groups.dp.size()]
    items = [PackItem(e.prompt_ids, e.response_ids) for e in mine]
    batches = pack(items, max_tokens=config.train.max_tokens_per_microbatch, device=groups.device)
    num_tokens = sum(len(e.response_ids) for e in examples)
    for batch in batches:
        batch.coefficients_T = token_coefficients(
            batch.cu_seqlens,
            batch.loss_mask_T,
            "token_mean",
            num_sequences=len(examples),
            num_tokens=num_tokens,
        )
    return batches


def global_sum(value: float, groups: platform.Groups) -> float:
    """Sum over replicas of a number that is right on the ranks that speak for tokens."""
    total = torch.tensor(
        [value if groups.speaks_for_tokens else 0.0], dtype=torch.float64, device=groups.device
    )
    dist.all_reduce(total, group=groups.world)
    return float(total)


def evaluate(
    config: SFTConfig,
    groups: platform.Groups,
    policy: Policy,
    data: SupervisedData,
    folder: RunFolder,
    state: RunState,
    console: Console,
) -> None:
    """Held-out accuracy of the finished cold start."""
    engine = build_engine(config, groups)
    score = partial(score_sequences, policy, max_tokens=config.train.max_tokens_per_microbatch)
    sync = WeightSync(policy.model, groups, engine, SyncConfig(), score, data.heldout)
    sync.push(version=state.step)
    r = config.reward
    with build_reward(r.name, timeout_seconds=r.timeout_seconds, num_workers=r.num_workers) as reward:
        evaluator = Evaluator(config, groups, engine, reward, data.heldout, data.stop_ids)
        result = evaluator(console, state.step)
    engine.close()
    state.evaluations[str(state.step)] = result
    folder.write_metrics(state.step, result, "eval")
