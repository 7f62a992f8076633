"""The supervised cold start: `torchrun -m megatron_dgpo.sft CONFIG.toml [--section.key value]`.

Same model, parallelism, optimizer and checkpoints as the reinforcement run; its exported policy is
where that one starts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_dgpo import platform
from megatron_dgpo.algorithms.surrogate import token_coefficients
from megatron_dgpo.cli import refusals
from megatron_dgpo.config import SFTConfig, SyncConfig
from megatron_dgpo.data import PackItem, PromptCursor, pack
from megatron_dgpo.data.supervised import SupervisedExample
from megatron_dgpo.entry import claim, load_examples, load_heldout, load_tokenizer, parse
from megatron_dgpo.learner import score_sequences, supervised_loss
from megatron_dgpo.mcore.policy import Policy
from megatron_dgpo.observe.console import Console, set_up_logging
from megatron_dgpo.rewards import build_reward
from megatron_dgpo.run import (
    Evaluator,
    RunFolder,
    RunState,
    StopSignal,
    build_engine,
    build_policy,
    finish,
    restore_or_start,
)
from megatron_dgpo.types import PackedBatch, Prompt
from megatron_dgpo.weights.sync import WeightSync

_REPORT_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Data:
    """What a run reads before it builds anything."""

    examples: list[SupervisedExample]
    heldout: list[Prompt]
    stop_ids: tuple[int, ...]


def load_data(config: SFTConfig) -> Data:
    """Raises ValueError or OSError, naming file and row, for what cannot be read."""
    tokenizer = load_tokenizer(config)
    return Data(load_examples(config, tokenizer), load_heldout(config, tokenizer), (tokenizer.eos_token_id,))


def run(config: SFTConfig, groups: platform.Groups, data: Data) -> None:
    """The whole run on one rank."""
    started, stop = time.perf_counter(), StopSignal()
    console = Console(config.run.quiet, groups.rank)
    c, examples = config.train, data.examples
    cursor = PromptCursor(len(examples), c.batch_size, seed=config.run.seed, shuffle=True)
    policy = build_policy(config, groups, total_updates=c.steps, keep_reference=False)
    folder = RunFolder(config, groups)
    state = restore_or_start(policy, folder, console, resume=config.run.resume)
    loss_fn, reported = supervised_loss(policy), time.perf_counter()

    with console.phase("cold start", c.steps) as bar:
        bar.update(state.step)
        while state.step < c.steps:
            batches = batch_of_step([examples[i] for i in cursor.indices(state.step)], config, groups)
            result = policy.update(batches, loss_fn)
            state.step += 1
            bar.update()
            last = state.step == c.steps
            if last or state.step % config.observe.every == 0:
                loss = global_sum(sum(float(x) for x in result.metrics), groups)
                metrics = {"loss": loss, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
                folder.write_metrics(state.step, metrics, "train")
                if last or time.perf_counter() - reported > _REPORT_EVERY_SECONDS:
                    reported = time.perf_counter()
                    console.log(
                        f"step {state.step:5d}/{c.steps}  loss {loss:.4f}  grad {result.grad_norm:.3f}"
                    )
            stopping = stop.on_any_rank(groups)
            every = config.checkpoint.every
            if stopping or last or (every and state.step % every == 0):
                folder.checkpoints.save(policy, state.to_json(groups, config.evaluation.k))
            if stopping and not last:
                console.log(f"asked to stop after step {state.step}; go on with --resume")
                folder.close()
                return
    if data.heldout and str(state.step) not in state.evaluations:
        evaluate(config, groups, policy, data, folder, state, console)
        folder.checkpoints.rewrite_state(state.to_json(groups, config.evaluation.k))
    finish(config, policy, folder, state, console, time.perf_counter() - started)
    folder.close()


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
    import torch

    total = torch.tensor(
        [value if groups.speaks_for_tokens else 0.0], dtype=torch.float64, device=groups.device
    )
    dist.all_reduce(total, group=groups.world)
    return float(total)


def evaluate(
    config: SFTConfig,
    groups: platform.Groups,
    policy: Policy,
    data: Data,
    folder: RunFolder,
    state: RunState,
    console: Console,
) -> None:
    """Held-out accuracy of the finished cold start."""
    engine = build_engine(config, groups)
    score = partial(score_sequences, policy, max_tokens=config.train.max_tokens_per_microbatch)
    WeightSync(policy.model, groups, engine, SyncConfig(), score).push(version=state.step)
    r = config.reward
    with build_reward(r.name, timeout_seconds=r.timeout_seconds, num_workers=r.num_workers) as reward:
        evaluator = Evaluator(config, groups, engine, reward, data.heldout, data.stop_ids)
        result = evaluator(console, state.step)
    engine.close()
    state.evaluations[str(state.step)] = result
    folder.write_metrics(state.step, result, "eval")


@record
def main(argv: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if argv is None else argv, SFTConfig)
    set_up_logging(config.run.quiet, int(os.environ.get("RANK", "0")))
    with refusals():
        data = load_data(config)
        lock = claim(config.run.folder)
    with lock or nullcontext(), platform.distributed(config.parallel, seed=config.run.seed) as groups:
        run(config, groups, data)


if __name__ == "__main__":
    main()
