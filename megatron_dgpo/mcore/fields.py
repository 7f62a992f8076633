"""Which fields of Megatron-Core's dataclasses a config may set, known without importing Megatron."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_dgpo.mcore.field_types import NotThis, enum_class, enum_members, field_types, made, read


def _follows(source: str) -> str:
    return f"follows from {source} and cannot be set"


_FROM_HF = _follows("the model's config.json")
_WHOLE = _follows("the export of whole parameters after a step")
_PARALLEL = _follows("the [parallel] section")
_DENSE = "is not supported: the models are dense transformers"
_PACKED = "is not supported: packed micro-batches differ in length"
_GENERATION = "is of generation, which the rollout engine does"
_PRECISION = _follows("model.params_dtype")
_FORMAT = _follows("the checkpoint format")
_LOSS = _follows("the loss's global denominators")
OWNED_TRANSFORMER_FIELDS = {
    **dict.fromkeys(
        ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
         "ffn_hidden_size", "normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func",
         "add_bias_linear", "add_qkv_bias", "qk_layernorm", "init_method_std", "embedding_init_method_std",
         "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm", "softmax_scale",
         "softmax_type", "glu_linear_offset", "activation_func_clamp_value", "rotary_interleaved",
         "window_size", "window_attn_skip_freq", "no_rope_freq", "mrope_section", "qk_l2_norm",
         "attention_output_gate"),
        _FROM_HF,
    ),
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16", "enable_autocast", "autocast_dtype"),
                    _PRECISION),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
         "sequence_parallel", "variable_seq_lengths", "hierarchical_context_parallel_sizes",
         "max_seqlen_per_dp_cp_rank", "hybrid_context_parallel", "cp_comm_type",
         "tensor_parallel_num_weight_shards", "gtp_weight_remat_size", "use_te_rng_tracker",
         "pipeline_model_parallel_comm_backend", "batch_p2p_comm", "use_ring_exchange_p2p"),
        _PARALLEL,
    ),
    **dict.fromkeys(
        ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", "mtp_standalone",
         "microbatch_group_size_per_vp_stage", "overlap_p2p_comm", "overlap_p2p_comm_warmup_flush",
         "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        "is not supported: a stage has one block of layers (num_layers_in_first_pipeline_stage and "
        "num_layers_in_last_pipeline_stage make uneven ones)",
    ),
    **dict.fromkeys(
        ("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "defer_embedding_wgrad_compute",
         "wgrad_deferral_limit"),
        _follows("the loss, which owns the LM head"),
    ),
    "calculate_per_token_loss": _LOSS,
    **dict.fromkeys(
        ("num_moe_experts", "multi_latent_attention", "experimental_attention_variant", "is_hybrid_model",
         "heterogeneous_block_specs", "hetereogenous_dist_checkpoint", "use_mup",
         "use_grouped_gemm_for_dense_mlp", "use_grouped_gemm_for_shared_expert",
         "overlap_dispatch_backward_with_experts_wgrad", "overlap_moe_expert_parallel_comm",
         "ep_overlap_early_attn_memory_release", "use_mamba_mem_eff_path",
         "use_fused_weighted_squared_relu"),
        _DENSE,
    ),
    **dict.fromkeys(("transformer_impl",), _follows("model.layer_spec")),
    **dict.fromkeys(("init_model_with_meta_device",), _follows("the weights, which are loaded by name")),
    **dict.fromkeys(
        ("enable_cuda_graph", "external_cuda_graph", "tp_only_amax_red", "first_last_layers_bf16",
         "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        _PACKED,
    ),
    **dict.fromkeys(
        ("masked_softmax_fusion", "persist_layer_norm", "memory_efficient_layer_norm", "qk_clip",
         "qk_clip_alpha", "qk_clip_threshold", "log_max_attention_logit", "test_mode",
         "disable_bf16_reduced_precision_matmul", "fused_single_qkv_rope",
         "fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size",
         "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks",
         "activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads"),
        "does nothing here: no part of a run reads it",
    ),
    **dict.fromkeys(
        ("flash_decode", "symmetric_ar_type", "use_inference_optimized_layers", "mlp_chunks_for_prefill",
         "nccl_all_reduce_for_prefill"),
        _GENERATION,
    ),
}  # fmt: skip
OWNED_TRANSFORMER_PREFIXES = {
    **dict.fromkeys(("moe_", "expert_", "mtp_", "dsa_", "linear_", "mamba_", "mup_"), _DENSE),
    **dict.fromkeys(("fp8", "fp4"), _PACKED),
    "cuda_graph_": _PACKED,
    "tp_comm_": "is not supported: Transformer Engine's user buffers are not set up",
    "inference_": _GENERATION,
}
_ADAM = "is not supported: the optimizer is AdamW"
OWNED_OPTIMIZER_FIELDS = {
    **{name: _follows(f"optimizer.{name}") for name in ("lr", "min_lr", "weight_decay", "clip_grad")},
    **{name: _follows(f"optimizer.{name}") for name in ("adam_beta1", "adam_beta2", "adam_eps")},
    **dict.fromkeys(("bf16", "fp16", "params_dtype", "loss_scale", "initial_loss_scale", "min_loss_scale",
                     "loss_scale_window", "hysteresis"), _PRECISION),
    **dict.fromkeys(("use_distributed_optimizer", "use_layer_wise_distributed_optimizer",
                     "store_param_remainders"),
                    _FORMAT),
    **dict.fromkeys(("overlap_param_gather", "overlap_param_gather_with_optimizer_step"), _WHOLE),
    **dict.fromkeys(("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"), _PACKED),
    "optimizer": _ADAM,
}  # fmt: skip
OWNED_OPTIMIZER_PREFIXES = dict.fromkeys(("sgd_", "muon_", "lion_", "soap_", "adaptive_muon_"), _ADAM)
_NO_FSDP = "is of Megatron's FSDP, which is not used"
OWNED_DDP_FIELDS = {
    "use_distributed_optimizer": _FORMAT,
    "average_in_collective": _LOSS,
    **dict.fromkeys(("overlap_param_gather", "align_param_gather"), _WHOLE),
    **dict.fromkeys(
        ("use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy",
         "outer_dp_sharding_strategy", "suggested_communication_unit_size", "preserve_fp32_weights"),
        _NO_FSDP,
    ),
    **dict.fromkeys(("fp8_param_gather", "fp4_param_gather", "keep_fp8_transpose_cache",
                     "reuse_grad_buf_for_mxfp8_param_ag"), _PACKED),
    "num_distributed_optimizer_instances": _PARALLEL,
}  # fmt: skip
OWNED_DDP_PREFIXES = dict.fromkeys(("fsdp_", "megatron_fsdp_"), _NO_FSDP)


ONLY_TRANSFORMER_ENGINE = (
    *("attention_backend", "flash_attention_version", "attention_dropout"),
    *("apply_query_key_layer_scaling", "use_te_activation_func", "use_transformer_engine_op_fuser"),
    *("fused_residual_rmsnorm", "apply_rope_fusion", "cpu_offloading", "disable_parameter_transpose_cache"),
)
"""Fields of TransformerConfig that the torch layer spec does not read."""


def not_of_torch(given: Mapping[str, Any], why: str) -> Iterator[str]:
    """A line for each of TransformerConfig's fields that would do nothing under the torch layer spec, which
    was chosen for the reason `why`."""
    for key in ONLY_TRANSFORMER_ENGINE:
        if given.get(key):  # false, or 0, is what the torch spec does
            yield (
                f"model.transformer.{key}: only Transformer Engine's layers read it, and the layer spec is "
                f"'torch' ({why})"
            )


def low_precision_states(given: Mapping[str, Any]) -> Iterator[str]:
    """A line for each of OptimizerConfig's precisions that only its precision-aware optimizer has."""
    for key in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if given.get(key, "float32") != "float32" and not given.get("use_precision_aware_optimizer"):
            yield (
                f"optimizer.megatron.{key}: {given[key]!r} needs use_precision_aware_optimizer = true beside "
                "it, which takes Transformer Engine's Adam"
            )


