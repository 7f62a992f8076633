"""Prompt and supervised data sets; packing into token-budgeted micro-batches is in `data.packing`, which
needs torch."""

from __future__ import annotations

from megatron_dgpo.data.prompts import PromptCursor, deduplicate, load_prompts
from megatron_dgpo.data.supervised import SupervisedExample, load_supervised

__all__ = ["PromptCursor", "SupervisedExample", "deduplicate", "load_prompts", "load_supervised"]
