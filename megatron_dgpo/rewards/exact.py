"""Rewards that compare strings."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dgpo.rewards.answers import gold_answer
from megatron_dgpo.rewards.answers.choices import choice, chosen
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


@register("multiple_choice")
class MultipleChoice(Reward):
    r"""1 where the response chooses the gold letter, else 0.

    The choice is in what the last ``\boxed{}``, ``<answer>``, ``####`` or line ``Answer:`` announces, such as
    C, (c), "C. seven" or "I think it is C"; without any of these, in the last sentence that names a choice,
    of a response that ended by itself. Several letters are no choice, and one that is denied is none either.
    A gold answer without a letter fails the sample.
    """

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._outcome(sample) for sample in samples]

    def _outcome(self, sample: Sample) -> Outcome:
        gold = chosen(gold_answer(sample.prompt.answer))
        if gold is None:
            return Outcome(error=f"the gold answer {sample.prompt.answer[-100:]!r} is no letter")
        answer = self.answer_of(sample)
        return Outcome(float(answer == gold), {"answered": float(answer is not None)})

    def answer_of(self, sample: Sample) -> str | None:
        return choice(sample.text, sample.finish_reason == "stop")

    def canonical_answer(self, text: str) -> str | None:
        return choice(text, finished=True)

    def response_with(self, answer: str) -> str:
        return f"Answer: {answer}"
