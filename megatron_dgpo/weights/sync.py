"""Keeping an engine's weights current, and proving that they are.

After a sync the engine and the trainer score the same token ids: weights that arrived under wrong names,
or not at all, give other log-probs, whatever the transport said. The ids are the run's own prompts and
responses: on ids that no text has, bfloat16 alone makes two correct implementations differ several times
as much.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.config import RESERVED_POSITIONS, SyncConfig
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.progress import progress
from megatron_dgpo.types import Group, Prompt, WeightBucket
from megatron_dgpo.weights.export import export_stream, stage_buckets

log = logging.getLogger(__name__)

Score = Callable[[Sequence[Sequence[int]]], list[list[float]]]
"""Token ids -> the trainer's log-probs at temperature 1 (entry t: token t + 1 after tokens 0..t), on every
rank; collective."""

_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 32
_RESPONSE_TOKENS = 16
"""Of a sequence's tokens, at most so many are of the response, from its beginning; the others are the
prompt's last ones, since prompts often begin alike."""
_DEFAULT_GAP = {4: 1e-3, 2: 0.2}
"""Mean difference in nats by the bytes of a parameter, on text. On SmolLM2-135M two correct implementations
in bfloat16 differ by 0.04 to 0.06. One tensor that is another layer's, or has its rows in another order,
makes it 1 to 10 in the first layer and 0.12 to 5.7 in others, where 0.2 finds all of the MLPs' and 28 of 48
of attention's."""
_DEFAULT_GAP_OF_IDS = {4: 1e-3, 2: 0.5}
"""On ids that are no text, where the same two differ by 0.06 to 0.13."""


class Engine(Protocol):
    @property
    def weight_version(self) -> int: ...

    def probe(self, token_ids: Sequence[Sequence[int]]) -> Mapping[str, list[list[float]]]:
        """Log-probs by each server that this rank speaks for, by its name."""
        ...


@runtime_checkable
class TakesAll(Engine, Protocol):
    """An engine of this rank's own, which reads the whole stream."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...


@runtime_checkable
class TakesStages(Engine, Protocol):
    """One engine for all ranks, to which each pipeline stage sends what it owns."""

    everywhere: bool
    """Whether every TP rank of a stage hands the buckets to it, and not the first alone."""

    def update_weights_by_stage(self, buckets: Callable[[], Iterable[WeightBucket]], version: int) -> bool:
        """Whether servers were replaced on the way; the same on every rank."""
        ...


class SyncMismatch(RuntimeError):
    """After a sync the engine's log-probs are not the trainer's."""


@dataclass(frozen=True)
class Gap:
    """Differences between engine and trainer over the probe's tokens, in nats."""

    mean: float
    max: float


