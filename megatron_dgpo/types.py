"""The nouns that every room of the house uses.

Shape suffixes: T packed tokens, S packed sequences, V vocabulary, K local vocabulary shard,
H hidden size, P prompts, G samples per prompt.

This module needs only the standard library; torch appears in annotations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One problem as the policy sees it."""

    id: str
    """Unique and stable across runs: data file and row."""
    token_ids: tuple[int, ...]
    text: str
    answer: str
    """The gold answer, as the reward reads it."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `start` up to `end` of a response were drawn under weights of this version."""

    version: int
    start: int
    end: int


@dataclass
class Sample:
    """One response to a prompt, with everything that is known about it."""

    prompt: Prompt
    index: int
    """Position in its group, 0 .. G-1."""
    token_ids: list[int]
    """Response ids as the engine chose them, the stop token included."""
    log_probs: list[float]
    """The engine's log-probability of each response token in nats, at the sampling temperature,
    before top-k, top-p and min-p."""
    finish_reason: FinishReason
    weight_versions: tuple[VersionSpan, ...]
    """Which weights drew which tokens: spans end to end over token_ids. More than one where weights
    changed while the response was being drawn."""
    text: str = ""
    """Of the response without the token that stopped it and without special tokens."""
    reward: float | None = None
    """None until scored, and where the reward *failed* (which is not the same as a wrong answer)."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    reward_error: str | None = None
    """Why the reward failed."""
    answer: str | None = None
    """What the reward took for the final answer, equal answers written alike; None where it took none."""
    advantage: float = 0.0
    """The response's group-relative advantage; a failed sample has none and does not train."""

    @property
    def weight_version(self) -> int:
        """The oldest weights that drew any of it."""
        return min(span.version for span in self.weight_versions)


@dataclass
class Group:
    """All samples of one prompt: the unit of the group-relative advantage."""

    prompt: Prompt
    samples: list[Sample]


@dataclass
class TokenStats:
    """Per-token numbers over the full vocabulary, float32, shape (T,), equal on every TP rank."""

    log_probs: torch.Tensor
    """log pi(target) in nats; gradients flow."""
    entropy: torch.Tensor
    """Shannon entropy of pi in nats; gradients flow when asked for."""
    hellinger: torch.Tensor | None = None
    """Squared Hellinger distance between pi and the reference, in [0, 1]; constant."""
    reference_log_probs: torch.Tensor | None = None
    """log pi_ref(target) in nats; constant."""
    reverse_kl: torch.Tensor | None = None
    """KL(pi || pi_ref) over the full vocabulary in nats, at least 0; constant."""


@dataclass
class CreditWeights:
    """How a response's advantage is spread over its tokens."""

    weights: torch.Tensor
    """(T,) float32; mean 1 over the counted tokens of each response, 0 on the others."""
    scores: torch.Tensor
    """(T,) float32; s = d * Hn^kappa."""
    effective_fraction: torch.Tensor
    """(S,) float32; (sum w)^2 / (T_i sum w^2), in (0, 1]: 1 when the credit is uniform."""


@dataclass
class PackedBatch:
    """One micro-batch: whole sequences end to end, without padding.

    A sequence of p prompt and r response tokens takes p + r - 1 positions: position t holds token t
    as input and token t + 1 as target. Responses to one prompt may share its first p - 1 positions, which
    are then a sequence of their own, without a loss; each of them takes r more (`shared_prompts`).
    """

    tokens_T: torch.Tensor
    """int64 inputs."""
    targets_T: torch.Tensor
    """int64 next tokens."""
    positions_T: torch.Tensor
    """int64, restart at 0 with each sequence."""
    loss_mask_T: torch.Tensor
    """bool: the target was produced by the policy (SFT: is part of the answer)."""
    cu_seqlens: torch.Tensor
    """int32 (S + 1,), from 0 to T."""
    advantages_S: torch.Tensor
    """float32; one advantage a sequence."""
    sample_ids: list[int] = field(default_factory=list)
    """(S,) position of each sequence in the list that was packed; negative for those that were not in it."""
    shared_prompts: list[int] = field(default_factory=list)
    """(S,) the sequence of this batch whose tokens come before those of each, or -1; empty where no prompt
    is shared."""
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    """(T,) or (T, H) tensors made by the trainer before the update, such as old_log_probs."""
    coefficients_T: torch.Tensor | None = None
    """float32; the share of each token in the mini-batch's loss, from global counts: fixed before
    the backward pass, so that the split does not matter."""
    record: dict[str, torch.Tensor] | None = None
    """Where there is one, the loss leaves the (T,) tensors of its last update in it: ratio, clipped, and
    weights, distances and entropy where these are taken at updates."""

    @cached_property
    def loss_rows(self) -> torch.Tensor:
        """int64, the positions of loss_mask_T: the tokens that the LM head works for."""
        return self.loss_mask_T.nonzero().squeeze(1)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1


@dataclass
class WeightBucket:
    """Some of the policy's weights under their Hugging Face names, end to end in one buffer.

    All have one dtype, so every offset is aligned.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    flat: torch.Tensor
    """(numel,) of `dtype`, on the policy's device; used again for a later bucket once `in_use` is done."""
    in_use: Callable[[], object] | None = None
    """Set by who sends the bucket: waits until the buffer may be written again."""
