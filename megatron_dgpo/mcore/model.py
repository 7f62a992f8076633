"""A Megatron GPTModel of a Hugging Face model's shape that hands out hidden states.

The LM head's weight is part of the model (checkpoints, tying, gradients), but the model never
multiplies by it: the loss does, chunk by chunk.

Shape suffixes: T packed tokens, H hidden size, K local vocabulary shard, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dgpo import patches, platform
from megatron_dgpo.mcore.fields import TRANSFORMER
from megatron_dgpo.mcore.hf_config import ModelShape, RopeScaling
from megatron_dgpo.mcore.layers import PackedLayout, block_spec
from megatron_dgpo.types import PackedBatch


def transformer_config(
    shape: ModelShape, parallel: Any, params_dtype: torch.dtype, overrides: Mapping[str, Any]
) -> TransformerConfig:
    """Megatron's config for this model; `overrides` are TransformerConfig fields by name.

    Raises ValueError naming an override that Megatron does not have or cannot take.
    """
    on_gpu = platform.has_gpu()
    values: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_std,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Packed micro-batches differ in length, and pipeline stages have to agree on it.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",  # not used; Megatron checks it with the line above
        # Gradients are summed, not averaged: every token's coefficient already holds the global
        # denominator (see PackedBatch.coefficients_T).
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        # Fusions by torch's compiler, and by an extension that Apex brings.
        gradient_accumulation_fusion=on_gpu and parallel_layers._grad_accum_fusion_available,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,  # PackedSelfAttention rotates
    )
    return TransformerConfig(**{**values, **TRANSFORMER.values(overrides)})


def scaled(inverse_D2: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's inverse frequencies, (D / 2,) in radians a token, from the unscaled ones.

    With r = original_positions / wavelength, the number of turns within the original context, the
    frequency is kept where r is above high_freq_factor, divided by `factor` where r is below
    low_freq_factor, and linear in r in between.
    """
    turns = scaling.original_positions * inverse_D2 / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return inverse_D2 * (kept + (1 - kept) / scaling.factor)


class PolicyModel(GPTModel):
    """GPTModel for packed batches whose last stage returns hidden states after the final norm."""

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, layer_spec: str, *, pre: bool, post: bool
    ) -> None:
        spec, own_rotation = block_spec(config, layer_spec)
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=shape.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=shape.max_positions,
            pre_process=pre,
            post_process=post,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
        )
        if shape.rope_scaling is not None:
            # Megatron's own scaling takes the factor alone and fixes the other three numbers.
            self.rotary_pos_emb.inv_freq = scaled(self.rotary_pos_emb.inv_freq, shape.rope_scaling)
        self.shape = shape
        self.own_rotation = own_rotation

    def forward(self, batch: PackedBatch) -> Tensor:  # type: ignore[override]
        """(T, 1, H) hidden states; (T / TP, 1, H) under sequence parallelism."""
        layout = PackedLayout.of(batch)
        embedded = None
        if self.pre_process:
            embedded = self.embedding(
                input_ids=batch.tokens_T.unsqueeze(0), position_ids=batch.positions_T.unsqueeze(0)
            )
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self._rope(batch.positions_T, layout),
            packed_seq_params=layout,
        )

    def _rope(self, positions_T: Tensor, layout: PackedLayout) -> Tensor:
        if not self.own_rotation:  # Transformer Engine's fused rotation looks the angles up itself
            return self.rotary_pos_emb(layout.max_seqlen_q, packed_seq=True)
        inverse = self.rotary_pos_emb.inv_freq.to(positions_T.device, torch.float32)
        angles = torch.outer(positions_T.to(torch.float32), inverse)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return torch.stack((angles.cos(), angles.sin())).to(self.config.params_dtype)

    @property
    def head_weight(self) -> Tensor:
        """The LM head's shard, (K, H), of the last stage (tied or not)."""
        return self.shared_embedding_or_output_weight() if self.shape.tied else self.output_layer.weight


def build_model(
    shape: ModelShape,
    parallel: Any,
    groups: platform.Groups,
    *,
    params_dtype: torch.dtype,
    layer_spec: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    kind: type[PolicyModel] = PolicyModel,
) -> PolicyModel:
    """This rank's part of the model, on its device, without weights (load them by the name table)."""
    config = transformer_config(shape, parallel, params_dtype, overrides or {})
    with patches.megatron_calls():
        model = kind(config, shape, layer_spec, pre=groups.is_first_stage, post=groups.is_last_stage)
        model.to(device=groups.device)
    if (overrides or {}).get("gradient_accumulation_fusion", True):
        _add_gradients_in_float32(model)
    return model.bfloat16() if params_dtype == torch.bfloat16 else model


def _add_gradients_in_float32(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add a micro-batch's gradients to the float32 sums themselves. Otherwise
    they round each to bfloat16 first. Of all layers, Megatron asks for Apex's extension, which these do not
    take."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
