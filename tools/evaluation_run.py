"""What evaluate.py does once its options are right: read, draw, score and report."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dgpo import platform
from megatron_dgpo.config import LaunchConfig, ParallelConfig, SGLangConfig, SyncConfig
from megatron_dgpo.data import load_prompts
from megatron_dgpo.data.prompts import deduplicate
from megatron_dgpo.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_dgpo.evaluation.intervals import bootstrap_interval
from megatron_dgpo.evaluation.metrics import by_problem, summarize
from megatron_dgpo.evaluation.records import STOPS, WEIGHTS, SampleFile
from megatron_dgpo.evaluation.scoring import Scoring
from megatron_dgpo.learner import score_sequences
from megatron_dgpo.mcore.files import is_checkpoint
from megatron_dgpo.mcore.hf_config import ModelShape, remarks
from megatron_dgpo.mcore.model import build_model
from megatron_dgpo.mcore.policy import Frozen
from megatron_dgpo.observe.console import set_up_logging
from megatron_dgpo.progress import progress, watched
from megatron_dgpo.rewards import Reward, build_reward
from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.sglang.client import SampleLate
from megatron_dgpo.rollout.sglang.engine import SGLangEngine, WeightUpdateFailed
from megatron_dgpo.rollout.sglang.fleet import Fleet, FleetLost
from megatron_dgpo.types import Group, Prompt
from megatron_dgpo.weights import convert
from megatron_dgpo.weights.checkpoints import open_checkpoint
from megatron_dgpo.weights.fingerprint import fingerprint
from megatron_dgpo.weights.sync import WeightSync

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """What is evaluated: its folder with config.json and tokenizer, and what is in them."""

    folder: Path
    shape: ModelShape
    tokenizer: Any
    stop_ids: tuple[int, ...]


def open_model(options: argparse.Namespace) -> Model:
    """Raises what `open_checkpoint`, `ModelShape` and the tokenizer raise, and ValueError where nothing ends
    a response or servers cannot load the model."""
    folder, ignored = options.model, options.ignore_config_fields
    if is_checkpoint(folder):
        if options.servers_load:
            raise ValueError(
                f"--servers-load: SGLang reads Hugging Face folders, and {folder} is a checkpoint"
            )
        opened = open_checkpoint(folder, None, ignored)
        folder, shape, ignored = opened.beside, opened.shape, opened.ignored
    else:
        shape = ModelShape.from_folder(folder, ignored)
    for line in remarks(folder, ignored):
        log.warning("%s", line)
    tokenizer = load_tokenizer(folder)
    more = [int(token) if token.isdecimal() else token for token in options.stop_tokens]
    stops = stop_token_ids(folder, tokenizer, more, vocab_size=shape.vocab_size, key="--stop-tokens")
    if not stops:
        raise ValueError(
            f"{folder}: nothing ends a response (the tokenizer has no eos_token; see --stop-tokens)"
        )
    return Model(folder, shape, tokenizer, stops)


@dataclass(frozen=True)
class Places:
    """Where the server that this command starts computes, and how it gets the weights."""

    servers_load: bool
    devices: tuple[int, ...] = ()
    """GPUs; none: not for this command to say."""
    remark: str = ""


def place_servers(options: argparse.Namespace, gpus: int) -> Places:
    """A broadcast comes from this process's GPU, the first, where NCCL takes no second member: the server
    gets the next ones, or loads the weights itself where there are too few for that.

    Raises ValueError where there are too few for the server, or for a broadcast that is needed.
    """
    size, loads = options.server_tensor_parallel_size, options.servers_load
    if options.engine != "sglang" or options.url or not gpus:
        return Places(loads)
    if size > gpus:
        raise ValueError(f"--server-tensor-parallel-size {size}: there are {gpus} GPUs")
    if loads:
        return Places(True, tuple(range(size)))
    if size < gpus:
        return Places(False, tuple(range(1, 1 + size)))
    if is_checkpoint(options.model):
        raise ValueError(
            f"--server-tensor-parallel-size {size}: of {gpus} GPUs none is left for this process, which "
            f"broadcasts the weights, as SGLang cannot load {options.model}, a checkpoint: use fewer, or "
            "tools/convert_checkpoint.py and --servers-load"
        )
    return Places(
        True,
        tuple(range(size)),
        f"--servers-load is implied: the server takes all {gpus} GPUs, and a broadcast would need one more",
    )


def _gpus() -> int:
    """Those that this command may use; none where it computes on the CPU."""
    return platform.number_of_gpus() if platform.has_gpu() else 0


@dataclass(frozen=True)
class Problems:
    """What is asked."""

    prompts: list[Prompt]
    """Each problem once."""
    files: dict[str, list[str]]
    """A file's stem -> ids of the prompts that are its problems. One of two files is drawn once, for both."""


