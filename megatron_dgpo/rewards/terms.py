"""Terms that are added to the reward for the answer: format, length, and DAPO's overlong punishment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dgpo.rewards.base import Outcome, Reward
from megatron_dgpo.types import Sample

CORRECT = "correct"
"""The part of a combined reward that the answer's reward gave."""
RESERVED = (CORRECT, "format", "length", "overlong")
"""Parts that the run itself gives; dynamic sampling reads the first."""
Term = Callable[[Sample], float]


def format_term(pattern: str) -> Term:
    """1 where the response text has a match of the regular expression, else 0 (^ and $ match at lines'
    ends, a dot matches everything). Raises ValueError for one that cannot be compiled."""
    try:
        compiled = re.compile(pattern, re.MULTILINE | re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
    return lambda sample: float(compiled.search(sample.text) is not None)


def length_term(free_tokens: int, max_tokens: int) -> Term:
    """0 up to `free_tokens`, down to -1 at `max_tokens` in a straight line, -1 beyond. Raises ValueError
    where the second is not above the first."""
    if not 0 <= free_tokens < max_tokens:
        raise ValueError(f"from {free_tokens} to {max_tokens} tokens: the second must be above the first")
    return lambda s: -min(1.0, max(0.0, (len(s.token_ids) - free_tokens) / (max_tokens - free_tokens)))


def overlong_term(buffer_tokens: int, max_tokens: int) -> Term:
    """The soft overlong punishment (Eq. 13, arXiv 2503.14476): 0 up to max_tokens - buffer_tokens, falling
    to -1 at `max_tokens`; a response that was cut there has -1."""
    inside = length_term(max_tokens - buffer_tokens, max_tokens)
    return lambda sample: -1.0 if sample.finish_reason == "length" else inside(sample)


class Combined(Reward):
    """The answer's reward plus weighted terms.

    What fails in it has no reward at all. Evaluations take `main` alone: a short wrong answer is not a little
    right.

    Args:
        main: the answer's reward; closed with this one.
        terms: (name, weight, term). A name may occur once.
    """

    def __init__(self, main: Reward, terms: Sequence[tuple[str, float, Term]]) -> None:
        super().__init__(timeout_seconds=main.timeout_seconds, num_workers=main.num_workers)
        self.main = main
        self._terms = list(terms)

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._add(s, o) for s, o in zip(samples, self.main.outcomes(samples), strict=True)]

    def _add(self, sample: Sample, outcome: Outcome) -> Outcome:
        if outcome.value is None:
            return outcome
        parts = {name: weight * term(sample) for name, weight, term in self._terms}
        value = outcome.value + sum(parts.values())
        return dataclasses.replace(
            outcome, value=value, parts={**outcome.parts, CORRECT: outcome.value, **parts}
        )

    def canonical_answer(self, text: str) -> str | None:
        return self.main.canonical_answer(text)

    def answer_of(self, sample: Sample) -> str | None:
        return self.main.answer_of(sample)

    def close(self) -> None:
        self.main.close()


def build_term(config: Any, *, max_new_tokens: int) -> Term:
    """The term of a FormatTerm, LengthTerm or OverlongTerm. Raises ValueError for settings that contradict
    each other."""
    if config.name == "format":
        return format_term(config.pattern)
    if config.name == "length":
        return length_term(config.free_tokens, config.max_tokens)
    buffer = config.buffer_tokens or max(1, max_new_tokens // 5)
    if buffer > max_new_tokens:
        raise ValueError(f"buffer_tokens {buffer} is above rollout.max_new_tokens {max_new_tokens}")
    return overlong_term(buffer, max_new_tokens)
