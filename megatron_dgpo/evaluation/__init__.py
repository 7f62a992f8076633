"""Evaluation: pure metrics over groups of scored samples."""

from __future__ import annotations

from megatron_dgpo.evaluation.metrics import avg_at_k, cons_at_k, is_correct, pass_at_k, summarize

__all__ = ["avg_at_k", "cons_at_k", "is_correct", "pass_at_k", "summarize"]
