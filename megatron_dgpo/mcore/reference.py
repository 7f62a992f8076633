"""The reference: a copy of the start policy that takes the policy's place in a forward pass.

Shape suffixes: T packed tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.hostmemory import HostMemory
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.types import PackedBatch

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WithReferenceFn = Callable[[Tensor, Tensor, PackedBatch, Tensor], Result]
"""(hidden (T, H), head weight (K, H), micro-batch, the reference's hidden (T, H)) -> anything."""

_DEVICE_SHARE = 1 / 16
"""Of a GPU's memory, what a reference may take that stays there by itself."""
_WINDOW_BYTES = 1 << 30
"""Of hidden states that wait on the device for the policy's weights; the reference's are in host memory."""


class Reference:
    """The present weights of a model, kept while it trains.

    They stay on the model's device, and its parameters point to them for a pass, which costs nothing; or they
    stay in host memory and are copied into the model's own buffers for a pass over many tokens.

    Args:
        placement: "device", "host", or "auto": the device where it is a CPU, or a GPU of whose memory the
            weights take a sixteenth at most.
    """

    def __init__(self, model: PolicyModel, groups: platform.Groups, placement: str) -> None:
        self._model = model
        self.on_device = _stays_on_device(model, groups, placement)
        self._parameters = dict(model.named_parameters())
        """By name; taken once, since a pass by turns asks for them at every micro-batch."""
        self._memory = HostMemory()
        copy = torch.clone if self.on_device else self._memory.copy
        self._weights = {name: copy(p.detach()) for name, p in self._parameters.items()}
        self._own: dict[str, Tensor] = {}
        """The policy's weights in host memory, while the reference's are in their place."""

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The model has the reference's weights."""
        if self.on_device:
            own = {name: p.data for name, p in self._parameters.items()}
            self._point_to(self._weights)
            try:
                yield
            finally:
                self._point_to(own)
            return
        for name, p in self._parameters.items():
            if name in self._own:
                self._own[name].copy_(p.detach(), non_blocking=True)
            else:
                self._own[name] = self._memory.copy(p.detach())
        self._fill_with(self._weights)
        try:
            yield
        finally:
            self._fill_with(self._own)

    def _point_to(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]

    @torch.no_grad()
    def _fill_with(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name], non_blocking=True)

    def windows(self, batches: Sequence[PackedBatch], row_bytes: int) -> Iterator[list[PackedBatch]]:
        """Runs of micro-batches whose hidden states, of `row_bytes` a token, fit on the device together; at
        least one micro-batch each."""
        window: list[PackedBatch] = []
        held = 0
        for batch in batches:
            if window and held + batch.num_tokens * row_bytes > _WINDOW_BYTES:
                yield window
                window, held = [], 0
            window.append(batch)
            held += batch.num_tokens * row_bytes
        yield window

    @property
    def head_weight(self) -> Tensor:
        """Its LM head's shard, (K, H), on the last stage."""
        name = "output_layer.weight"
        if self._model.shape.tied and self._model.pre_process:
            name = "embedding.word_embeddings.weight"
        return self._weights[name].to(next(self._model.parameters()).device, non_blocking=True)


class Turns(Generic[Result]):
    """A pass of `Policy.forward` in which each micro-batch comes twice: it goes through the reference, whose
    hidden states wait, and then through the policy."""

    def __init__(self, reference: Reference, fn: WithReferenceFn[Result]) -> None:
        self._reference = reference
        self._fn = fn
        self._weights = ExitStack()
        self._is_reference = False
        self._waiting: list[Tensor] = []

    def __enter__(self) -> Turns[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.close()

    def next(self) -> None:
        """Before each of this stage's forward passes: the weights that it takes."""
        self._weights.close()
        self._is_reference = not self._is_reference
        if self._is_reference:
            self._weights.enter_context(self._reference.lent())

    def take(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Result | None:
        """What comes out of it, on the last stage: nothing of the reference's."""
        if self._is_reference:
            self._waiting.append(hidden)
            return None
        return self._fn(hidden, weight, batch, self._waiting.pop())

    @staticmethod
    def policys(results: Sequence[Result | None]) -> list[Result]:
        """Of the results of all passes."""
        return cast("list[Result]", results[1::2])


def _stays_on_device(model: PolicyModel, groups: platform.Groups, placement: str) -> bool:
    """The same on every rank: the stages of a pipeline take their turns together."""
    if placement != "auto" or not platform.has_gpu():
        return placement != "host"
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    room = torch.cuda.get_device_properties(groups.device).total_memory
    stays = not platform.any_rank(size > room * _DEVICE_SHARE, groups)
    if groups.rank == 0:
        where = "on the GPU" if stays else "in host memory"
        log.info("the reference's weights (%.1f GB on this rank) stay %s", size / 1e9, where)
    return stays
