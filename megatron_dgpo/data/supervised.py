"""Prompt and response pairs for the supervised cold start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dgpo.config.sources import parse_sources
from megatron_dgpo.data.rows import Renderer, require, require_text, to_messages
from megatron_dgpo.data.sources import read_rows, where
from megatron_dgpo.data.tokenizer import encode
from megatron_dgpo.progress import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupervisedExample:
    """A prompt and the response to learn, which ends with a token that ends a response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def load_supervised(
    paths: Sequence[str | Path] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str,
    response_key: str,
    apply_chat_template: bool,
    max_tokens: int,
    system_prompt: str = "",
    stop_ids: Sequence[int] = (),
) -> list[SupervisedExample]:
    """Read prompts and responses from .jsonl and .parquet files, in file and row order.

    Prompts are encoded just as `load_prompts` encodes them; a response is its own tokens and, unless its
    last one is of `stop_ids`, the first of them (none given: the tokenizer's end-of-sequence token).
    Examples of more than `max_tokens` prompt and response tokens are left out, never cut, and counted in
    the log.

    Raises FileNotFoundError for a missing file, and ValueError, naming file and row, for a malformed
    row; ValueError too where nothing ends a response or no example is left.
    """
    if not stop_ids and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, with which every response has to end")
    stops = tuple(stop_ids) or (tokenizer.eos_token_id,)
    render = Renderer(tokenizer, apply_chat_template)
    prompts, responses = [], []
    for path in parse_sources(paths):
        rows = read_rows(path, [prompt_key, response_key])
        for number, row in watched(rows, f"reading {path}", unit="rows"):
            at = where(path, number)
            messages = to_messages(require(row, prompt_key, at), prompt_key, at, system_prompt)
            prompts.append(render(messages, at))
            responses.append(require_text(require(row, response_key, at), response_key, at))
    prompt_ids = encode(tokenizer, prompts, add_special_tokens=not apply_chat_template)
    response_ids = encode(tokenizer, responses, add_special_tokens=False)
    examples = [
        SupervisedExample(prompt, response if response and response[-1] in stops else (*response, stops[0]))
        for prompt, response in zip(prompt_ids, response_ids, strict=True)
    ]
    kept = [example for example in examples if example.num_tokens <= max_tokens]
    if len(kept) < len(examples):
        logger.warning(
            "left out %d of %d examples with more than max_tokens=%d tokens",
            len(examples) - len(kept), len(examples), max_tokens,
        )  # fmt: skip
    if not kept:
        raise ValueError(f"all {len(examples)} examples have more than max_tokens={max_tokens} tokens")
    return kept
