"""What a run reads before it builds anything: the tokenizer, and the rows of its data files.

What cannot be read is told by file and row. Needs transformers, and neither Megatron nor process groups.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgpo.checks import AnyConfig, beyond_vocabulary, tokenizer_files
from megatron_dgpo.cli import ConfigError
from megatron_dgpo.config import RESERVED_POSITIONS, Config, SFTConfig, SFTDataConfig
from megatron_dgpo.config.sources import HubDataset, parse_source
from megatron_dgpo.data import SupervisedExample, deduplicate, load_prompts, load_supervised
from megatron_dgpo.data import tokenizer as tokenizers
from megatron_dgpo.data.problems import read_problems
from megatron_dgpo.data.sources import read_rows
from megatron_dgpo.mcore.hf_config import ModelShape, remarks
from megatron_dgpo.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Of a reinforcement run."""

    prompts: list[Prompt]
    heldout: list[Prompt]
    stop_ids: tuple[int, ...]
    tokenizer: Any


@dataclass(frozen=True)
class SupervisedData:
    """Of a supervised run."""

    examples: list[SupervisedExample]
    heldout: list[Prompt]
    stop_ids: tuple[int, ...]


def load_data(config: Config) -> Data:
    """Raises ValueError or OSError, naming file and row, for what cannot be read."""
    _warn_of_model(config)
    tokenizer = load_tokenizer(config)
    stop_ids = load_stop_ids(config, tokenizer)
    log.info("%s", _stop_note(tokenizer, stop_ids))
    return Data(load_train(config, tokenizer), load_heldout(config, tokenizer), stop_ids, tokenizer)


def load_supervised_data(config: SFTConfig) -> SupervisedData:
    """Raises ValueError or OSError, naming file and row, for what cannot be read."""
    _warn_of_model(config)
    tokenizer = load_tokenizer(config)
    stop_ids = load_stop_ids(config, tokenizer)
    log.info("%s", _stop_note(tokenizer, stop_ids))
    return SupervisedData(
        load_examples(config, tokenizer, stop_ids), load_heldout(config, tokenizer), stop_ids
    )


def load_tokenizer(config: AnyConfig) -> Any:
    """The model folder's tokenizer. Raises ValueError where it cannot be loaded, or where it has ids that the
    model has not and that `checks` could not see."""
    try:
        tokenizer = tokenizers.load_tokenizer(config.model.path)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from error
    if tokenizer_files(config.model.path) == ("tokenizer.model",):
        for problem in beyond_vocabulary(
            tokenizer.get_vocab().values(), ModelShape.of(config.model).vocab_size
        ):
            raise ValueError(problem)
    return tokenizer


def load_stop_ids(config: AnyConfig, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a response (see `data.tokenizer.stop_token_ids`). Raises ValueError for a
    setting or file that names no token, or where nothing ends a response."""
    folder, size = config.model.path, ModelShape.of(config.model).vocab_size
    ids = tokenizers.stop_token_ids(folder, tokenizer, config.rollout.stop_tokens, vocab_size=size)
    if not ids:
        raise ValueError(
            f"model.path: the tokenizer of {folder} has no eos_token, which ends a response; nor do "
            "generation_config.json, config.json and rollout.stop_tokens name one"
        )
    return ids


def _stop_note(tokenizer: Any, stop_ids: Sequence[int]) -> str:
    """What ends a response, for people."""
    tokens = zip(stop_ids, tokenizer.convert_ids_to_tokens(stop_ids), strict=True)
    return "rollout: a response ends with " + " or ".join(f"{token!r} ({i})" for i, token in tokens)


def _warn_of_model(config: AnyConfig) -> None:
    """Say on one rank which fields of config.json are passed over."""
    if os.environ.get("RANK", "0") == "0":
        for line in remarks(config.model.path, config.model.ignore_config_fields):
            log.warning("%s", line)


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
    require_prompts(key, config.prompts_per_draw, len(prompts))
    return prompts


def load_examples(config: SFTConfig, tokenizer: Any, stop_ids: Sequence[int]) -> list[SupervisedExample]:
    """The same for a supervised run."""
    examples = load_supervised(
        config.data.train,
        tokenizer,
        prompt_key=config.data.prompt_key,
        response_key=config.data.response_key,
        apply_chat_template=config.data.apply_chat_template,
        max_tokens=config.data.max_tokens,
        system_prompt=config.data.system_prompt,
        stop_ids=stop_ids,
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
    limit = ModelShape.of(config.model).max_positions
    if isinstance(config, Config) and config.rollout.engine == "sglang":
        limit -= RESERVED_POSITIONS
    for prompt in prompts:
        if (length := len(prompt.token_ids) + config.rollout.max_new_tokens) > limit:
            raise ValueError(
                f"evaluation.data, {prompt.id}: {len(prompt.token_ids)} tokens and rollout.max_new_tokens "
                f"make {length}, and the model has {limit} positions for them"
            )
    return prompts


def data_there(config: AnyConfig) -> Iterator[str]:
    """What a dry run finds in the data: all that a run reads where all of it is there, and the tokenizer;
    otherwise the rows of the files that are."""
    for line in remarks(config.model.path, config.model.ignore_config_fields):
        yield f"model.path: {line}"
    tokenizer, stop_ids = None, tuple[int, ...]()
    for key, sources in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        parsed = [parse_source(text) for text in sources]
        files = [source for source in parsed if isinstance(source, Path) and source.is_file()]
        rows = sum([_rows(config, key, file) for file in files])
        if rows:
            yield f"{key}: {rows:,} rows in {len(files)} of {len(parsed)} sources"
        yield from (f"{key}: {s} is not looked at by a dry run" for s in parsed if isinstance(s, HubDataset))
        if not files or len(files) < len(parsed):
            continue
        if not tokenizer_files(config.model.path):
            yield f"{key}: how long they are in tokens is not known without the tokenizer"
            continue
        if tokenizer is None:
            tokenizer = load_tokenizer(config)
            stop_ids = load_stop_ids(config, tokenizer)
            yield _stop_note(tokenizer, stop_ids)
        if key == "evaluation.data":
            what, lengths = "problems", [len(p.token_ids) for p in load_heldout(config, tokenizer)]
        elif isinstance(config, Config):
            what, lengths = "prompts", [len(p.token_ids) for p in load_train(config, tokenizer)]
        else:
            what, lengths = "examples", [e.num_tokens for e in load_examples(config, tokenizer, stop_ids)]
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
