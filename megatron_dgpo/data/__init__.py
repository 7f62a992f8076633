"""Prompt and supervised data sets, and packing into token-budgeted micro-batches."""

from __future__ import annotations

from megatron_dgpo.data.packing import PackItem, balanced_bins, empty_batch, pack, unpack
from megatron_dgpo.data.prompts import PromptCursor, deduplicate, load_prompts
from megatron_dgpo.data.supervised import SupervisedExample, load_supervised

__all__ = [
    "PackItem",
    "PromptCursor",
    "SupervisedExample",
    "balanced_bins",
    "deduplicate",
    "empty_batch",
    "load_prompts",
    "load_supervised",
    "pack",
    "unpack",
]
