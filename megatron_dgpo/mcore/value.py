"""A value model: the policy's transformer with one number a token in place of the LM head.

Shape suffixes: T packed tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.mcore.model import PolicyModel


class ValueModel(PolicyModel):
    """Its `head_weight` is (1, H), the same on every tensor-parallel rank, and 0 at the start, so that the
    start does not depend on the split."""

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, layer_spec: str, *, pre: bool, post: bool
    ) -> None:
        super().__init__(config, dataclasses.replace(shape, tied=False), layer_spec, pre=pre, post=post)
        if post:  # under the LM head's name, which Megatron's checkpoints ask for
            self.output_layer = torch.nn.Linear(shape.hidden_size, 1, bias=False, dtype=config.params_dtype)
            torch.nn.init.zeros_(self.output_layer.weight)


def token_values(hidden: Tensor, weight: Tensor, config: Any, groups: platform.Groups) -> Tensor:
    """(T,) float32 values from hidden states, (T, H) or (T / TP, H) under sequence parallelism, and the
    head's weight (1, H); gradients flow."""
    if config.sequence_parallel:
        # Every rank goes on alike from here, so a rank's rows have the gradient that it has itself.
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=groups.tp
        )
    return (hidden.float() @ weight.float().t()).squeeze(1)
