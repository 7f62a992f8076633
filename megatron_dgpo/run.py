"""What the supervised and the reinforcement run share: folder, state, policy, evaluation, signals."""

from __future__ import annotations

import dataclasses
import logging
import math
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_dgpo import platform, torchrun
from megatron_dgpo.checks import AnyConfig
from megatron_dgpo.cli import dump_toml
from megatron_dgpo.config import Config
from megatron_dgpo.config.algorithms import PPOConfig
from megatron_dgpo.critic import Critic
from megatron_dgpo.data.tokenizer import load_tokenizer
from megatron_dgpo.evaluation.metrics import summarize
from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore
from megatron_dgpo.mcore.model import ModelShape, build_model
from megatron_dgpo.mcore.policy import Policy
from megatron_dgpo.mcore.value import ValueModel
from megatron_dgpo.observe import credit_log
from megatron_dgpo.observe.advisories import FILE as ADVISORIES
from megatron_dgpo.observe.advisories import GAP_FLOORS, Advisory, AdvisoryWriter
from megatron_dgpo.observe.console import Console
from megatron_dgpo.observe.meters import Sums
from megatron_dgpo.observe.metrics import FILE as METRICS
from megatron_dgpo.observe.metrics import MetricsWriter, read_metrics
from megatron_dgpo.observe.run_info import write_versions
from megatron_dgpo.observe.wandb_run import WandbRun
from megatron_dgpo.rewards import Reward
from megatron_dgpo.rollout.collect import Recover, collect
from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.rollout.engine import Engine, SamplingParams
from megatron_dgpo.rollout.policies import samples_of
from megatron_dgpo.types import Prompt
from megatron_dgpo.weights import convert
from megatron_dgpo.weights.export import shared_tensors

if TYPE_CHECKING:
    from megatron_dgpo.rollout.sglang.engine import SGLangEngine

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StopSignal:
    """SIGTERM asks the run to save and end after the current step."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_any_rank(self, groups: platform.Groups) -> bool:
        return platform.any_rank(self._asked, groups)


@dataclass
class RunState:
    """What a resumed run knows of its past; saved with every checkpoint."""

    step: int = 0
    """Steps completed."""
    draws: int = 0
    """Draws of prompts that these steps took: the number of the next one."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Step -> metrics."""

    def to_json(self, groups: platform.Groups, k: int) -> dict[str, Any]:
        score = self.evaluations.get(str(self.step), {}).get(f"avg@{k}")
        score = score if score is not None and math.isfinite(score) else None
        return {**dataclasses.asdict(self), "score": score, "world_size": groups.world_size}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> RunState:
        # Before steps could take several draws, each took one.
        draws = state.get("draws", state["step"])
        return cls(step=state["step"], draws=draws, evaluations=state["evaluations"])


class RunFolder:
    """`<folder>`: resolved config, versions, metrics, samples, credit, checkpoints, exported policy."""

    def __init__(self, config: AnyConfig, groups: platform.Groups) -> None:
        self.path = config.run.folder
        self.checkpoints = CheckpointStore(
            self.path / "checkpoints",
            groups,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            timeout_seconds=config.checkpoint.timeout_seconds,
        )
        self.hf = self.path / "hf"
        self.metrics: MetricsWriter | None = None
        self.advisories: AdvisoryWriter | None = None
        if groups.rank == 0:
            (self.path / "config.toml").write_text(dump_toml(config))
            write_versions(self.path)
            sinks, wandb = config.observe, None
            if sinks.wandb_project:
                wandb = WandbRun(self.path, sinks.wandb_project, config.model_dump(mode="json"))
            self.metrics = MetricsWriter(self.path, tensorboard=sinks.tensorboard, wandb=wandb)
            if isinstance(config, Config):
                self.advisories = AdvisoryWriter(self.path, GAP_FLOORS[config.model.params_dtype])

    def begin_after(self, step: int, *, evaluated: bool = True) -> None:
        """Keep what a run that goes on from `step` does not write again (see `truncate_after`)."""
        if self.metrics is None:
            return
        self.metrics.truncate_after(step, evaluated=evaluated)
        if self.advisories is not None:
            self.advisories.restart(read_metrics(self.path, "train"))

    def write_metrics(self, step: int, values: dict[str, float], phase: str) -> list[Advisory]:
        """Returns the advisories that a row of training begins, on the rank that writes."""
        if self.metrics is None:
            return []
        self.metrics.write(step, values, phase=phase)  # type: ignore[arg-type]
        if self.advisories is None or phase != "train":
            return []
        return self.advisories.add({"step": step, **values})

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def restore_or_start(
    policy: Policy, folder: RunFolder, console: Console, *, resume: bool, critic: Policy | None = None
) -> RunState:
    """The state of the newest complete checkpoint, loaded into the policy, or a fresh one."""
    latest = folder.checkpoints.latest() if resume else None
    if resume:
        credit_log.truncate_after(folder.path, 0 if latest is None else latest.step)
    if latest is None:
        folder.begin_after(-1)
        return RunState()
    restore(policy, latest, critic)
    state = RunState.from_json(latest.state)
    folder.begin_after(latest.step, evaluated=str(latest.step) in state.evaluations)
    torchrun.reached(state.step)
    console.log(f"resumed from {latest.path}: {latest.step} steps done")
    return state


