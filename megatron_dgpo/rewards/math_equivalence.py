"""The reward for mathematics: symbolic equality by the math-verify package, in processes of its own."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

from megatron_dgpo.rewards.answers import (
    canonical,
    explicit_answer,
    gold_answer,
    plain_number,
    strip_wrapping,
)
from megatron_dgpo.rewards.base import Outcome, Reward, register
from megatron_dgpo.rewards.pool import ProcessPool, call_here
from megatron_dgpo.types import Sample

TASK = "megatron_dgpo.rewards.math_equivalence:score_response"


class UnreadableGold(ValueError):
    """The gold answer of a data row is not mathematics: the row is at fault, not the response."""


@register("math_verify")
class MathVerify(Reward):
    """1 where the final answer equals the gold answer mathematically, else 0.

    The final answer is what the last ``\\boxed{}``, ``####`` or line ``Answer:`` announces. A response
    that ended by itself without one is searched by math-verify; one that was cut at the length limit
    is not, since the last number before the cut is no answer.
    """

    def __init__(self, *, timeout_seconds: float = 10.0, num_workers: int = 0) -> None:
        super().__init__(timeout_seconds=timeout_seconds, num_workers=num_workers)
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("the reward 'math_verify' needs the package math-verify")
        self._pool = ProcessPool(TASK, num_workers, timeout_seconds) if num_workers else None

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        calls = [
            {"text": s.text, "gold": s.prompt.answer, "finished": s.finish_reason == "stop"} for s in samples
        ]
        if self._pool is not None:
            results = self._pool.map(calls)
        else:
            results = call_here(score_response, calls)
        return [
            Outcome(error=result)
            if isinstance(result, str)
            else Outcome(result["value"], result["parts"], answer=result["answer"])
            for result in results
        ]

    def canonical_answer(self, text: str) -> str | None:
        """In this process, where nothing limits math-verify's time."""
        return _read_response(text, finished=True)[1]

    def answer_of(self, sample: Sample) -> str | None:
        # What math-verify would find in a text without one comes with the score, or is not to be had.
        answer = explicit_answer(sample.text)
        return None if answer is None else canonical(answer) or None

    def response_with(self, answer: str) -> str:
        return f"\\boxed{{{answer}}}"

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def score_response(*, text: str, gold: str, finished: bool) -> dict[str, Any]:
    """Score one response: {"value": 0.0 or 1.0, "parts": {"answered": 0.0 or 1.0}, "answer": canonical}.

    Raises UnreadableGold, and whatever the comparison raises.
    """
    from math_verify import verify

    # math-verify's own time-outs are signals, which work in the main thread alone: the pool has its own.
    golds = _parse_answer(gold_answer(gold))
    if all(isinstance(value, str) for value in golds):
        raise UnreadableGold(f"gold answer {gold[-100:]!r} is not a number or expression")
    found, answer = _read_response(text, finished)
    correct = bool(found) and verify(golds, found, timeout_seconds=None, raise_on_error=True)
    return {"value": float(correct), "parts": {"answered": float(bool(found))}, "answer": answer}


def prepare_worker() -> None:
    """Import and warm up math-verify before the clock of the first response runs."""
    # It warns that nothing limits its time; the pool does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    score_response(text="\\boxed{\\frac{1}{2}}", gold="0.5", finished=True)


def _read_response(text: str, finished: bool) -> tuple[list[Any], str | None]:
    """A response's final answer as math-verify sees it, and its canonical form (None: there is none)."""
    from math_verify import parse

    answer = explicit_answer(text)
    if answer is not None:
        return _parse_answer(answer), canonical(answer) or None
    found = parse(text, parsing_timeout=None) if finished and text else []
    # The piece of the text that was taken comes last; what it was turned into comes first.
    taken = [piece for piece in found if isinstance(piece, str)]
    return found, canonical(taken[-1]) or None if taken else None


def _parse_answer(answer: str) -> list[Any]:
    """A final answer as math-verify sees it: sympy objects and strings, nothing where it is empty."""
    from math_verify import parse

    number = plain_number(answer)
    return parse(number or f"\\boxed{{{strip_wrapping(answer)}}}", parsing_timeout=None)