def load_problems(options: argparse.Namespace, model: Model) -> Problems:
    """Raises ValueError for a problem that is too long, or no problem at all."""
    prompts = load_prompts(
        options.data,
        model.tokenizer,
        prompt_key=options.prompt_key,
        answer_key=options.answer_key,
        apply_chat_template=not options.no_chat_template,
        system_prompt=options.system_prompt,
    )
    distinct = deduplicate(prompts)
    if len(distinct) < len(prompts):
        print(f"{len(prompts)} rows, {len(distinct)} distinct problems")
    distinct = distinct[: options.max_problems or None]
    if not distinct:
        raise ValueError(f"{options.data[0]}: there are no problems")
    limit = model.shape.max_positions
    for prompt in distinct:
        if (length := len(prompt.token_ids) + options.max_new_tokens) > limit:
            raise ValueError(
                f"{prompt.id}: {len(prompt.token_ids)} tokens and --max-new-tokens make {length}, and the "
                f"model has {limit} positions"
            )
    ids = {prompt.token_ids: prompt.id for prompt in distinct}
    files: dict[str, dict[str, None]] = {}
    for prompt in prompts:
        if prompt.token_ids in ids:
            files.setdefault(prompt.id.rpartition(":")[0], {})[ids[prompt.token_ids]] = None
    return Problems(distinct, {stem: list(of) for stem, of in files.items()})