def build_policy(
    config: AnyConfig, groups: platform.Groups, *, total_updates: int, keep_reference: bool
) -> Policy:
    """The model with its start weights, wrapped for training. The reference is the start policy."""
    shape = ModelShape.of(config.model)
    model = build_model(
        shape,
        config.parallel,
        groups,
        params_dtype=DTYPES[config.model.params_dtype],
        layer_spec=config.model.layer_spec,
        overrides=config.model.transformer,
    )
    if config.model.init == "random":
        convert.load_hf(model, groups, *convert.random_source(config.model.path, config.run.seed))
    else:
        convert.load_folder(model, groups, config.model.path)
    return Policy(
        model,
        groups,
        config.optimizer,
        total_updates=total_updates,
        ddp=config.ddp,
        reference=config.model.reference_placement if keep_reference else None,
    )


def build_critic(config: Config, groups: platform.Groups, *, total_updates: int) -> Critic:
    """A value model with the start policy's transformer, and PPO's settings. Raises ValueError for another
    algorithm, which has none."""
    algorithm = config.algorithm
    if not isinstance(algorithm, PPOConfig):
        raise ValueError(f"algorithm.name: {algorithm.name}: a value model takes its settings from 'ppo'")
    shape = ModelShape.of(config.model)
    model = build_model(
        shape,
        config.parallel,
        groups,
        params_dtype=DTYPES[config.model.params_dtype],
        layer_spec=config.model.layer_spec,
        overrides=config.model.transformer,
        kind=ValueModel,
    )
    if config.model.init == "random":
        source = convert.random_source(config.model.path, config.run.seed)
    else:
        source = convert.folder_source(config.model.path, shape)
    convert.load_trunk(model, groups, shape, *source)
    optimizer = config.optimizer.model_copy(
        update={"lr": algorithm.critic_lr, "min_lr": min(config.optimizer.min_lr, algorithm.critic_lr)}
    )
    return Critic(Policy(model, groups, optimizer, total_updates=total_updates, ddp=config.ddp), algorithm)


def build_engine(
    config: AnyConfig, groups: platform.Groups, policy: Policy | None = None
) -> EmbeddedEngine | SGLangEngine:
    """The engine that the config names; collective. An embedded one shares the weights of a policy that does
    not train while it generates, as far as it can."""
    if isinstance(config, Config) and config.rollout.engine == "sglang":
        return _sglang_engine(config, groups)
    engine = EmbeddedEngine(
        config.model.path,
        dtype=DTYPES[config.model.params_dtype],
        device=groups.device,
        max_batch_size=config.rollout.max_batch_size,
    )
    if policy is not None and not (isinstance(config, Config) and config.train.async_steps):
        engine.share(shared_tensors(policy.model, groups), lambda: policy.updates)
    return engine


def _sglang_engine(config: Config, groups: platform.Groups) -> SGLangEngine:
    from megatron_dgpo.rollout.sglang.engine import SGLangEngine  # with aiohttp, for such runs alone
    from megatron_dgpo.rollout.sglang.fleet import Fleet

    c, shape = config.rollout.sglang, ModelShape.of(config.model)
    tokenizer = load_tokenizer(config.model.path)
    fleet = Fleet(
        c,
        groups,
        model_path=config.model.path,
        dtype=config.model.params_dtype,
        log_folder=config.run.folder / "servers",
    )
    return SGLangEngine(
        fleet,
        groups,
        c,
        config.sync,
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        max_new_tokens=config.rollout.max_new_tokens,
    )


