"""The parts of a reinforcement run and the stages of its steps, which the loop in `train.py` calls."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import partial

from megatron_dgpo import platform
from megatron_dgpo.algorithms import build_algorithm
from megatron_dgpo.audit import CreditAudit
from megatron_dgpo.config import Config
from megatron_dgpo.data import PromptCursor
from megatron_dgpo.inputs import Data
from megatron_dgpo.learner import Learner, MiniBatch, score_sequences
from megatron_dgpo.mcore.model import ModelShape
from megatron_dgpo.observe.console import Console
from megatron_dgpo.observe.meters import PhaseTimer, Sums
from megatron_dgpo.observe.samples import SampleWriter
from megatron_dgpo.rewards import Combined, build_reward, build_term
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.rollout.policies import Rollout, Rollouts
from megatron_dgpo.run import (
    Evaluator,
    RunFolder,
    RunState,
    build_critic,
    build_engine,
    build_policy,
    merge_over_ranks,
    peak_memory,
)
from megatron_dgpo.types import Group
from megatron_dgpo.weights.sync import Gap, WeightSync

log = logging.getLogger(__name__)


class Trainer:
    """Policy, engine, reward and data of a run, and the stages of one step."""

    def __init__(self, config: Config, groups: platform.Groups, console: Console, data: Data) -> None:
        self.config, self.groups, self.console = config, groups, console
        self.timer = PhaseTimer()
        c = config.train
        self.gap: Gap | None = None
        self.prompts, self.stop_ids = data.prompts, data.stop_ids
        self.cursor = PromptCursor(
            len(self.prompts), config.prompts_per_draw, seed=config.run.seed, shuffle=config.data.shuffle
        )
        vocab_size = ModelShape.of(config.model).vocab_size
        self.algorithm = build_algorithm(
            config.algorithm, vocab_size=vocab_size, max_response_tokens=config.rollout.max_new_tokens
        )
        updates = c.steps * c.epochs_per_rollout * (c.prompts_per_step // c.prompts_per_minibatch)
        self.policy = build_policy(
            config,
            groups,
            total_updates=updates,
            keep_reference=self.algorithm.needs_reference,
        )
        self.learner = Learner(
            self.policy,
            self.algorithm,
            temperature=config.rollout.temperature,
            max_tokens=c.max_tokens_per_microbatch,
            share_prompts=c.share_prompts,
        )
        self.audit = CreditAudit(config, groups, self.algorithm, data.tokenizer)
        self.critic = None
        if self.algorithm.needs_critic:
            self.critic = build_critic(config, groups, total_updates=updates)
        self.engine = build_engine(config, groups, self.policy)
        score = partial(score_sequences, self.policy, max_tokens=c.max_tokens_per_microbatch)
        # A few are enough, and the first of the order that the run draws in.
        first = [self.prompts[i] for i in self.cursor.indices(0)[:4]]
        self.sync = WeightSync(self.policy.model, groups, self.engine, config.sync, score, first)
        r = config.reward
        self.reward = build_reward(r.name, timeout_seconds=r.timeout_seconds, num_workers=r.num_workers)
        terms = [
            (t.name, t.weight, build_term(t, max_new_tokens=config.rollout.max_new_tokens)) for t in r.terms
        ]
        scored = Combined(self.reward, terms) if terms else self.reward
        self.rollouts = Rollouts(
            config,
            groups,
            self.engine,
            scored.score,
            prompts_of=lambda draw: [self.prompts[i] for i in self.cursor.indices(draw)],
            params_of=self.sampling,
            recover=self.sync.recover,
            # The embedded engine's samples follow from the seed; they shall not depend on time.
            stop_early=config.rollout.oversampling > 1 and config.rollout.engine != "embedded",
        )
        self.heldout = data.heldout
        self.evaluator = Evaluator(
            config, groups, self.engine, self.reward, data.heldout, self.stop_ids, self.sync.recover
        )

    def push(self, version: int) -> None:
        """Give the engine the policy's weights, and note how far its log-probs are from the trainer's."""
        self.gap = self.sync.push(version)

    def rollout(self, state: RunState) -> Rollout:
        """This replica's scored groups with their advantages; `state` counts the draws they took."""
        rollout = self.rollouts.step(state.draws, self.console.phase)
        if self.config.reward.shuffle:
            shuffle_rewards(rollout.groups, seed=self.sampling(state.draws).seed)
        self.sync.probe_with(rollout.groups)
        self.engine.rest()
        self.algorithm.assign_advantages(rollout.groups)
        state.draws += rollout.tally.rounds
        return rollout

    def start_next(self, state: RunState) -> None:
        """With async_steps, draw the next step's samples from now on. A run that ends before they are
        collected draws them again when it is resumed."""
        c = self.config.train
        if c.async_steps and state.step + 1 < c.steps:
            self.rollouts.start(state.draws)

    def sampling(self, draw: int) -> SamplingParams:
        """Every draw has its own random numbers, and a resumed run the same ones."""
        r = self.config.rollout
        return SamplingParams(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            min_p=r.min_p,
            n=self.config.train.samples_per_prompt,
            seed=self.config.run.seed * 1_000_003 + draw,
            stop_token_ids=self.stop_ids,
        )

    def prepare(
        self, groups_by_minibatch: Sequence[Sequence[Group]], step: int
    ) -> tuple[list[MiniBatch], Sums]:
        """Packed mini-batches with everything that is fixed before the first update."""
        self.algorithm.begin_step(step / max(1, self.config.train.steps - 1))
        minibatches = self.learner.pack([self.algorithm.select(list(g)) for g in groups_by_minibatch])
        if not minibatches:
            log.warning("no sample of this step has a reward: no update (see the samples' reward_error)")
            return [], Sums()
        only_update = self.config.train.epochs_per_rollout * len(minibatches) == 1
        passes = self.learner.passes(only_update=only_update) + (self.critic is not None)
        with self.console.phase("prepare", passes * num_batches(minibatches), "micro-batches") as bar:
            sums = self.learner.prepare(minibatches, bar.update, only_update=only_update)
            if self.critic is not None:
                sums.merge(self.critic.prepare(minibatches, bar.update))
        self.audit.choose(minibatches, step + 1)
        return minibatches, sums

    def update(self, minibatches: Sequence[MiniBatch], folder: RunFolder, step: int) -> Sums:
        sums = Sums()
        epochs = self.config.train.epochs_per_rollout
        warming_up = self.critic is not None and step < self.critic.warmup_steps
        updated = [u for u in (self.critic, None if warming_up else self.learner) if u is not None]
        passes = epochs * len(updated)
        with self.console.phase("update", passes * num_batches(minibatches), "micro-batches") as bar:
            for _ in range(epochs):
                for minibatch in minibatches:
                    for one in updated:
                        sums.merge(one.update(minibatch, save_bad_batch_to=folder.path, on_batch=bar.update))
        return sums

    def record(self, state: RunState, folder: RunFolder, rollout: Rollout, sums: Sums) -> None:
        """Metrics over all ranks, one line on the terminal, some samples to read and some tokens' credit."""
        self.audit.record(state.step)
        sums.merge(rollout_sums(rollout.groups, self.groups.dp.size()))
        if self.config.rollout.dynamic_sampling or self.config.rollout.oversampling > 1:
            for name, value in rollout.tally.metrics().items():
                sums.add(name, value)
        sums.merge(staleness(rollout.groups, state.step - 1))
        metrics = merge_over_ranks(sums, self.groups) | self.timer.pop()
        metrics["tokens_per_second"] = metrics["response_tokens"] / metrics["time/step"]
        if self.gap is not None:
            metrics["sync_log_prob_gap"] = self.gap.mean
        metrics |= peak_memory(self.groups)
        advisories = folder.write_metrics(state.step, metrics, "train")
        if self.groups.rank == 0 and (wanted := self.config.observe.samples_per_step):
            n = self.config.train.samples_per_prompt
            SampleWriter(folder.path).write(state.step, rollout.groups[: max(1, wanted // n)])
        self.console.step_line(state.step, self.config.train.steps, metrics)
        for advisory in advisories:
            self.console.alert(advisory.line)

    def evaluate_when_due(self, state: RunState, folder: RunFolder) -> None:
        step, every = state.step, self.config.evaluation.every
        due = step in (0, self.config.train.steps) or (every > 0 and step % every == 0)
        if not (due and self.heldout):
            return
        result = state.evaluations[str(state.step)] = self.evaluator(self.console, state.step)
        folder.write_metrics(state.step, result, "eval")
        k = self.config.evaluation.k
        shown = [name for name in (f"avg@{k}", f"pass@{k}", "greedy") if name in result]
        self.console.log("  held-out  " + "  ".join(f"{name} {result[name]:.3f}" for name in shown))

    def close(self) -> None:
        self.audit.close()
        self.rollouts.close()
        self.reward.close()
        self.engine.close()


def num_batches(minibatches: Sequence[MiniBatch]) -> int:
    return sum(len(m.batches) for m in minibatches)


def shuffle_rewards(groups: Sequence[Group], *, seed: int) -> None:
    """Deal the rewards out at random: the negative control, which must not learn."""
    samples = [s for g in groups for s in g.samples]
    rewards = [s.reward for s in samples]
    random.Random(seed).shuffle(rewards)
    for sample, reward in zip(samples, rewards, strict=True):
        sample.reward = reward


def rollout_sums(groups: Sequence[Group], replicas: int) -> Sums:
    """What the responses say by themselves; `response_tokens` is the total over all replicas."""
    sums = Sums()
    samples = [s for g in groups for s in g.samples]
    scored = [s.reward for s in samples if s.reward is not None]
    sums.add("reward", sum(scored), len(scored))
    for name in sorted({name for s in samples for name in s.reward_parts}):
        parts = [s.reward_parts[name] for s in samples if name in s.reward_parts]
        sums.add(f"reward/{name}", sum(parts), len(parts))
    sums.add("reward_failed", len(samples) - len(scored), len(samples))
    sums.add("response_length", sum(len(s.token_ids) for s in samples), len(samples))
    sums.add_max("response_length_max", max((len(s.token_ids) for s in samples), default=0))
    sums.add("response_tokens", sum(len(s.token_ids) for s in samples), 1 / replicas)
    sums.add("truncated", sum(s.finish_reason == "length" for s in samples), len(samples))
    for group in groups:
        distinct = {s.reward for s in group.samples if s.reward is not None}
        sums.add("zero_variance_groups", len(distinct) <= 1)
    return sums


def staleness(groups: Sequence[Group], version: int) -> Sums:
    """How many versions the weights that drew a sample (the oldest of them) are behind `version`."""
    sums = Sums()
    ages = [version - s.weight_version for g in groups for s in g.samples if s.weight_versions]
    sums.add("staleness", sum(ages), len(ages))
    return sums
