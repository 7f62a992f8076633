"""What a reward is, and the registry of rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

from megatron_dgpo.rewards.answers import explicit_answer
from megatron_dgpo.types import Sample


@dataclass(frozen=True)
class Outcome:
    """The result of scoring one response: a value, or the reason of a failure."""

    value: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    """Components to look at when the reward stays at 0, such as whether an answer was found at all."""
    error: str | None = None
    answer: str | None = None
    """The answer that was judged, equal answers written alike, where scoring has found it anyway."""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.error is None):
            raise ValueError(f"an outcome has a value or an error: got {self.value!r} and {self.error!r}")


class Reward(ABC):
    """Scores responses. A reward that fails on a response is not the same as a wrong response."""

    def __init__(self, *, timeout_seconds: float = 10.0, num_workers: int = 0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}, expected more than 0")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected at least 0")
        self.timeout_seconds = timeout_seconds
        self.num_workers = num_workers

    def score(self, samples: Sequence[Sample]) -> None:
        """Set `reward`, `reward_parts`, `reward_error` and `answer` of every sample.

        Where scoring fails (time-out, crash, gold answer that cannot be read) or the engine aborted
        the generation, `reward` is None and `reward_error` says why.
        """
        complete = [sample for sample in samples if sample.finish_reason != "abort"]
        for sample in samples:
            sample.reward, sample.reward_parts, sample.reward_error = None, {}, "generation was aborted"
            sample.answer = None
        for sample, outcome in zip(complete, self.outcomes(complete), strict=True):
            sample.reward = outcome.value
            sample.reward_parts = dict(outcome.parts)
            sample.reward_error = outcome.error
            sample.answer = self.answer_of(sample) if outcome.answer is None else outcome.answer

    @abstractmethod
    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome for each sample, in order."""

    @abstractmethod
    def canonical_answer(self, text: str) -> str | None:
        """The final answer of a complete response text, equal answers written alike; None without one."""

    def answer_of(self, sample: Sample) -> str | None:
        """The final answer of a response as the reward takes it, equal answers written alike.

        None where it takes none: here, where a response that was cut announces no answer.
        """
        complete = sample.finish_reason == "stop" or explicit_answer(sample.text) is not None
        return self.canonical_answer(sample.text) if complete else None

    def response_with(self, answer: str) -> str:
        """The text of a response that gives this answer."""
        return answer

    def close(self) -> None:  # noqa: B027 - most rewards hold nothing
        """End worker processes, where there are any."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


registry: dict[str, type[Reward]] = {}
"""Name -> reward, as `register` enters them."""
R = TypeVar("R", bound=type[Reward])


def register(name: str) -> Callable[[R], R]:
    """Class decorator: make a reward available to `build_reward` under `name`."""

    def enter(cls: R) -> R:
        if registry.setdefault(name, cls) is not cls:
            raise ValueError(f"reward {name!r} is registered already, as {registry[name].__qualname__}")
        return cls

    return enter