@dataclasses.dataclass(frozen=True)
class PassedThrough:
    """A section of the config whose keys are fields of one of Megatron's dataclasses."""

    section: str
    module: str
    """Where the dataclass is defined."""
    cls: str
    owned: Mapping[str, str]
    """Fields that users may not set, each with the reason."""
    owned_prefixes: Mapping[str, str]
    """The same of all fields whose names begin so."""

    def types(self) -> dict[str, str]:
        """Field -> its type as Megatron's source writes it, such as "bool" or "Optional[int]"."""
        return field_types(self.module, self.cls)

    def refusal(self, key: str) -> str | None:
        """Why users may not set a field; None where they may."""
        begins = (why for prefix, why in self.owned_prefixes.items() if key.startswith(prefix))
        return self.owned.get(key) or next(begins, None)

    def problems(self, given: Mapping[str, Any]) -> Iterator[str]:
        """A line for each setting that Megatron's dataclass does not have, that it cannot take, or that
        follows from something else."""
        types = self.types() if given else {}
        for key, value in given.items():
            name = f"{self.section}.{key}"
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1)
                hint = f" (did you mean {self.section}.{near[0]}?)" if near else ""
                yield f"{name}: Megatron has no such field{hint}"
            elif (why := self.refusal(key)) is not None:
                yield f"{name}: {why}"
            else:
                try:
                    read(value, types[key], self._members)
                except NotThis as error:
                    yield f"{name}: {error}"

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as the dataclass takes them: names of precisions and of members of enumerations become
        what they name. Imports torch, and Megatron where an enumeration asks for it.

        Raises ValueError with the first of `problems`.
        """
        if wrong := next(self.problems(given), None):
            raise ValueError(wrong)
        types = self.types() if given else {}
        return {key: made(read(value, types[key], self._members), self._home) for key, value in given.items()}

    def _members(self, name: str) -> tuple[str, ...]:
        return enum_members(self.module, name)

    def _home(self, name: str) -> Any:
        return enum_class(self.module, name)


TRANSFORMER = PassedThrough(
    "model.transformer",
    "megatron.core.transformer.transformer_config",
    "TransformerConfig",
    OWNED_TRANSFORMER_FIELDS,
    OWNED_TRANSFORMER_PREFIXES,
)
DDP = PassedThrough(
    "ddp",
    "megatron.core.distributed.distributed_data_parallel_config",
    "DistributedDataParallelConfig",
    OWNED_DDP_FIELDS,
    OWNED_DDP_PREFIXES,
)
OPTIMIZER = PassedThrough(
    "optimizer.megatron",
    "megatron.core.optimizer.optimizer_config",
    "OptimizerConfig",
    OWNED_OPTIMIZER_FIELDS,
    OWNED_OPTIMIZER_PREFIXES,
)
PASSED_THROUGH = (TRANSFORMER, DDP, OPTIMIZER)
