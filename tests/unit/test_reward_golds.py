"""math_verify over real gold answers: each verifies as itself, and none as a neighbour of itself; hostile
responses time out without a trace."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from patience import patience, until
from test_rewards import sample

from megatron_dgpo.rewards import Reward, build_reward
from megatron_dgpo.rewards.answers import gold_answer
from megatron_dgpo.rewards.pool import _Worker

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
AIME, GSM8K = DATA / "aime-2024.parquet", DATA / "gsm8k_test.jsonl"
needs_data = pytest.mark.skipif(
    not (AIME.is_file() and GSM8K.is_file()), reason=f"no AIME and GSM8K in {DATA}"
)


@pytest.fixture(scope="module")
def reward() -> Iterator[Reward]:
    with build_reward("math_verify", num_workers=2, timeout_seconds=patience()) as made:
        yield made


def golds() -> list[str]:
    gsm8k = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    rows = pq.read_table(AIME, columns=["prompt", "reward_model"]).to_pylist()
    aime = {row["prompt"][0]["content"]: row["reward_model"]["ground_truth"] for row in rows}
    assert (len(gsm8k), len(aime)) == (1319, 30)
    return [*gsm8k, *aime.values()]


def neighbours(gold: str) -> set[str]:
    """Other answers that are easily mistaken for this number. (Not the number as a percentage: where that is
    asked for, data sets leave the sign out, and math-verify takes both.)"""
    number = gold.replace(",", "")
    if not re.fullmatch(r"-?\d+(\.\d+)?", number):
        return set()
    value = Fraction(number)
    near = {str(value + 1), str(value - 1), str(-value), str(value * 10), str(value / 10)}
    near |= {f"\\frac{{{number}}}{{2}}", f"\\frac{{1}}{{{number}}}", number[:-1], number[1:], f"{number}1"}
    return {n for n in near if n not in ("", "-", ".") and not same(n, value)}


def same(text: str, value: Fraction) -> bool:
    fraction = re.fullmatch(r"\\frac\{(.*)\}\{(.*)\}", text)
    try:
        if fraction:
            return Fraction(fraction[1]) / Fraction(fraction[2]) == value
        return Fraction(text) == value
    except (ValueError, ZeroDivisionError):
        return True  # no number: nothing to say


@needs_data
def test_every_gold_answer_verifies_as_itself(reward: Reward) -> None:
    samples = [sample(f"so it is \\boxed{{{gold_answer(g)}}}", g) for g in golds()]
    samples += [sample(f"Answer: {gold_answer(g)}", g) for g in golds()[::10]]
    reward.score(samples)
    assert [(s.text, s.reward, s.reward_error) for s in samples if s.reward != 1.0] == []


@needs_data
def test_no_gold_answer_verifies_as_a_neighbour(reward: Reward) -> None:
    answers = [gold_answer(g) for g in golds()]
    pairs = [(other, gold) for gold in (*answers[:1319:40], *answers[1319:]) for other in neighbours(gold)]
    assert len(pairs) >= 200
    samples = [sample(f"so it is \\boxed{{{other}}}", gold) for other, gold in pairs]
    reward.score(samples)
    assert [(s.text, s.prompt.answer, s.reward_error) for s in samples if s.reward != 0.0] == []


ENDLESS = {
    "1e9 to the 1e9": "\\boxed{1000000000^{1000000000}}",
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "sum": "\\boxed{\\sum_{n=1}^{10^{12}} \\frac{1}{n^3}}",
}
"""Each keeps a worker busy for longer than any time limit."""


def workers_since(before: set[int]) -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)} - before


def test_hostile_responses_time_out_and_leave_nothing_behind() -> None:
    """As failed, not as wrong. The text 1e9**1e9 is no LaTeX: it is read as no answer or another one, and is
    wrong at once; what it means does not end, and fails as the others. Braces in braces are not read."""
    before = workers_since(set())
    hostile = [sample(text, "5") for text in ENDLESS.values()]
    braces = "\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}"
    texts = ("1e9**1e9", "\\boxed{1e9**1e9}", "\\boxed{(1e9)^{(1e9)}}", braces)
    harmless = [sample(text, "5") for text in texts]
    fine = [sample("\\boxed{5}", "5"), sample("\\boxed{6}", "5")]
    with build_reward("math_verify", num_workers=2, timeout_seconds=patience()) as reward:
        reward.score([fine[0], *harmless, fine[1]])
        reward._pool.timeout_seconds = 1.0  # type: ignore[attr-defined]
        reward.score(hostile)
        assert 1 <= len(workers_since(before)) <= 2  # one that was ended is replaced when it is needed
    assert [(s.reward, s.reward_error) for s in hostile] == [(None, "timed out after 1 s")] * 3
    assert [(s.reward, s.reward_error) for s in harmless] == [(0.0, None)] * 4
    assert (fine[0].reward, fine[1].reward) == (1.0, 0.0)
    assert not workers_since(before)


def test_a_hostile_response_does_not_stall_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are scored while it still runs. Here nothing else ends it."""
    before, answers = workers_since(set()), []
    receive = _Worker.receive

    def counted(worker: _Worker) -> list[dict[str, Any]] | None:
        messages = receive(worker)
        answers.extend(m for m in messages or [] if "result" in m or "error" in m)
        return messages

    monkeypatch.setattr(_Worker, "receive", counted)
    hostile, fine = sample(ENDLESS["tower"], "5"), [sample("\\boxed{5}", "5") for _ in range(12)]
    with build_reward("math_verify", num_workers=2, timeout_seconds=patience()) as reward:
        scoring = threading.Thread(target=reward.score, args=([hostile, *fine],), daemon=True)
        scoring.start()
        until(lambda: len(answers) == len(fine))
        assert scoring.is_alive()
        for pid in workers_since(before):
            psutil.Process(pid).kill()
        scoring.join(timeout=patience())
        assert not scoring.is_alive()
    assert [s.reward for s in fine] == [1.0] * 12
    assert (hostile.reward, hostile.reward_error) == (None, "the worker process died with exit status -9")
    assert not workers_since(before)
