"""Settings that only Megatron itself can judge, asked before any process group or model exists."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import layers as parallel_layers

from megatron_dgpo.config import Config, SFTConfig
from megatron_dgpo.mcore.fields import not_of_torch
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.mcore.layers import choose_spec
from megatron_dgpo.mcore.model import transformer_config
from megatron_dgpo.mcore.policy import ddp_config, optimizer_config


def refused_by_megatron(config: Config | SFTConfig) -> Iterator[str]:
    """Lines for settings that Megatron's dataclasses refuse together, and for those that the layer spec of
    this machine does not read."""
    shape = ModelShape.of(config.model)
    dtype: torch.dtype = getattr(torch, config.model.params_dtype)
    transformer = config.model.transformer
    native, why = choose_spec(config.model.layer_spec, dtype)
    if native:
        yield from not_of_torch(transformer, why)
    if transformer.get("gradient_accumulation_fusion") and not parallel_layers._grad_accum_fusion_available:
        yield (
            "model.transformer.gradient_accumulation_fusion: Megatron's layers need Apex's extension "
            "fused_weight_gradient_mlp_cuda for it; leave it out (Transformer Engine's layers do without)"
        )
    builds: dict[str, Callable[[], Any]] = {
        "model.transformer": lambda: transformer_config(shape, config.parallel, dtype, transformer),
        "ddp": lambda: ddp_config(config.ddp),
        "optimizer.megatron": lambda: optimizer_config(config.optimizer, dtype),
    }
    for section, build in builds.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run itself says it
                build()
        except Exception as error:  # Megatron raises many kinds
            said = " ".join(str(error).split()) or type(error).__name__
            yield f"{section}: Megatron refuses these settings: {said}"
