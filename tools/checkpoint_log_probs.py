"""Log-probs of given tokens under a Megatron checkpoint at a split, and under transformers' model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.config import ParallelConfig
from megatron_dgpo.data.packing import PackItem, pack, unpack
from megatron_dgpo.mcore.checkpoint import load_weights
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.mcore.model import build_model
from megatron_dgpo.mcore.policy import forward
from megatron_dgpo.ops import linear_token_stats
from megatron_dgpo.types import PackedBatch

Ids = Sequence[int]
TOKENS_PER_MICROBATCH = 4096


def megatron_log_probs(
    checkpoint: Path, shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype, sequences: list[Ids]
) -> list[list[float]]:
    """Of every token but the first of each sequence. Runs on each rank of the split; all have the result.

    Raises what `load_weights` raises.
    """
    groups = platform.start(parallel, seed=1)
    model = build_model(shape, parallel, groups, params_dtype=dtype)
    load_weights(model, groups, checkpoint)
    items = [PackItem(ids[:1], ids[1:]) for ids in sequences]
    longest = max(item.num_positions for item in items)
    batches = pack(items, max_tokens=max(longest, TOKENS_PER_MICROBATCH), device=groups.device)

    def log_probs(hidden: Tensor, weight: Tensor, batch: PackedBatch) -> Tensor:
        stats = linear_token_stats(
            hidden, weight, batch.targets_T, tp_group=groups.tp, vocab_size=shape.vocab_size
        )
        return stats.log_probs.cpu()

    values = forward(model, batches, log_probs)
    mine = [row.tolist() for row in unpack(batches, values, len(items))] if values else None
    parts = platform.gather_objects(mine, groups.world)
    return next(part for part in parts if part is not None)


@torch.no_grad()
def transformers_log_probs(folder: Path, dtype: torch.dtype, sequences: list[Ids]) -> list[list[float]]:
    """The same by transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = platform.device()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    rows = []
    for ids in sequences:
        tokens = torch.tensor([list(ids)], device=device)
        logits = model(tokens[:, :-1]).logits[0].float()
        rows.append(torch.log_softmax(logits, -1).gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return rows
