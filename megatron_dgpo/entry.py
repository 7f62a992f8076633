"""What happens before a run starts: its settings, its input files and its folder, checked and loaded.

Everything here ends the process with one line a problem and status 2 (see `cli.refusals`); nothing of
it needs a process group or a model.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import logging
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoTokenizer

from megatron_dgpo.algorithms import build_algorithm
from megatron_dgpo.checks import AnyConfig, check_passthrough, missing_number, read_json
from megatron_dgpo.cli import C, ConfigError, dump_toml, load_or_exit, validate
from megatron_dgpo.config import RESERVED_POSITIONS, Config, SFTConfig, SFTDataConfig
from megatron_dgpo.config.sources import HubDataset, parse_source
from megatron_dgpo.data import load_prompts, load_supervised
from megatron_dgpo.data.problems import read_problems
from megatron_dgpo.data.prompts import deduplicate
from megatron_dgpo.data.sources import read_rows
from megatron_dgpo.data.supervised import SupervisedExample
from megatron_dgpo.mcore.hf_config import FAMILIES, ModelShape
from megatron_dgpo.mcore.layers import have_transformer_engine
from megatron_dgpo.mcore.model import OWNED_TRANSFORMER_FIELDS
from megatron_dgpo.mcore.policy import OWNED_DDP_FIELDS, OWNED_OPTIMIZER_FIELDS
from megatron_dgpo.rewards import build_reward, build_term, reward_names
from megatron_dgpo.rollout.policies import prompts_per_draw
from megatron_dgpo.types import Prompt

log = logging.getLogger(__name__)


def parse(argv: Sequence[str], schema: type[C]) -> C:
    """Config from the command line, with the checks that need Megatron or the run folder.

    Ends the process with status 2 and one line a problem, printed by one rank, when it is refused.
    """
    return load_or_exit(
        argv,
        schema,
        extra_checks=(*MODEL_CHECKS, _used_folder, _resumed_run, _reward, _algorithm, _credit_log),
        inspect=_data_there,
    )


def _megatron_fields(config: AnyConfig) -> Iterator[str]:
    for section, given, cls in (
        ("model.transformer", config.model.transformer, TransformerConfig),
        ("ddp", config.ddp, DistributedDataParallelConfig),
        ("optimizer.megatron", config.optimizer.megatron, OptimizerConfig),
    ):
        yield from check_passthrough(section, given, dataclasses.fields(cls))
    for section, given, owned in (
        ("model.transformer", config.model.transformer, OWNED_TRANSFORMER_FIELDS),
        ("optimizer.megatron", config.optimizer.megatron, OWNED_OPTIMIZER_FIELDS),
        ("ddp", config.ddp, OWNED_DDP_FIELDS),
    ):
        for key in sorted(owned.keys() & given.keys()):
            yield f"{section}.{key}: follows from {owned[key]} and cannot be set"


def _used_folder(config: AnyConfig) -> Iterator[str]:
    folder = config.run.folder
    if files := [path for path in (folder, *folder.parents) if path.is_file()]:
        yield f"run.folder: {folder} cannot be made, since {files[0]} is a file; choose another folder"
    elif (folder / "metrics.jsonl").exists() and not config.run.resume:
        yield (
            f"run.folder: {folder} already holds a run (add --resume to go on with it, "
            "or choose another folder)"
        )


_MAY_CHANGE = {"run", "parallel", "ddp", "checkpoint", "observe", "sync"}
_MAY_CHANGE_KEYS = {
    *("train.steps", "train.max_tokens_per_microbatch", "evaluation.every", "rollout.max_batch_size"),
    *("rollout.engine", "rollout.sglang"),
    *("reward.timeout_seconds", "reward.num_workers", "model.layer_spec", "model.transformer"),
}


def _resumed_run(config: AnyConfig) -> Iterator[str]:
    """A resumed run is the same run: its data, model, algorithm and schedule may not change."""
    old = config.run.folder / "config.toml"
    if not config.run.resume or not old.is_file():
        return
    if not any((config.run.folder / "checkpoints").glob("step_*")):
        return  # nothing is resumed
    now = tomllib.loads(dump_toml(config))
    schema: Any = type(config)
    try:
        # Settings that the file does not have yet are at their defaults: as the run was.
        written = validate(tomllib.loads(old.read_text(encoding="utf-8")), schema)
    except ConfigError as error:
        yield f"run.folder: {old} is not of this release ({'; '.join(error.problems)})"
        return
    before = tomllib.loads(dump_toml(written))
    if before["run"]["seed"] != config.run.seed:
        yield f"run.seed: the run in {config.run.folder} has {before['run']['seed']}"
    for section in sorted((before.keys() | now.keys()) - _MAY_CHANGE):
        was, new = before.get(section, {}), now.get(section, {})
        for key in sorted(was.keys() | new.keys()):
            name = f"{section}.{key}"
            if was.get(key) != new.get(key) and name not in _MAY_CHANGE_KEYS:
                yield (
                    f"{name}: the run in {config.run.folder} has {was.get(key)!r}, not {new.get(key)!r}; "
                    "resume it with the same, or choose another folder"
                )


def _model_family(config: AnyConfig) -> Iterator[str]:
    hf = read_json(config.model.path / "config.json")
    if isinstance(hf, str) or (hf.get("model_type") in FAMILIES and missing_number(hf)):
        return  # megatron_dgpo.checks says so
    try:
        ModelShape.from_hf(hf)
    except (ValueError, KeyError) as error:
        yield f"model.path: {config.model.path}: {error}"


def _layer_spec(config: AnyConfig) -> Iterator[str]:
    if config.model.layer_spec == "transformer_engine" and not have_transformer_engine():
        yield (
            "model.layer_spec: 'transformer_engine' needs Transformer Engine and a GPU; "
            "'auto' and 'torch' do without"
        )


def _algorithm(config: AnyConfig) -> Iterator[str]:
    """One of the user's own is imported, and says itself what is wrong with its settings."""
    if not isinstance(config, Config) or ":" not in config.algorithm.name:
        return
    try:
        built = build_algorithm(config.algorithm, vocab_size=2, max_response_tokens=1)
    except ValueError as error:
        yield f"algorithm.name: {config.algorithm.name}: {error}"
        return
    if built.needs_critic:
        yield (
            f"algorithm.name: {config.algorithm.name} needs a critic, whose settings are those of 'ppo' "
            "alone; set needs_critic = False, or use 'ppo'"
        )


