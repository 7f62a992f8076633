"""Rewards that compare strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_dgpo.rewards.answers import explicit_answer, gold_answer, strip_wrapping
from megatron_dgpo.rewards.base import Outcome, Reward, register
from megatron_dgpo.types import Sample


@register("exact_match")
class ExactMatch(Reward):
    """1 where the response text is the gold answer, space around both aside; else 0."""

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._outcome(sample) for sample in samples]

    def _outcome(self, sample: Sample) -> Outcome:
        answer = self.answer_of(sample)
        correct = answer == gold_answer(sample.prompt.answer)
        return Outcome(float(correct), {"answered": float(answer is not None)})

    def answer_of(self, sample: Sample) -> str | None:
        return self.canonical_answer(sample.text)

    def canonical_answer(self, text: str) -> str | None:
        return text.strip() or None


@register("hash_answer")
class HashAnswer(Reward):
    """1 where the policy stopped by itself and the text after the last ``#`` is the gold answer; else 0.

    The text is compared as it is, without the stop token: ``#2`` answers 2, ``#12`` and ``#2;`` do not.
    A response that was cut at the length limit gets 0.
    """

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._outcome(sample) for sample in samples]

    def _outcome(self, sample: Sample) -> Outcome:
        answer = self.answer_of(sample)
        correct = answer == gold_answer(sample.prompt.answer)
        return Outcome(float(correct), {"answered": float(answer is not None)})

    def answer_of(self, sample: Sample) -> str | None:
        return self.canonical_answer(sample.text) if sample.finish_reason == "stop" else None

    def canonical_answer(self, text: str) -> str | None:
        return text.rpartition("#")[2] or None if "#" in text else None

    def response_with(self, answer: str) -> str:
        return f"#{answer}"


LETTER = re.compile(r"(?:\\text\s*\{)?\s*\(?([A-Za-z])(?:\)|\.|:|\}|\s|$)")
IN_BRACKETS = re.compile(r"\(([A-Z])\)")


@register("multiple_choice")
class MultipleChoice(Reward):
    """1 where the response chooses the gold letter, else 0.

    The choice is the letter at the start of what the last ``\boxed{}``, ``####`` or line ``Answer:``
    announces, such as C, (c) or "C. seven"; without any of these, the last capital in brackets of a
    response that ended by itself. A gold answer that is not one letter fails the sample.
    """

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._outcome(sample) for sample in samples]

    def _outcome(self, sample: Sample) -> Outcome:
        gold = _letter(gold_answer(sample.prompt.answer))
        if gold is None:
            return Outcome(error=f"the gold answer {sample.prompt.answer[-100:]!r} is no letter")
        answer = self.answer_of(sample)
        return Outcome(float(answer == gold), {"answered": float(answer is not None)})

    def canonical_answer(self, text: str) -> str | None:
        announced = explicit_answer(text)
        if announced is not None:
            return _letter(announced)
        found = IN_BRACKETS.findall(text)
        return found[-1] if found else None

    def response_with(self, answer: str) -> str:
        return f"Answer: {answer}"


def _letter(answer: str) -> str | None:
    match = LETTER.match(strip_wrapping(answer))
    return match[1].upper() if match else None
