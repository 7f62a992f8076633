"""What every piece of an algorithm reads out of a packed batch. Shape suffix: T packed tokens."""

from __future__ import annotations

import torch

from megatron_dgpo.types import PackedBatch

Metrics = dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]
"""name -> (sum, count): both add up over micro-batches and ranks; the metric is sum / count."""


def feature(batch: PackedBatch, name: str) -> torch.Tensor:
    """batch.features[name], (T,). Raises KeyError naming what the batch has."""
    if name not in batch.features:
        raise KeyError(
            f"batch.features has no {name!r} (it has {sorted(batch.features)}): fill it before the update"
        )
    return batch.features[name]


def only(values_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """The values where mask_T, 0 elsewhere, whatever stands there."""
    return torch.where(mask_T, values_T, torch.zeros_like(values_T))


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, count) over the tokens of mask_T, on the device: reading them out is the caller's choice."""
    return only(values_T.detach().double(), mask_T).sum(), mask_T.sum()
