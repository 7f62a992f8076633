"""The keys and values of a batch that is being generated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Tokens that a layer has room for beyond those it was last made for."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, (rows, key/value heads, tokens, D), as views of storage with room for more:
    transformers' own layer copies all of them for each token."""

    keys: torch.Tensor
    values: torch.Tensor
    _rooms: list[torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        if self._rooms is None or self._rooms[0].shape[-2] < end:
            self._rooms = [
                _roomier(x, new, held, end + _ROOM)
                for x, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, held:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with these rows; one may come several times."""
        super().batch_select_indices(indices)
        self._rooms = None


def _roomier(held_states: torch.Tensor, new: torch.Tensor, held: int, tokens: int) -> torch.Tensor:
    room = new.new_empty(*new.shape[:2], tokens, new.shape[-1])
    if held:
        room[:, :, :held] = held_states
    return room


class KeyValues(DynamicCache):
    """transformers' cache, with a RoomyLayer in place of each plain layer."""

    layers: list[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = RoomyLayer()

    @property
    def sees_all(self) -> bool:
        """Whether every layer sees all tokens before one, and none a window of them."""
        return all(type(layer) is RoomyLayer for layer in self.layers)
