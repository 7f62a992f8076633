"""Evaluation metrics against enumeration over every subset of samples."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_dgpo.evaluation import avg_at_k, cons_at_k, pass_at_k, summarize
from megatron_dgpo.rewards import build_reward
from megatron_dgpo.types import FinishReason, Group, Prompt, Sample


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_refuses_nonsense():
    for n, c, k in ((4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(n, c, k)


def test_avg_at_k():
    assert avg_at_k([1.0, 0.0, 0.0, 0.5]) == 0.375
    with pytest.raises(ValueError, match="at least one reward"):
        avg_at_k([])


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["a", "b", "b"], [1, 0, 0], 0.0),
        (["a", "b", "b"], [0, 1, 1], 1.0),
        (["a", "b", "b", "a"], [1, 0, 0, 1], 1.0),  # a tie goes to the first seen
        (["b", "a", "a", "b"], [0, 1, 1, 0], 0.0),
        ([None, None, "a"], [0, 0, 1], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        (["b", "b", "a"], [None, 1, 0], 1.0),  # a failed sample votes; another of its votes is judged
        (["b", "b", "b", "a"], [0, 1, 1, 1], 1.0),  # judged by most of its samples, not by the first
        (["b", "b", "b", "a"], [1, 0, 0, 1], 0.0),
        (["b", "b", "a"], [1, 0, 1], 0.0),  # half is not most
        (["b", "b", "a"], [None, None, 1], 0.0),
        (["a", "a"], [0.5, 0.5], 0.0),
    ],
)
def test_cons_at_k(answers, rewards, expected):
    assert cons_at_k(answers, rewards) == expected


def group(name: str, *samples: tuple[str, float | None, int, FinishReason]) -> Group:
    prompt = Prompt(id=name, token_ids=(1,), text="", answer="1")
    return Group(
        prompt,
        [
            Sample(
                prompt,
                index,
                [1] * length,
                [0.0] * length,
                reason,
                (),
                text=text,
                reward=reward,
                answer=text or None,
            )
            for index, (text, reward, length, reason) in enumerate(samples)
        ],
    )


def test_summarize():
    groups = [
        group("a", ("1", 1.0, 4, "stop"), ("2", 0.0, 6, "stop"), ("2", 0.0, 8, "length")),
        group("b", ("1", 1.0, 2, "stop"), ("1", None, 2, "stop"), ("", 0.0, 2, "length")),
        group("c", ("1", None, 3, "stop"), ("1", None, 3, "stop"), ("1", None, 6, "stop")),
    ]
    result = summarize(groups, 2)
    assert result["avg@2"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    # a: of the 3 pairs one lacks the right sample; b: the two scored samples make one pair, with it
    assert result["pass@2"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["cons@2"] == 1.0  # a: 1 and 2 tie, 1 was first; b: 1 twice
    assert result["truncation_rate"] == pytest.approx(2 / 9)
    assert result["mean_response_tokens"] == pytest.approx(36 / 9)
    assert (result["num_problems"], result["num_samples"], result["num_failed"]) == (3, 9, 4)
    assert result["num_unscored_problems"] == 1
    three = summarize(groups[:1], 3, fewer=[1, 2])
    assert three["cons@3"] == 0.0 and three["pass@3"] == 1.0
    assert three["pass@1"] == pytest.approx(1 / 3) and three["pass@2"] == pytest.approx(2 / 3)


CUT = ("and then we look at case 2", "length")
VOTES = [
    # (texts and how they ended; gold; what each is taken to answer; cons@k), by hand
    (
        [("and then 204 of", "length"), *[("\\boxed{204}", "stop")] * 3, ("\\boxed{7}", "stop")],
        "204",
        [None, "204", "204", "204", "7"],
        1.0,
    ),
    ([CUT, CUT, CUT, *[("\\boxed{204}", "stop")] * 2], "204", [None] * 3 + ["204"] * 2, 1.0),
    ([CUT, CUT, CUT, ("so it is 7", "stop")], "2", [None] * 3 + ["7"], 0.0),
    ([("thus \\boxed{3} and also 4", "length"), ("Answer: 3", "stop"), CUT], "3", ["3", "3", None], 1.0),
    (
        [("x = \\frac{1}{2}", "stop"), ("$\\frac{2}{4}$.", "stop"), ("\\boxed{2}", "stop")],
        "0.5",
        ["1/2", "1/2", "2"],
        1.0,
    ),
    (
        [("it is $\\sqrt{3}$", "stop")] * 2 + [("so 3", "stop"), ("no idea", "stop")],
        "\\sqrt{3}",
        ["\\sqrt{3}", "\\sqrt{3}", "3", None],
        1.0,
    ),
    ([("x = 5", "stop"), ("\\boxed{x=5}", "stop"), ("\\boxed{6}", "stop")], "5", ["5", "5", "6"], 1.0),
    ([CUT] * 2, "2", [None, None], 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "gold", "answers", "cons"), VOTES)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_votes_are_the_answers_that_were_scored(texts, gold, answers, cons, num_workers, pools):
    prompt = Prompt(id="a", token_ids=(1,), text="", answer=gold)
    samples = [Sample(prompt, i, [1], [0.0], reason, (), text=text) for i, (text, reason) in enumerate(texts)]
    pools[num_workers].score(samples)
    assert [sample.answer for sample in samples] == answers
    assert not any(sample.reward for sample in samples if sample.answer is None)
    assert summarize([Group(prompt, samples)], len(samples))[f"cons@{len(samples)}"] == cons


@pytest.fixture(scope="module")
def pools():
    with build_reward("math_verify", num_workers=1) as pool:
        yield {0: build_reward("math_verify"), 1: pool}


def test_a_cut_response_votes_where_the_reward_takes_its_answer():
    """Rewards by name: what a response cut at "2", one cut after an announcement and a finished one vote."""
    expected = {
        "exact_match": ["so (B) is 2", "#B\nAnswer: B is 2", "so (B)"],
        "hash_answer": [None, None, None],
        "multiple_choice": [None, "B", "B"],
        "user_rewards:digits": [None, "Bis2", None],
    }
    for name, answers in expected.items():
        texts = [("so (B) is 2", "length"), ("#B\nAnswer: B is 2", "length"), ("so (B)", "stop")]
        [made] = [group("a", *((text, None, 1, reason) for text, reason in texts))]
        build_reward(name).score(made.samples)
        assert [sample.answer for sample in made.samples] == answers, name
    [finished] = group("a", ("so#B", None, 1, "stop")).samples
    build_reward("hash_answer").score([finished])
    assert finished.answer == "B"
    finished.finish_reason = "abort"
    build_reward("hash_answer").score([finished])
    assert finished.answer is None


def test_summarize_refuses_too_few_samples_and_never_invents_a_number():
    with pytest.raises(ValueError, match="no groups"):
        summarize([], 1)
    short = [group("a", ("1", 1.0, 1, "stop"))]
    with pytest.raises(ValueError, match="prompt a has 1 samples, expected 2 or more"):
        summarize(short, 2)
    failed = [group("a", ("1", None, 1, "stop"))]
    assert math.isnan(summarize(failed, 1)["avg@1"])