class WeightSync:
    """Pushes the policy's weights into an engine; collective over all ranks.

    Args:
        score: the trainer's side of the probe.
        prompts: what the probe scores until `probe_with` gives it responses; the same on all ranks of a
            replica. Without any, it scores fixed ids.
    """

    def __init__(
        self,
        model: PolicyModel,
        groups: platform.Groups,
        engine: TakesAll | TakesStages,
        config: SyncConfig,
        score: Score,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self._model = model
        self._groups = groups
        self._engine = engine
        self._config = config
        self._score = score
        self._first = True
        itemsize = next(model.parameters()).dtype.itemsize
        self._bound = config.max_log_prob_gap or _DEFAULT_GAP_OF_IDS[itemsize]
        self._bound_of_text = config.max_log_prob_gap or _DEFAULT_GAP[itemsize]
        self._probe_ids = probe_ids(model.shape.vocab_size, model.shape.max_positions)
        self._read([(p.token_ids, ()) for p in prompts[:_PROBE_SEQUENCES]])

    def probe_with(self, groups: Sequence[Group]) -> None:
        """From now on the probe scores responses of the first of these groups; the same on all ranks of a
        replica."""
        self._read([(g.prompt.token_ids, g.samples[0].token_ids) for g in groups[:_PROBE_SEQUENCES]])

    def _read(self, found: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        shape = self._model.shape
        cut = [text_ids(*text, shape.vocab_size, shape.max_positions) for text in found]
        if texts := [ids for ids in cut if len(ids) > 1]:
            self._probe_ids, self._bound = texts, self._bound_of_text

    def push(self, version: int) -> Gap | None:
        """After this, everything the engine generates carries `version`. The gap, where it was probed:
        every `probe_every` versions, the first time, and whenever servers were replaced.

        Raises SyncMismatch on all ranks where the probe's gap is above the bound.
        """
        with progress(f"sending the weights of version {version}", bar=False):
            changed = self._send(version)
        every = self._config.probe_every
        self._first = False
        # Servers that are new have never proved that they can take weights.
        return self._probe(version) if every and (changed or version % every == 0) else None

    def _send(self, version: int) -> bool:
        """Whether some of the engine's servers take weights for the first time."""
        limit, changed = self._config.bucket_bytes, self._first
        if isinstance(self._engine, TakesStages):
            replaced = self._engine.update_weights_by_stage(
                partial(
                    stage_buckets,
                    self._model,
                    self._groups,
                    bucket_bytes=limit,
                    everywhere=self._engine.everywhere,
                ),
                version,
            )
            changed = changed or replaced
        else:
            stream = export_stream(self._model, self._groups, bucket_bytes=limit, to_keep=False)
            self._engine.update_weights(stream, version)
            for _ in stream:  # an engine that stops early must not leave the other ranks waiting
                pass
        return changed

    def recover(self, *, needed: bool) -> bool:
        """Whether any rank needs it: then dead servers are replaced and given the current weights."""
        if not platform.any_rank(needed, self._groups):
            return False
        self.push(self._engine.weight_version)
        return True

    def _probe(self, version: int) -> Gap | None:
        """Compare the log-probs of the same token ids; None where every server is gone by now."""
        ours = self._score(self._probe_ids)
        gaps = {who: _gap(ours, theirs) for who, theirs in self._engine.probe(self._probe_ids).items()}
        everywhere = [
            item for part in platform.gather_objects(gaps, self._groups.world) for item in part.items()
        ]
        if not everywhere:
            return None
        who, worst = max(everywhere, key=lambda item: item[1].mean)
        if not worst.mean <= self._bound:  # not a number is no match either
            raise SyncMismatch(
                f"after the sync of version {version}, {who} gives log-probs that differ from the trainer's "
                f"by {worst.mean:.2g} nats on average and {worst.max:.2g} at most; the bound is "
                f"{self._bound:.2g} (sync.max_log_prob_gap)"
            )
        return worst


def probe_ids(vocab_size: int, max_positions: int) -> list[list[int]]:
    """Fixed sequences, for where there is no text: ids from all over the vocabulary, but for its last, which
    SGLang does not score."""
    draw = random.Random("probe")
    length = _probe_length(max_positions)
    return [[draw.randrange(vocab_size - 1) for _ in range(length)] for _ in range(_PROBE_SEQUENCES)]


def text_ids(
    prompt_ids: Sequence[int], response_ids: Sequence[int], vocab_size: int, max_positions: int
) -> list[int]:
    """What the probe scores of a prompt and its response, if any: where the one goes over into the other.
    The vocabulary's last id gives way to the one before, as SGLang does not score it."""
    length = _probe_length(max_positions)
    response = list(response_ids[: min(_RESPONSE_TOKENS, length - 1)])
    prompt = list(prompt_ids[-(length - len(response)) :])
    return [min(i, vocab_size - 2) for i in prompt + response]


def _probe_length(max_positions: int) -> int:
    return max(2, min(_PROBE_TOKENS, max_positions - RESERVED_POSITIONS))


def _gap(ours: list[list[float]], theirs: list[list[float]]) -> Gap:
    differences = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    # A difference that is no number must not hide behind max().
    worst = max(differences) if all(d == d for d in differences) else float("nan")
    return Gap(sum(differences) / len(differences), worst)