def settings_of(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What the samples and their rewards depend on. Raises what `fingerprint` raises."""
    names = ("prompt_key", "answer_key", "system_prompt", "no_chat_template", "temperature", "top_p")
    names += ("max_new_tokens", "seed", "dtype", "k")
    found = {name: getattr(options, name) for name in names}
    if model.stop_ids != (model.tokenizer.eos_token_id,):
        found[STOPS] = list(model.stop_ids)
    module, _, function = options.reward.partition(":")
    source = importlib.util.find_spec(module) if function else None
    if source is not None and source.origin is not None and Path(source.origin).is_file():
        found["reward_source"] = hashlib.blake2b(Path(source.origin).read_bytes(), digest_size=8).hexdigest()
    found |= {"reward": options.reward, WEIGHTS: fingerprint(options.model)}
    return {"model": str(options.model), "data": options.data, **found}


def draw(
    options: argparse.Namespace,
    model: Model,
    prompts: list[Prompt],
    scoring: Scoring,
) -> None:
    """Draw the groups of `prompts`; `scoring` gets each as it is complete. Raises what the engine raises."""
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=1.0 if options.temperature == 0 else options.top_p,
        n=options.k,
        seed=options.seed,
        stop_token_ids=model.stop_ids,
    )
    failure: Exception | None = None
    with (
        platform.distributed(ParallelConfig(device=options.device), seed=options.seed) as groups,
        tempfile.TemporaryDirectory() as logs,
        progress("evaluate", len(prompts) * options.k, "samples") as bar,
    ):
        build = _sglang if options.engine == "sglang" else _embedded
        try:
            with closing(build(options, model, groups, Path(logs), prompts)) as engine:
                engine.generate(
                    prompts,
                    params,
                    on_progress=bar.update,
                    on_group=scoring.on_group,
                    should_stop=scoring.failed,
                )
        except (
            Exception
        ) as error:  # which would end the process here, before what is drawn is scored and kept
            failure = error
    if failure is not None:
        raise failure


def _embedded(
    options: argparse.Namespace, model: Model, groups: platform.Groups, logs: Path, prompts: list[Prompt]
) -> EmbeddedEngine:
    dtype = _DTYPES[options.dtype]
    engine = EmbeddedEngine(
        model.folder, dtype=dtype, device=groups.device, max_batch_size=options.batch_size
    )
    if is_checkpoint(options.model):
        stream = open_checkpoint(options.model, None, options.ignore_config_fields).stream()
    else:
        names, read = convert.folder_source(model.folder)
        stream = ((name, read(name)) for name in names)
    engine.update_weights(((name, tensor.to(dtype)) for name, tensor in stream), 0)
    return engine


def _sglang(
    options: argparse.Namespace, model: Model, groups: platform.Groups, logs: Path, prompts: list[Prompt]
) -> SGLangEngine:
    """Servers with the weights: broadcast from here and proved by the probe, or their own."""
    places = place_servers(options, _gpus())
    if places.remark:
        log.warning("%s", places.remark)
    shape, own = model.shape, places.servers_load
    launch = LaunchConfig(
        python=options.sglang_python,
        tensor_parallel_size=options.server_tensor_parallel_size,
        devices=places.devices,
        args={"load_format": "auto"} if own else {},
    )
    config = SGLangConfig(
        urls=tuple(options.url),
        launch=launch,
        request_timeout_seconds=options.request_timeout_seconds,
        min_tokens_per_second=options.min_tokens_per_second,
    )
    sync = SyncConfig()
    fleet = Fleet(config, groups, model_path=model.folder, dtype=options.dtype, log_folder=logs)
    engine = SGLangEngine(
        fleet,
        groups,
        config,
        sync,
        decode=partial(model.tokenizer.decode, skip_special_tokens=True),
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        max_new_tokens=options.max_new_tokens,
    )
    try:
        if own:
            engine.adopt(0)
        else:
            _broadcast(options, shape, groups, engine, sync, prompts)
    except BaseException:
        engine.close()
        raise
    return engine


def _broadcast(
    options: argparse.Namespace,
    shape: ModelShape,
    groups: platform.Groups,
    engine: SGLangEngine,
    sync: SyncConfig,
    prompts: list[Prompt],
) -> None:
    model = build_model(shape, ParallelConfig(), groups, params_dtype=_DTYPES[options.dtype])
    convert.load_folder(model, groups, options.model)
    score = partial(score_sequences, Frozen(model, groups), max_tokens=8192)
    WeightSync(model, groups, engine, sync, score, prompts).push(0)


class ServersLost(RuntimeError):
    """Drawing ended early; what was complete is kept."""


def evaluate(
    options: argparse.Namespace,
    model: Model,
    prompts: list[Prompt],
    reward: Reward,
    settings: dict[str, Any],
) -> list[Group]:
    """The groups of all problems, in order, scored; those that --out has are not drawn again.

    Raises ServersLost, saying what is kept; what `SampleFile` and the reward raise.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = SampleFile(options.out or Path(scratch) / "samples.jsonl", settings)
        kept = file.groups(prompts, options.k)
        missing = [p for p in prompts if p.id not in kept]

        def keep(group: Group) -> None:
            file.append(group)
            kept[group.prompt.id] = group

        if missing:
            if len(missing) < len(prompts):
                print(f"{len(prompts) - len(missing)} of {len(prompts)} problems are in {file.path} already")
            try:
                with Scoring(reward.score, keep) as scoring:
                    draw(options, model, missing, scoring)
            except (EnginesLost, FleetLost, SampleLate, WeightUpdateFailed) as error:
                done = f"{len(kept)} of {len(prompts)} problems are done"
                then = f"in {options.out}, from which the same command goes on" if options.out else "not kept"
                raise ServersLost(f"{error}; {done} and {then}") from error
        return [kept[p.id] for p in prompts]


def regrade(
    options: argparse.Namespace, prompts: list[Prompt], reward: Reward, settings: dict[str, Any]
) -> list[Group]:
    """The groups in --out, scored again; the file has the new scores, or is as it was."""
    file = SampleFile(options.out, settings, regrade=True)
    kept = file.groups(prompts, options.k)
    if missing := [p for p in prompts if p.id not in kept]:
        raise ValueError(f"{file.path} lacks samples of {len(missing)} problems, such as {missing[0].id}")
    if others := file.strangers(prompts):
        raise ValueError(
            f"{file.path} has samples of {len(others)} problems that are not asked for, such as {others[0]}: "
            "--regrade takes all (without --max-problems, and with the data that they were drawn for)"
        )
    if file.weights != settings[WEIGHTS]:
        print(
            f"{options.model} has changed since (fingerprint {settings[WEIGHTS]}): these are numbers of the "
            f"weights that drew the samples ({file.weights})"
        )
    groups = [kept[p.id] for p in prompts]
    for group in watched(groups, "regrade", len(groups), "problems"):
        reward.score(group.samples)
    file.rewrite(groups)
    return groups


def report(options: argparse.Namespace, name: str, groups: list[Group]) -> dict[str, Any]:
    """Print the metrics of some problems, with their intervals, and return them."""
    fewer = [1 << j for j in range((options.k - 1).bit_length())]
    metrics: dict[str, Any] = summarize(groups, options.k, fewer=fewer)
    print(f"{name}: {len(groups)} problems, {options.k} samples each")
    for metric, of in by_problem(groups, options.k, fewer=fewer).items():
        if of:
            low, high = bootstrap_interval(of, resamples=options.resamples, seed=options.seed)
            metrics[f"{metric}_low"], metrics[f"{metric}_high"] = low, high
            print(
                f"{metric:<10} {metrics[metric]:.4f}   95% of problems drawn again: {low:.4f} to {high:.4f}"
            )
    print(f"truncated  {metrics['truncation_rate']:.4f}   mean tokens {metrics['mean_response_tokens']:.1f}")
    if metrics["num_failed"]:
        print(f"failed     {metrics['num_failed']:.0f} samples have no reward (see reward_error in --out)")
    return metrics


def report_all(options: argparse.Namespace, problems: Problems, groups: list[Group]) -> dict[str, Any]:
    """The metrics of all problems, and under "files" those of each file."""
    by_id = {group.prompt.id: group for group in groups}
    metrics = report(options, str(options.model), groups)
    if len(problems.files) == 1:
        return {**metrics, "files": {stem: metrics for stem in problems.files}}
    files = {stem: report(options, stem, [by_id[i] for i in ids]) for stem, ids in problems.files.items()}
    return {**metrics, "files": files}


def run(options: argparse.Namespace) -> int:
    """The exit status of evaluate.py, whose options these are."""
    set_up_logging(False, 0)
    try:
        platform.use_device(options.device, 1, "--device")
        if not options.regrade:  # what follows takes long
            place_servers(options, _gpus())
        model = open_model(options)
        problems = load_problems(options, model)
        workers = options.reward_workers
        reward = build_reward(
            options.reward, timeout_seconds=options.reward_timeout_seconds, num_workers=workers
        )
        settings = settings_of(options, model)
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with reward:
        try:
            if options.regrade:
                groups = regrade(options, problems.prompts, reward, settings)
            else:
                groups = evaluate(options, model, problems.prompts, reward, settings)
        except (ValueError, ServersLost) as error:
            print(f"error: {error}", file=sys.stderr)
            return 3 if isinstance(error, ServersLost) else 2
    metrics = report_all(options, problems, groups)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(metrics, indent=1))
    return 0