class Evaluator:
    """avg@k and the rest on held-out prompts, which all ranks share out."""

    def __init__(
        self,
        config: AnyConfig,
        groups: platform.Groups,
        engine: Engine,
        reward: Reward,
        prompts: Sequence[Prompt],
        stop_token_ids: tuple[int, ...],
        recover: Recover | None = None,
    ) -> None:
        self._c = config.evaluation
        self._groups = groups
        self._engine = engine
        self._reward = reward
        self._prompts = prompts
        self._recover = recover
        # The same random numbers at every evaluation: differences are the policy's.
        self._params = SamplingParams(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=self._c.temperature,
            top_p=self._c.top_p,
            n=self._c.k,
            seed=config.run.seed,
            stop_token_ids=stop_token_ids,
        )

    def __call__(self, console: Console, step: int) -> dict[str, float]:
        metrics = self._run(self._params, console, f"evaluation at step {step}")
        if self._c.greedy:
            greedy = self._run(dataclasses.replace(self._params, temperature=0.0, n=1), console, "greedy")
            metrics["greedy"] = greedy["avg@1"]
        return metrics

    def _run(self, params: SamplingParams, console: Console, name: str) -> dict[str, float]:
        world = self._groups.world
        share = len(self._prompts[world.rank() :: world.size()]) * params.n
        with console.phase(name, share, samples_of(self._groups)) as bar:
            groups = collect(
                self._engine,
                self._reward.score,
                self._prompts,
                params,
                world,
                recover=self._recover,
                on_progress=bar.update,
            )
        return summarize(groups, params.n)


def merge_over_ranks(sums: Sums, groups: platform.Groups) -> dict[str, float]:
    """Means and maxima over all data-parallel replicas, the same on every rank.

    One rank a replica has seen the loss; the others' sums repeat it and are left out.
    """
    merged = Sums()
    for part in platform.gather_objects(sums.on_host() if groups.speaks_for_tokens else None, groups.world):
        if part is not None:
            merged.merge(part)
    return merged.values()


def peak_memory(groups: platform.Groups) -> dict[str, int]:
    """Since the start, in bytes: the resident memory of all ranks together, and with GPUs what the fullest of
    them had allocated."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit], device=groups.device)
    dist.all_reduce(peak, group=groups.world)
    found = {"memory/peak_rss_bytes": int(peak.item())}
    if platform.has_gpu():
        peak.fill_(torch.cuda.max_memory_allocated(groups.device))
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=groups.world)
        found["memory/peak_gpu_bytes"] = int(peak.item())
    return found


def finish(
    config: AnyConfig,
    policy: Policy,
    folder: RunFolder,
    state: RunState,
    console: Console,
    seconds: float,
) -> None:
    """Export the policy, and say what came out and where it is."""
    if config.checkpoint.export_hf:
        convert.save_hf(policy.model, policy.groups, config.model.path, folder.hf)
    rows = []
    names = [
        f"avg@{config.evaluation.k}",
        f"pass@{config.evaluation.k}",
        f"cons@{config.evaluation.k}",
        "greedy",
    ]
    for step, result in sorted(state.evaluations.items(), key=lambda item: int(item[0])):
        rows.append(
            {"step": int(step)}
            | {name: result[name] for name in names if name in result}
            | {"truncated": result["truncation_rate"], "problems": int(result["num_problems"])}
        )
    if rows:
        console.table("Held-out accuracy", rows)
    console.table(
        "This run",
        [
            {"what": "steps", "value": str(state.step)},
            {"what": "time", "value": f"{seconds:.0f} s (since the last start)"},
            *({"what": what, "value": value} for what, value in _what_to_open(config, folder)),
        ],
    )


def _what_to_open(config: AnyConfig, folder: RunFolder) -> Iterator[tuple[str, str]]:
    yield "metrics", str(folder.path / METRICS)
    if folder.advisories is not None and folder.advisories.raised:
        names = dict.fromkeys(advisory.name for advisory in folder.advisories.raised)
        yield "advisories", f"{', '.join(names)}: {folder.path / ADVISORIES}"
    if isinstance(config, Config):
        if config.observe.samples_per_step:
            yield "samples", str(folder.path / "samples")
        if config.observe.credit_every:
            yield "credit, in one page", f"python tools/credit_report.py {folder.path}"
        yield "all runs, in a browser", f"python -m megatron_dgpo.observe.inspect {folder.path.parent}"
    yield "checkpoints", str(folder.checkpoints.folder)
    if config.checkpoint.export_hf:
        yield "policy (HF)", str(folder.hf)