def _credit_log(config: AnyConfig) -> Iterator[str]:
    if isinstance(config, Config) and config.observe.credit_every:
        if importlib.util.find_spec("pyarrow") is None:
            yield "observe.credit_every: the credit log needs the package pyarrow; 0 goes without it"


MODEL_CHECKS = (_megatron_fields, _model_family, _layer_spec)
"""Of what a model is built and trained with; the others are of the run around it."""


def _reward(config: AnyConfig) -> Iterator[str]:
    c = config.reward
    if ":" in c.name:
        try:
            build_reward(c.name)
        except ValueError as error:
            yield f"reward.name: {c.name}: {error}"
    elif c.name not in reward_names():
        yield (
            f"reward.name: {c.name!r} is not one of {', '.join(reward_names())}, or 'package.module:function'"
        )
    elif c.name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        yield "reward.name: 'math_verify' needs the package math-verify"
    if isinstance(config, Config):
        yield from _reward_terms(config)


def _reward_terms(config: Config) -> Iterator[str]:
    terms = config.reward.terms
    for k, term in enumerate(terms):
        try:
            build_term(term, max_new_tokens=config.rollout.max_new_tokens)
        except ValueError as error:
            yield f"reward.terms.{k}: {term.name}: {error}"
        if term.name in [t.name for t in terms[:k]]:
            yield f"reward.terms.{k}: {term.name} occurs twice"


# --- input files and folder -------------------------------------------------------------------------


