"""The reward for mathematics: symbolic equality by the math-verify package, in processes of its own."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from megatron_dgpo.rewards.answers import canonical, gold_answer
from megatron_dgpo.rewards.answers.choices import chosen
from megatron_dgpo.rewards.answers.comparison import same
from megatron_dgpo.rewards.answers.marks import announced, json_answers, own_part
from megatron_dgpo.rewards.answers.numerics import NoValue
from megatron_dgpo.rewards.answers.reading import readings, trimmed
from megatron_dgpo.rewards.answers.spelling import plain
from megatron_dgpo.rewards.answers.statements import answer_in, gold_in, spoken_answer
from megatron_dgpo.rewards.answers.values import False_, Text, Unread, Value
from megatron_dgpo.rewards.base import Outcome, Reward, register
from megatron_dgpo.rewards.pool import ProcessPool, call_here
from megatron_dgpo.types import Sample

TASK = "megatron_dgpo.rewards.math_equivalence:score_response"


CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s?\{)?\s?\(?([A-HJ-Z])\)?\s?\}?\.?")
"""A gold answer that is one capital."""
SEQUENCE = re.compile(r"[A-Za-z](?:,[A-Za-z])+")
"""Letters without spaces between them are an order; "A, B, C" is a list."""
NO_ANSWERS = {
    "n/a", "na", "nan", "null", "nil", "proof", "tbd", "todo", "unknown", "error", "not available",
    "not applicable", "no answer", "not given", "omitted",
}  # fmt: skip
"""What stands in data sets where an answer is missing."""
MISSING = re.compile(
    r"(?<![a-z])(?:proofs?|proven?|see|omitted|left to the reader|not (?:given|available))(?![a-z])"
)
MAX_WORDS = 4
"""A gold answer of more words is a sentence."""
WORD = re.compile(
    r"(?<![\\A-Za-z{])[A-Za-z]{3,}|(?<![\\A-Za-z])(?:to|of|is|in|or|an|at|on|by|no|as)(?![A-Za-z])"
)
LABEL = re.compile(r"(?<![\\A-Za-z])[A-Za-z]\d")
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log exp sqrt abs max min gcd lcm mod det lim sinh cosh tanh".split()
)


class UnreadableGold(ValueError):
    """The gold answer of a data row is no answer: the row is at fault, not the response."""


@register("math_verify")
class MathVerify(Reward):
    r"""1 where the final answer equals the gold answer mathematically, else 0.

    The final answer is what the last ``\boxed{}``, ``<answer>``, ``####`` or line ``Answer:`` announces. In a
    response that ended by itself without one, it is what "the answer is" introduces, or the last value; one
    that was cut at the length limit is not searched, since the last number before the cut is no answer.

    Numbers, formulas, lists, intervals, equations and words are compared by what they mean (`answers`); what
    is not read there, such as a sum or an integral, is left to the package math-verify.
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
        return _canonical(_answer(text, finished=True))

    def answer_of(self, sample: Sample) -> str | None:
        return _canonical(_answer(sample.text, sample.finish_reason == "stop"))

    def response_with(self, answer: str) -> str:
        return f"\\boxed{{{(json_answers(answer) or [answer])[0]}}}"

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def score_response(*, text: str, gold: str, finished: bool) -> dict[str, Any]:
    """Score one response: {"value": 0.0 or 1.0, "parts": {"answered": 0.0 or 1.0}, "answer": canonical}.

    Raises UnreadableGold, and whatever the comparison raises.
    """
    golds = _golds(gold)
    answer = _answer(text, finished)
    correct = answer is not None and any(_correct(one, answer) for one in golds)
    return {
        "value": float(correct),
        "parts": {"answered": float(answer is not None)},
        "answer": _canonical(answer),
    }


def prepare_worker() -> None:
    """Import and warm up math-verify before the clock of the first response runs."""
    # It warns that nothing limits its time; the pool does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _by_math_verify("\\frac{1}{2}", "0.5")


def _answer(text: str, finished: bool) -> str | None:
    """A response's final answer as it is written; None where it gives none."""
    found = announced(text, finished)
    if found is None:
        return spoken_answer(own_part(text)) if finished else None
    if found.text:
        return answer_in(found.text, found.kind == "box")
    # What is said after an empty box still counts; what it was taken back from does not.
    return spoken_answer(own_part(text)[found.end :]) if finished else None


def _canonical(answer: str | None) -> str | None:
    return None if answer is None else canonical(answer) or None


def _golds(gold: str) -> list[str]:
    """The answers that a row's gold answer allows: one, or those of a JSON list. Raises UnreadableGold."""
    marked = gold_answer(gold)
    golds = [gold_in(one) for one in json_answers(marked) or [marked]]
    readable = [one for one in golds if one is not None and _is_readable(one)]
    if not readable:
        raise UnreadableGold(f"gold answer {gold[-100:]!r} is not a number, an expression or a few words")
    return readable


def _is_readable(gold: str) -> bool:
    words = plain(gold).lower().strip(" .!?")
    if words in NO_ANSWERS or gold.strip() == "None" or MISSING.search(words):
        return False
    found = readings(gold)
    if not found or isinstance(found[0], False_):
        return False
    if isinstance(found[0], Text):
        is_sentence = len(words.split()) > 2 and gold.rstrip().endswith((".", "!", "?"))
        return len(words.split()) <= MAX_WORDS and not is_sentence
    return not isinstance(found[0], Unread) or _is_mathematics(gold) and bool(_parsed(gold))


def _correct(gold: str, answer: str) -> bool:
    """Whether two answers, as they are written, are equal in one of their meanings."""
    letter = CHOICE.fullmatch(gold.strip())
    if letter:
        return chosen(answer) == letter[1]
    if SEQUENCE.fullmatch(gold.strip()):
        return _letters(gold) == _letters(answer)
    pairs = list(product(readings(gold), readings(answer)))
    try:
        return any(same(g, a, _by_math_verify) for g, a in pairs) or _unread(gold, answer, pairs)
    except NoValue:
        return _by_math_verify(gold, answer)


def _unread(gold: str, answer: str, pairs: list[tuple[Value, Value]]) -> bool:
    """What is not read here on one side may still equal a value on the other."""
    if not pairs:
        return _compact(gold) == _compact(answer)
    one_sided = any(isinstance(g, Unread) != isinstance(a, Unread) for g, a in pairs)
    texts = any(isinstance(value, Text) for pair in pairs for value in pair)
    return one_sided and not texts and _by_math_verify(gold, answer)


def _letters(sequence: str) -> str:
    return plain(sequence).translate(str.maketrans("", "", " .$()[]{}\\"))


def _compact(text: str) -> str:
    return "".join(text.split())


def _is_mathematics(text: str) -> bool:
    """Whether a text has no words outside of LaTeX's commands: math-verify takes words for products."""
    return all(word in FUNCTIONS for word in WORD.findall(text)) and not LABEL.search(text)


def _by_math_verify(gold: str, answer: str) -> bool:
    from math_verify import verify

    if not _is_mathematics(plain(gold)) or not _is_mathematics(plain(answer)):
        return False
    # math-verify's own time-outs are signals, which work in the main thread alone: the pool has its own.
    return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=None, raise_on_error=True))


def _parsed(answer: str) -> list[Any]:
    """An answer as math-verify sees it: without the strings that it could not read."""
    from math_verify import parse

    found = parse(f"\\boxed{{{trimmed(answer)}}}", parsing_timeout=None)
    return [] if all(isinstance(value, str) for value in found) else found
