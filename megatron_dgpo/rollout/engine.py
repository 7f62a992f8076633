"""What every rollout engine offers, in the training process or behind HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron_dgpo.types import Group, Prompt


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn.

    Filters apply in the order temperature, top-k, top-p, min-p. Raises ValueError, naming the field,
    for a value out of range.
    """

    max_new_tokens: int
    """Response tokens at most, the stop token included."""
    temperature: float = 1.0
    """Divides the logits. 0 is greedy decoding: the largest logit, without filters."""
    top_p: float = 1.0
    """Nucleus mass, in (0, 1]; 1 keeps everything."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability, in [0, 1]."""
    n: int = 1
    """Samples per prompt (G)."""
    seed: int = 0
    """With it and the prompt's id, a sample is the same wherever it is drawn by the embedded engine.
    Change it from step to step, or a prompt that returns meets the same random numbers."""
    stop_token_ids: tuple[int, ...] = ()
    """A response ends with the first of these. Empty: only at max_new_tokens; the tokenizer's end of
    sequence is not implied."""

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("n", 1), ("seed", 0)):
            value = getattr(self, name)
            if not _is_int(value) or value < low:
                raise ValueError(f"sampling: {name} must be an integer of at least {low}, not {value!r}")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"sampling: temperature must be a number >= 0, not {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must be in (0, 1], not {self.top_p!r} (1 turns it off)")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling: min_p must be in [0, 1], not {self.min_p!r} (0 turns it off)")
        if not isinstance(self.stop_token_ids, tuple) or not all(
            _is_int(i) and i >= 0 for i in self.stop_token_ids
        ):
            raise ValueError(
                f"sampling: stop_token_ids must be a tuple of token ids, not {self.stop_token_ids!r}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def spoken(token_ids: Sequence[int], finish_reason: str) -> Sequence[int]:
    """The tokens of a response that its text is of: not the one that ended it, special or not."""
    return token_ids[:-1] if finish_reason == "stop" else token_ids


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class EnginesLost(RuntimeError):
    """Every server that could draw the rest of a call's samples is gone.

    `groups` has the call's groups in order, None for each that is not complete.
    """

    def __init__(self, message: str, groups: list[Group | None]) -> None:
        super().__init__(message)
        self.groups = groups


@runtime_checkable
class Engine(Protocol):
    """Draws responses under the weights it was last given.

    Each rank has its own engine object and gives it its own prompts. Weights come in one of two ways:
    whole, into an engine that lives in the rank (`update_weights`), or from the ranks that own them
    into servers that all ranks share (`SGLangEngine.update_weights_by_stage`).
    """

    @property
    def weight_version(self) -> int:
        """The version of the weights in use; -1 before the first complete update."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], object] | None = None,
        on_group: Callable[[Group], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Sequence[Group | None]:
        """`params.n` samples for each prompt, groups in the order of the prompts.

        `on_progress` is called with the number of samples that are done since its last call, `on_group`
        with each group when it is complete. Once `should_stop` answers True, what is still being drawn
        is given up, and a group that is not complete is None. The engine may call the three from a
        thread of its own; none of them waits for anything.

        May be called from several threads, and weights may change meanwhile: a call that begins during
        an update waits for its end, and each sample says which weights drew which of its tokens.
        """
        ...

    def log_probs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score given sequences at temperature 1: entry t of a result is the log-probability in nats
        of token t + 1 after tokens 0..t, so a sequence of T tokens has T - 1 entries."""
        ...

    def probe(self, token_ids: Sequence[Sequence[int]]) -> Mapping[str, list[list[float]]]:
        """`log_probs` by each server that this rank speaks for, by its name. Over all ranks every server
        answers once."""
        ...

    def rest(self) -> None:
        """Nothing is drawn until weights come again: give up what others may use meanwhile."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it cannot be used afterwards."""
        ...
