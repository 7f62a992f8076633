"""Answers by kind: every row of the case files has its verdict, and votes are one for equal values alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_rewards import sample

from megatron_dgpo.rewards import build_reward
from megatron_dgpo.rewards.answers import canonical, explicit_answer, gold_answer

CASES = Path(__file__).parent / "cases"


@pytest.mark.parametrize("name", ["answers", "answers_more"])
def test_every_case_has_its_verdict(name: str) -> None:
    """A row: reward, text, gold, finish reason and the right value, null for a gold that cannot be read."""
    rows = [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) > 300
    samples = [sample(row["text"], row["gold"], row["finish"]) for row in rows]
    for reward in {row["reward"] for row in rows}:
        build_reward(reward).score(
            [s for s, row in zip(samples, rows, strict=True) if row["reward"] == reward]
        )
    wrong = [
        (number, row["text"][:80], row["gold"][:40], row["expected"], s.reward, s.reward_error)
        for number, (row, s) in enumerate(zip(rows, samples, strict=True), 1)
        if s.reward != row["expected"]
    ]
    assert wrong == []
    unreadable = [s for s, row in zip(samples, rows, strict=True) if row["expected"] is None]
    assert all("gold answer" in str(s.reward_error) for s in unreadable)


@pytest.mark.parametrize(
    ("answers", "votes"),
    [
        (["0.5", "1/2", "\\frac12", "\\tfrac{2}{4}", "50\\%", ".50"], 1),
        (["2 1/2", "2\\frac{1}{2}", "5/2", "2.5"], 1),
        (["2 1/2", "21/2"], 2),
        (["1,234", "1\\,234", "1 234", "1234.0", "\\$1,234", "1{,}234"], 1),
        (["1,2", "2, 1", "\\{1, 2\\}", "1 and 2"], 1),
        (["(1,2)", "(2,1)", "1,2"], 3),
        (["x = 5", "5", "-5", "5!"], 3),
        (["x > 3", "(3, \\infty)", "x\\ge 3"], 2),
        (["9:30 a.m.", "9:30 AM", "9:30 p.m."], 2),
        (["1011_2", "(1011)_{two}", "1011", "1011_3"], 3),
        (["ABC", "BAC", "\\text{ABC}"], 2),
        (["Yes", "\\text{yes}.", "no"], 2),
        (["\\frac{1}{2^{50}}", "\\frac{1}{2^{51}}", "0"], 3),
        (["10^{30}", "10^{30}+1"], 2),
    ],
)
def test_equal_values_and_no_others_are_one_vote(answers: list[str], votes: int) -> None:
    reward = build_reward("math_verify")
    samples = [sample(f"so \\boxed{{{answer}}}", "7") for answer in answers]
    reward.score(samples)
    assert [s.answer for s in samples] == [canonical(answer) for answer in answers]
    assert len({s.answer for s in samples}) == votes


def test_what_a_worked_solution_announces() -> None:
    assert gold_answer("so \\boxed{7}.\n\n#### Remark\nAnother way exists.") == "7"
    assert gold_answer("so \\boxed{7}\n#### Remark") == "7"
    assert gold_answer("#### Step 1\n3 + 4 = 7, \\fbox{7}") == "7"
    assert gold_answer("3 + 4 = 7\nA: 7") == "7" and gold_answer("A: 7") == "A: 7"
    assert gold_answer("```\n#### 3\n```\nso 7") == "```\n#### 3\n```\nso 7"


def test_a_box_that_is_taken_back() -> None:
    assert explicit_answer("it is \\boxed{12}. recompute: it is \\boxed{15") is None
    assert explicit_answer("it is \\boxed{12}. No: \\boxed{}") is None
    assert explicit_answer("with \\boxed as told: \\boxed{15}") == "15"
    assert explicit_answer("\\boxed{3} or \\boxed{4}") == "3, 4"
    assert explicit_answer("<answer>15") == "15" and explicit_answer("<answer>15", finished=False) is None
