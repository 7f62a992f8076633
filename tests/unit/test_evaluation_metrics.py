"""Evaluation metrics against enumeration over every subset of samples."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_dgpo.evaluation import avg_at_k, cons_at_k, pass_at_k, summarize
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
            Sample(prompt, index, [1] * length, [0.0] * length, reason, (), text=text, reward=reward)
            for index, (text, reward, length, reason) in enumerate(samples)
        ],
    )


def test_summarize():
    groups = [
        group("a", ("1", 1.0, 4, "stop"), ("2", 0.0, 6, "stop"), ("2", 0.0, 8, "length")),
        group("b", ("1", 1.0, 2, "stop"), ("1", None, 2, "stop"), ("", 0.0, 2, "length")),
        group("c", ("1", None, 3, "stop"), ("1", None, 3, "stop"), ("1", None, 6, "stop")),
    ]
    result = summarize(groups, 2, canonical_answer=lambda text: text or None)
    assert result["avg@2"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    # a: of the 3 pairs one lacks the right sample; b: the two scored samples make one pair, with it
    assert result["pass@2"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["cons@2"] == 1.0  # a: 1 and 2 tie, 1 was first; b: 1 twice
    assert result["truncation_rate"] == pytest.approx(2 / 9)
    assert result["mean_response_tokens"] == pytest.approx(36 / 9)
    assert (result["num_problems"], result["num_samples"], result["num_failed"]) == (3, 9, 4)
    assert result["num_unscored_problems"] == 1
    three = summarize(groups[:1], 3, canonical_answer=lambda text: text or None)
    assert three["cons@3"] == 0.0 and three["pass@3"] == 1.0


def test_summarize_refuses_too_few_samples_and_never_invents_a_number():
    with pytest.raises(ValueError, match="no groups"):
        summarize([], 1, canonical_answer=str)
    short = [group("a", ("1", 1.0, 1, "stop"))]
    with pytest.raises(ValueError, match="prompt a has 1 samples, expected 2 or more"):
        summarize(short, 2, canonical_answer=str)
    failed = [group("a", ("1", None, 1, "stop"))]
    assert math.isnan(summarize(failed, 1, canonical_answer=str)["avg@1"])
