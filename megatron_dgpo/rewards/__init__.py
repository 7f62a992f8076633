"""Rewards: from a response to a number, or to the reason why there is none."""

from __future__ import annotations

from megatron_dgpo.rewards.base import Outcome, Reward, register
from megatron_dgpo.rewards.build import build_reward, reward_names
from megatron_dgpo.rewards.terms import Combined, build_term

__all__ = [
    "Combined",
    "Outcome",
    "Reward",
    "build_reward",
    "build_term",
    "canonical_answer",
    "register",
    "reward_names",
]


def canonical_answer(name: str, text: str) -> str | None:
    """The final answer of a response text in the form in which reward `name` counts votes for it.

    None where the text gives no answer. Raises ValueError for an unknown name.
    """
    return build_reward(name).canonical_answer(text)
