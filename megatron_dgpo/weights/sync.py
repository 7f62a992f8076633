"""Keeping an engine's weights current."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.weights.export import export_stream


class TakesWeights(Protocol):
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...


class WeightSync:
    """Pushes the policy's weights into an engine; collective over each replica."""

    def __init__(self, model: PolicyModel, groups: platform.Groups, engine: TakesWeights) -> None:
        self._model = model
        self._groups = groups
        self._engine = engine

    def push(self, version: int) -> None:
        """After this, everything the engine generates carries `version`."""
        stream = export_stream(self._model, self._groups)
        self._engine.update_weights(stream, version)
        for _ in stream:  # an engine that stops early must not leave the other ranks waiting
            pass
