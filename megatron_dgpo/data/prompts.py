"""Prompt data sets, and the order in which a run goes through them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dgpo.data.problems import final, read_problems
from megatron_dgpo.data.rows import Renderer
from megatron_dgpo.data.tokenizer import encode
from megatron_dgpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_prompts(
    paths: Sequence[str | Path] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str,
    answer_key: str | None,
    apply_chat_template: bool,
    system_prompt: str = "",
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """Read prompts from .jsonl and .parquet files and hub data sets, in their order.

    `read_problems` says which rows are understood. An answer is kept as it stands, a worked GSM8K
    solution included: the reward reads it.

    With `apply_chat_template` the ids are those of the template with the generation prompt; without,
    those of the system prompt, a blank line and the prompt, after what the tokenizer puts before a text
    (see `encode`). Prompts of more than `max_prompt_tokens` tokens are left out and counted in the log.

    Prompt ids are "<file stem>:<row>", the first row being 1; a row's `data_source`, where it has one,
    is in the prompt's metadata.

    Raises FileNotFoundError for a missing file, and ValueError, naming file and row, for a row that is
    malformed, or where no prompt is left.
    """
    render = Renderer(tokenizer, apply_chat_template)
    found = [
        (problem, render(problem.messages, problem.at))
        for problem in read_problems(
            paths, prompt_key=prompt_key, answer_key=answer_key, system_prompt=system_prompt
        )
    ]
    tokens = encode(tokenizer, [text for _, text in found], add_special_tokens=not apply_chat_template)
    prompts = [
        Prompt(
            id=problem.id,
            token_ids=token_ids,
            text=text,
            answer=problem.answer,
            metadata={"data_source": problem.data_source} if problem.data_source else {},
        )
        for (problem, text), token_ids in zip(found, tokens, strict=True)
    ]
    empty = [prompt.id for prompt in prompts if not prompt.token_ids]
    if empty:
        raise ValueError(f"prompt {empty[0]} encodes to no tokens")
    return prompts if max_prompt_tokens is None else _without_long(prompts, max_prompt_tokens)


def _without_long(prompts: list[Prompt], max_prompt_tokens: int) -> list[Prompt]:
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}, expected at least 1")
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens]
    if len(kept) < len(prompts):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        logger.warning(
            "left out %d of %d prompts with more than max_prompt_tokens=%d tokens; the longest, %s, has %d",
            len(prompts) - len(kept), len(prompts), max_prompt_tokens, longest.id, len(longest.token_ids),
        )  # fmt: skip
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts have more than max_prompt_tokens={max_prompt_tokens} tokens"
        )
    return kept


def deduplicate(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each token sequence, in order; what was dropped is counted in the log.

    Evaluation files repeat each problem once per sample; a run draws its samples itself.

    Raises ValueError, naming both, for prompts with equal tokens and different answers.
    """
    first: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        known = first.setdefault(prompt.token_ids, prompt)
        if final(known.answer) != final(prompt.answer):
            raise ValueError(
                f"{known.id} and {prompt.id} are the same prompt with different answers, {known.answer!r} "
                f"and {prompt.answer!r} (tools/preprocess_data.py leaves such rows out)"
            )
    if len(first) < len(prompts):
        logger.info("%d prompts, %d of them distinct", len(prompts), len(first))
    return list(first.values())


class PromptCursor:
    """The order of the prompts, as a pure function of (seed, step): a resume needs the step alone.
    (Where a step of the run may draw prompts several times, a step here is a draw.)

    The data are the epochs end to end, each a seeded permutation of all prompts; the batch of step s
    is the positions s * batch_size up to (s + 1) * batch_size. So every prompt is seen exactly once an
    epoch, and no remainder of an epoch is dropped. No prompt occurs twice in a step: where a step
    spans the end of an epoch, the next epoch's permutation starts with prompts that the step lacks.

    Raises:
        ValueError: a size below 1, a batch above the number of prompts, or a negative seed.
    """

    def __init__(self, num_prompts: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        for name, value in (("num_prompts", num_prompts), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if batch_size > num_prompts:
            raise ValueError(f"{batch_size} prompts a step, but the data have only {num_prompts}")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0")
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """The prompts of a step, the first step being 0: `batch_size` distinct numbers below
        `num_prompts`."""
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        epoch, start = divmod(step * self.batch_size, self.num_prompts)
        part = self._order_of(epoch)[start : start + self.batch_size]
        if missing := self.batch_size - len(part):
            part = np.concatenate((part, self._order_of(epoch + 1)[:missing]))
        return part.tolist()

    def _order_of(self, epoch: int) -> np.ndarray:
        """An epoch's order follows from those before it; the last one is kept."""
        if epoch < self._epoch:
            self._epoch = -1
        while self._epoch < epoch:
            self._epoch += 1
            order = self._permutation(self._epoch)
            # Prompts of the step that the epoch before this one left unfinished.
            if left := self._epoch * self.num_prompts % self.batch_size:
                fresh = ~np.isin(order, self._order[-left:])
                head = np.flatnonzero(fresh)[: self.batch_size - left]
                order = np.concatenate((order[head], np.delete(order, head)))
            self._order = order
        return self._order

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        # numpy promises stable raw bits across its releases, but not stable permutations.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        return np.argsort(bits.random_raw(self.num_prompts), kind="stable")