def load_tokenizer(config: AnyConfig) -> Any:
    """The model folder's tokenizer. Raises ValueError where it cannot end a response."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: the tokenizer of {config.model.path} has no eos_token, which ends a response"
        )
    return tokenizer


def load_train(config: Config, tokenizer: Any) -> list[Prompt]:
    """The prompts to train on.

    Raises ValueError or OSError, naming file and row, for what cannot be read, and ConfigError where a step
    takes more of them.
    """
    prompts = load_prompts(
        config.data.train,
        tokenizer,
        prompt_key=config.data.prompt_key,
        answer_key=config.data.answer_key,
        apply_chat_template=config.data.apply_chat_template,
        system_prompt=config.data.system_prompt,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )
    key = "rollout.oversampling" if config.rollout.oversampling > 1 else "train.prompts_per_step"
    require_prompts(key, prompts_per_draw(config), len(prompts))
    return prompts


def load_examples(config: SFTConfig, tokenizer: Any) -> list[SupervisedExample]:
    """The same for a supervised run."""
    examples = load_supervised(
        config.data.train,
        tokenizer,
        prompt_key=config.data.prompt_key,
        response_key=config.data.response_key,
        apply_chat_template=config.data.apply_chat_template,
        max_tokens=config.data.max_tokens,
        system_prompt=config.data.system_prompt,
    )
    require_prompts("train.batch_size", config.train.batch_size, len(examples))
    return examples


def load_heldout(config: AnyConfig, tokenizer: Any) -> list[Prompt]:
    """The evaluation's prompts, each problem once."""
    if not config.evaluation.data:
        return []
    prompts = deduplicate(
        load_prompts(
            config.evaluation.data,
            tokenizer,
            prompt_key=config.evaluation.prompt_key,
            answer_key=config.evaluation.answer_key,
            apply_chat_template=config.data.apply_chat_template,
            system_prompt=config.data.system_prompt,
        )
    )
    prompts = prompts[: config.evaluation.max_problems or None]
    limit = ModelShape.from_folder(config.model.path).max_positions
    if isinstance(config, Config) and config.rollout.engine == "sglang":
        limit -= RESERVED_POSITIONS
    for prompt in prompts:
        if (length := len(prompt.token_ids) + config.rollout.max_new_tokens) > limit:
            raise ValueError(
                f"evaluation.data, {prompt.id}: {len(prompt.token_ids)} tokens and rollout.max_new_tokens "
                f"make {length}, and the model has {limit} positions for them"
            )
    return prompts


def _data_there(config: AnyConfig) -> Iterator[str]:
    """What a dry run finds in the data: all that a run reads where all of it is there, and the tokenizer;
    otherwise the rows of the files that are."""
    tokenizer = load_tokenizer(config) if (config.model.path / "tokenizer.json").is_file() else None
    for key, sources in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        parsed = [parse_source(text) for text in sources]
        files = [source for source in parsed if isinstance(source, Path) and source.is_file()]
        rows = sum([_rows(config, key, file) for file in files])
        if rows:
            yield f"{key}: {rows:,} rows in {len(files)} of {len(parsed)} sources"
        yield from (f"{key}: {s} is not looked at by a dry run" for s in parsed if isinstance(s, HubDataset))
        if not files or len(files) < len(parsed):
            continue
        if tokenizer is None:
            yield f"{key}: how long they are in tokens is not known without the tokenizer"
            continue
        if key == "evaluation.data":
            what, lengths = "problems", [len(p.token_ids) for p in load_heldout(config, tokenizer)]
        elif isinstance(config, Config):
            what, lengths = "prompts", [len(p.token_ids) for p in load_train(config, tokenizer)]
        else:
            what, lengths = "examples", [e.num_tokens for e in load_examples(config, tokenizer)]
        mean = sum(lengths) / len(lengths)
        yield (
            f"{key}: {len(lengths):,} {what} that are used, of {min(lengths):,} to {max(lengths):,} tokens, "
            f"{mean:,.1f} in the mean"
        )


def _rows(config: AnyConfig, key: str, file: Path) -> int:
    """Raises ValueError for a row that is malformed."""
    section = config.evaluation if key == "evaluation.data" else config.data
    if isinstance(section, SFTDataConfig):
        return sum(1 for _ in read_rows(file, [section.prompt_key, section.response_key]))
    found = read_problems([file], prompt_key=section.prompt_key, answer_key=section.answer_key)
    return sum(1 for _ in found)


def require_prompts(key: str, wanted: int, given: int) -> None:
    """Raises ConfigError when the data have fewer rows than a step takes: none may occur twice in it."""
    if wanted > given:
        raise ConfigError([f"{key}: {wanted} is more than the {given} rows of data.train"])


def claim(folder: Path) -> IO[str] | None:
    """Lock a run's folder for this process, on the rank that writes it; held until the file is closed.

    Raises:
        ConfigError: another run holds it, such as one that has not ended yet.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError([f"run.folder: another run is writing to {folder}; wait until it ends"]) from None
    except OSError as error:  # some network file systems have no locks
        log.warning("%s is not locked against a second run: %s", folder, error)
    return file
