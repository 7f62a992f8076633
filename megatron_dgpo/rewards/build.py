"""Builds a reward from its name."""

from __future__ import annotations

from typing import Any

from megatron_dgpo.rewards import exact, math_equivalence  # noqa: F401 - they enter the registry
from megatron_dgpo.rewards.base import Reward, registry
from megatron_dgpo.rewards.user import UserReward


def reward_names() -> list[str]:
    return sorted(registry)


def build_reward(name: str, *, timeout_seconds: float = 10.0, num_workers: int = 0, **options: Any) -> Reward:
    """The reward called `name`, or the function at "package.module:function".

    A response that takes longer than `timeout_seconds` in one of the `num_workers` processes counts as
    failed; with no workers scoring runs in the calling process and cannot be timed out.

    Raises ValueError for an unknown name or option.
    """
    if ":" in name:
        return UserReward(name, timeout_seconds=timeout_seconds, num_workers=num_workers, **options)
    if name not in registry:
        raise ValueError(f"unknown reward {name!r}, expected one of {reward_names()}")
    try:
        return registry[name](timeout_seconds=timeout_seconds, num_workers=num_workers, **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} does not take the options {sorted(options)}: {error}") from error
