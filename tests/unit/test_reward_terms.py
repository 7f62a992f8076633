"""Terms beside the answer's reward, multiple choice, and functions of the user's own."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import user_rewards
from patience import patience
from test_rewards import sample

from megatron_dgpo.algorithms import group_advantages
from megatron_dgpo.config import FormatTerm, LengthTerm, OverlongTerm, RewardConfig
from megatron_dgpo.config.algorithms import PRESETS
from megatron_dgpo.rewards import Combined, build_reward, build_term, user
from megatron_dgpo.rollout.select import Verdict, verdict
from megatron_dgpo.types import Group, Sample


def of_length(n: int, text: str = "#2", finish_reason: Any = "stop") -> Sample:
    return dataclasses.replace(sample(text, "2", finish_reason), token_ids=[1] * n)


def test_overlong_is_equation_13() -> None:
    """L_max = 100 and L_cache = 20 (arXiv 2503.14476)."""
    term = build_term(OverlongTerm(name="overlong", buffer_tokens=20), max_new_tokens=100)
    for n in (1, 79, 80, 81, 90, 99, 100):
        want = 0.0 if n <= 80 else (80 - n) / 20
        assert term(of_length(n)) == pytest.approx(want)
    assert term(of_length(100, finish_reason="length")) == -1.0
    default = build_term(OverlongTerm(name="overlong"), max_new_tokens=100)
    assert [default(of_length(n)) for n in (80, 95)] == pytest.approx([0.0, -0.75])


@pytest.mark.parametrize("name", ["dapo", "dapo_dgpo"])
def test_the_preset_gives_the_sources_advantages(name: str) -> None:
    """DAPO's rewards are +-1 and its punishment goes to -1; ours are 1 and 0, the preset's to half."""
    preset = PRESETS[name]["reward"]["terms"]
    (config,) = RewardConfig.model_validate({"name": "hash_answer", "terms": preset}).terms
    term = build_term(config, max_new_tokens=100)
    reward = Combined(build_reward("hash_answer"), [(config.name, config.weight, term)])
    group = [
        *(of_length(10), of_length(88), of_length(95), of_length(100, finish_reason="length")),
        *(of_length(10, "#3"), of_length(96, "#3"), of_length(100, "#3", "length")),
    ]
    reward.score(group)
    source = [2.0 * (s.reward_parts["correct"]) - 1.0 + term(s) for s in group]
    ours = [s.reward for s in group]
    assert min(source) == -2.0 and max(source) == 1.0
    for eps in (1e-12, 1e-6):
        got, want = (group_advantages([r], eps=eps, normalize_by_std=True)[0] for r in (ours, source))
        assert got == pytest.approx(want, abs=5 * eps)
    assert group_advantages([ours], eps=1e-12, normalize_by_std=False)[0] == pytest.approx(
        [a / 2 for a in group_advantages([source], eps=1e-12, normalize_by_std=False)[0] if a is not None]
    )


def test_length_and_format() -> None:
    length = build_term(LengthTerm(name="length", free_tokens=10, max_tokens=20), max_new_tokens=100)
    assert [length(of_length(n)) for n in (5, 10, 15, 20, 50)] == pytest.approx([0, 0, -0.5, -1, -1])
    form = build_term(FormatTerm(name="format", pattern=r"^<think>.*</think>\s*\S"), max_new_tokens=9)
    texts = {"<think>a\nb</think> 5": 1.0, "x <think>a</think> 5": 0.0, "<think>a</think>": 0.0, "": 0.0}
    assert [form(sample(t, "5")) for t in texts] == list(texts.values())


@pytest.mark.parametrize(
    "term, message",
    [
        (LengthTerm(name="length", free_tokens=20, max_tokens=20), "the second must be above the first"),
        (FormatTerm(name="format", pattern="("), "is not a regular expression"),
        (OverlongTerm(name="overlong", buffer_tokens=101), "buffer_tokens 101 is above"),
    ],
)
def test_terms_that_cannot_be(term: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_term(term, max_new_tokens=100)


def test_terms_are_added_and_told_apart() -> None:
    overlong = build_term(OverlongTerm(name="overlong", buffer_tokens=20), max_new_tokens=100)
    form = build_term(FormatTerm(name="format", pattern="so"), max_new_tokens=100)
    reward = Combined(build_reward("hash_answer"), [("overlong", 2.0, overlong), ("format", 0.5, form)])
    samples = [of_length(90, "so #2"), of_length(90, "#3"), of_length(9), of_length(9, finish_reason="abort")]
    reward.score(samples)
    assert [s.reward for s in samples] == pytest.approx([1 - 1 + 0.5, -1.0, 1.0, None])
    assert samples[0].reward_parts == {"answered": 1.0, "correct": 1.0, "overlong": -1.0, "format": 0.5}
    assert reward.canonical_answer("so #2") == "2"
    # Dynamic sampling looks at the answers: lengths differ in every group.
    right = [of_length(n) for n in (10, 90)]
    reward.score(right)
    assert right[0].reward != right[1].reward
    assert verdict(Group(right[0].prompt, right), need_variance=True) is Verdict.ALL_RIGHT
    mixed = [right[0], samples[1]]
    assert verdict(Group(right[0].prompt, mixed), need_variance=True) is Verdict.USABLE


def test_what_failed_has_no_terms() -> None:
    main = build_reward("multiple_choice")
    reward = Combined(main, [("format", 1.0, lambda s: 1.0)])
    bad = sample("Answer: B", "seven")
    reward.score([bad])
    assert bad.reward is None and "'seven' is no letter" in str(bad.reward_error) and not bad.reward_parts


CHOICES = [
    ("Answer: C", "C", 1.0),
    ("The answer is \\boxed{c}.", "C", 1.0),
    ("\\boxed{\\text{C}}", "C", 1.0),
    ("Answer: (B)", "C", 0.0),
    ("Answer: **C. seven**", "(C)", 1.0),
    ("#### C) seven", "C.", 1.0),
    ("(A) is wrong, so it is (C)", "C", 1.0),
    ("(C) at first, but it is (A)", "C", 0.0),
    ("Answer: Certainly", "C", 0.0),
    ("no idea", "C", 0.0),
    ("", "C", 0.0),
]


def test_multiple_choice() -> None:
    reward = build_reward("multiple_choice")
    samples = [sample(text, gold) for text, gold, _ in CHOICES]
    reward.score(samples)
    assert [s.reward for s in samples] == [value for *_, value in CHOICES]
    cut = [sample("(A) or (C)", "C", "length"), sample("Answer: C and", "C", "length")]
    reward.score(cut)
    assert [s.reward for s in cut] == [0.0, 1.0]


def test_a_function_of_the_users_own() -> None:
    texts = ["12", "1", "sleep", "crash", "nan", "nothing"]
    for workers in (0, 2):
        used = [t for t in texts if workers or t != "sleep"]
        samples = [sample(t, "12", "length" if t == "1" else "stop") for t in used]
        with build_reward("user_rewards:digits", timeout_seconds=3.0, num_workers=workers) as reward:
            reward.score(samples)
        by_text = dict(zip(used, samples, strict=True))
        assert by_text["12"].reward == 1.0 and by_text["1"].reward == 0.5
        assert by_text["12"].reward_parts == {"stopped": 1.0, "level": 0.0}
        errors = {t: str(s.reward_error) for t, s in by_text.items() if s.reward is None}
        assert "no such answer" in errors["crash"] and "reward is nan" in errors["nan"]
        assert "no 'reward'" in errors["nothing"]
        assert not workers or "timed out after 3 s" in errors["sleep"]


def test_a_coroutine_judges_all_responses_at_once() -> None:
    samples = [sample(t, "12") for t in ["12"] * 30 + ["13", "sleep", "crash"]]
    with build_reward("user_rewards:judge", timeout_seconds=3.0, num_workers=2) as reward:
        reward.score(samples)  # one after the other would take longer: see also `counted`
    assert [s.reward for s in samples] == [1.0] * 30 + [0.0, None, None]
    assert "timed out after 3 s" in str(samples[-2].reward_error)
    assert "RuntimeError: no such answer" in str(samples[-1].reward_error)


def test_a_coroutine_that_blocks_fails_and_does_not_hang_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user, "GRACE_SECONDS", 0.2)
    samples = [sample(t, "12") for t in ("12", "block", "13")]
    try:
        with build_reward("user_rewards:blocking", timeout_seconds=0.5) as reward:
            reward.score(samples)
            assert not user_rewards.RELEASED.is_set()  # the call that blocks still does
            assert [s.reward for s in samples] == [None] * 3  # the others did not get to end either
            for s in samples:
                assert "a coroutine of user_rewards:blocking blocks the others" in str(s.reward_error)
            reward.timeout_seconds = patience()
            reward.score(samples[:1])
            assert samples[0].reward == 1.0
    finally:
        user_rewards.RELEASED.set()


def test_coroutines_take_turns() -> None:
    """No more connections at once than a server takes; and from inside of another event loop as well."""
    samples = [sample("12", "12") for _ in range(3 * user.CONCURRENT)]

    async def inside() -> None:
        build_reward("user_rewards:counted").score(samples)

    asyncio.run(inside())
    assert [s.reward for s in samples] == [1.0] * len(samples)
    assert user_rewards.MOST == [user.CONCURRENT]


@pytest.mark.parametrize("name", ["correct", "format", "length", "overlong"])
def test_names_of_the_runs_own_parts_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"user_rewards:steering returns '{name}', a name that the run"):
        build_reward("user_rewards:steering").score([sample(name, "12")])
    build_reward("user_rewards:steering").score([sample("mine", "12")])


@pytest.mark.parametrize(
    "path, message",
    [
        ("no_such_module:f", "cannot be imported"),
        ("user_rewards:missing", "has no function 'missing'"),
        ("user_rewards:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
    ],
)
def test_paths_without_a_function(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward(path)
