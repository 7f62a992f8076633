"""Rewards that compare strings."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dgpo.rewards.answers import gold_answer
from megatron_dgpo.rewards.base import Outcome, Reward, register
from megatron_dgpo.types import Sample


@register("exact_match")
class ExactMatch(Reward):
    """1 where the response text is the gold answer, space around both aside; else 0."""

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._outcome(sample) for sample in samples]

    def _outcome(self, sample: Sample) -> Outcome:
        answer = self.canonical_answer(sample.text)
        correct = answer == gold_answer(sample.prompt.answer)
        return Outcome(float(correct), {"answered": float(answer is not None)})

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
        answer = self.canonical_answer(sample.text) if sample.finish_reason == "stop" else None
        correct = answer == gold_answer(sample.prompt.answer)
        return Outcome(float(correct), {"answered": float(answer is not None)})

    def canonical_answer(self, text: str) -> str | None:
        return text.rpartition("#")[2] or None if "#" in text else None
