"""Keeping an engine's weights current, and proving that they are.

After a sync the engine and the trainer score the same token ids: weights that arrived under wrong names,
or not at all, give other log-probs, whatever the transport said.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.config import SyncConfig
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.progress import progress
from megatron_dgpo.types import WeightBucket
from megatron_dgpo.weights.export import export_stream, stage_buckets

log = logging.getLogger(__name__)

Score = Callable[[Sequence[Sequence[int]]], list[list[float]]]
"""Token ids -> the trainer's log-probs at temperature 1 (entry t: token t + 1 after tokens 0..t), on every
rank; collective."""

_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 16
_DEFAULT_GAP = {4: 1e-3, 2: 0.05}
"""Mean difference in nats by the bytes of a parameter. In bfloat16 kernels that add in another order differ
by a few hundredths on unlikely tokens."""


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
    """

    def __init__(
        self,
        model: PolicyModel,
        groups: platform.Groups,
        engine: TakesAll | TakesStages,
        config: SyncConfig,
        score: Score,
    ) -> None:
        self._model = model
        self._groups = groups
        self._engine = engine
        self._config = config
        self._score = score
        self._first = True
        itemsize = next(model.parameters()).dtype.itemsize
        self._bound = config.max_log_prob_gap or _DEFAULT_GAP[itemsize]
        self._probe_ids = probe_ids(model.shape.vocab_size, model.shape.max_positions)

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
                lambda: stage_buckets(self._model, self._groups, bucket_bytes=limit), version
            )
            changed = changed or replaced
        else:
            stream = export_stream(self._model, self._groups, bucket_bytes=limit)
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
        """Compare the log-probs of fixed token ids; None where every server is gone by now."""
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
    """The fixed sequences of the probe: ids from all over the vocabulary, but for its last, which SGLang
    does not score."""
    draw = random.Random("probe")
    length = min(_PROBE_TOKENS, max_positions)
    return [[draw.randrange(vocab_size - 1) for _ in range(length)] for _ in range(_PROBE_SEQUENCES)]


def _gap(ours: list[list[float]], theirs: list[list[float]]) -> Gap:
    differences = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    # A difference that is no number must not hide behind max().
    worst = max(differences) if all(d == d for d in differences) else float("nan")
    return Gap(sum(differences) / len(differences), worst)
