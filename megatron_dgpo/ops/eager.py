"""Vocabulary-parallel token statistics in torch: the eager implementation of `driver.Kernels`.

Shape suffixes: C a chunk of packed tokens, K local vocabulary shard.

Arithmetic is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch

from megatron_dgpo.ops.driver import Incoming, Kernels, Plan, compute_dtype
from megatron_dgpo.ops.shards import logits_gradient, reduce_shard


def _scaled(logits_CK: torch.Tensor, plan: Plan, *, owned: bool, copy: bool = False) -> torch.Tensor:
    """The vocabulary columns over the temperature, in the compute dtype."""
    z = logits_CK[:, : plan.width].to(compute_dtype(logits_CK), copy=copy)
    if plan.temperature == 1.0:
        return z
    return z.div_(plan.temperature) if owned or copy else z / plan.temperature


def _reduce(
    logits_CK: torch.Tensor,
    columns_C: torch.Tensor,
    reference_CK: torch.Tensor | None,
    plan: Plan,
    owned: bool,
) -> torch.Tensor:
    z = _scaled(logits_CK, plan, owned=owned)
    if reference_CK is not None:
        reference_CK = _scaled(reference_CK, plan, owned=owned).to(z.dtype)
    return reduce_shard(z, columns_C, reference_CK, owned=owned)


def _write_gradient(logits_CK: torch.Tensor, out_CK: torch.Tensor, incoming: Incoming, plan: Plan) -> None:
    z = _scaled(logits_CK, plan, owned=False, copy=True)
    out_CK[:, : plan.width] = logits_gradient(z, *incoming)
    out_CK[:, plan.width :] = 0


def _into_gradient(
    logits_CK: torch.Tensor, dtype: torch.dtype, incoming: Incoming, plan: Plan
) -> torch.Tensor:
    return logits_gradient(_scaled(logits_CK, plan, owned=True), *incoming).to(dtype)


KERNELS = Kernels(_reduce, _write_gradient, _into_gradient)
