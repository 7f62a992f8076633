"""The torch-native transformer layer: what Megatron's *local* spec lacks, on torch alone.

The stock local norm refuses sequence parallelism and the stock attention refuses packed sequences
and holds the S x S scores. Both are replaced here, so that neither Transformer Engine nor Apex is
required; linear layers, embeddings and the block around them stay Megatron's.

Shape suffixes: T packed tokens, S sequences, L longest sequence, N local query heads, G local
key/value heads (query groups), D head dimension.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_dgpo.mcore.lean import SwiGLU, place_rows, rms_norm
from megatron_dgpo.types import PackedBatch

log = logging.getLogger(__name__)

_PADDING_SHARE = 0.1
"""Of the scores of a group of sequences, at most this part may belong to padding, or ..."""
_PADDING_SCORES = 4096
"""... so many: below, another call of the attention costs more than the padding does."""


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of sequences (their numbers) that are padded to the longest of the group, longest first.

    The scores of padding, the sum of L^2 - l^2 over a group, stay below the larger of the two limits above.
    """
    groups: list[list[int]] = []
    longest = spent = real = 0
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        own = lengths[n] ** 2
        more = longest**2 - own
        if not groups or spent + more > max(_PADDING_SCORES, _PADDING_SHARE * (real + own)):
            groups.append([])
            longest, spent, real, more = lengths[n], 0, 0, 0
        groups[-1].append(n)
        spent, real = spent + more, real + own
    return groups


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's description of a packed micro-batch, plus where each token sits in padded grids: sequences
    of similar length share one, of S rows and L columns, and the grids stand end to end."""

    place_T: Tensor | None = None
    """int64; each packed token's place, counted through all grids; None where none is padded or moved."""
    grids: list[tuple[int, int]] = field(default_factory=list)
    """(S, L) of each grid."""

    shared: SharedPrompts | None = None
    """Where sequences share prompts."""

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedLayout:
        layout = cls.from_cu_seqlens(batch.cu_seqlens, batch.positions_T)
        if batch.shared_prompts:
            layout.shared = SharedPrompts.of(batch)
        return layout

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, positions_T: Tensor) -> PackedLayout:
        ends = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        starts, grids, places = [0] * len(lengths), [], 0
        for group in similar(lengths):
            longest = lengths[group[0]]
            for n in group:
                starts[n] = places
                places += longest
            grids.append((len(group), longest))
        place_T = None
        if places != ends[-1] or starts != ends[:-1]:
            shift = torch.tensor(starts, device=positions_T.device)
            repeats = cu_seqlens[1:] - cu_seqlens[:-1]
            shift = torch.repeat_interleave(shift, repeats, output_size=positions_T.shape[0])
            place_T = shift + positions_T
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            place_T=place_T,
            grids=grids,
        )

    @property
    def places(self) -> int:
        """Of all grids."""
        return sum(rows * columns for rows, columns in self.grids)


@dataclass
class SharedPrompts:
    """How attention sees sequences that share prompts: each whole, with a prompt of its own before it.

    Linear layers and norms compute a shared prompt once. Attention is a small part of the work, and takes
    every sequence as if nothing were shared; what it makes of a prompt's tokens, the same before each
    response, is taken from the first.
    """

    layout: PackedLayout
    """Of the whole sequences, E tokens end to end."""
    source_E: Tensor
    """int64; the packed token that each of them is."""
    place_T: Tensor
    """int64; where each packed token is among them, the first time."""

    @classmethod
    def of(cls, batch: PackedBatch) -> SharedPrompts:
        ends, device = batch.cu_seqlens.tolist(), batch.tokens_T.device
        shared = set(batch.shared_prompts)
        places = np.full(ends[-1], -1, dtype=np.int64)
        sources, wholes, total = [], [], 0
        for n, prompt in enumerate(batch.shared_prompts):
            if n in shared:
                continue
            before = [] if prompt < 0 else [np.arange(ends[prompt], ends[prompt + 1])]
            source = np.concatenate([*before, np.arange(ends[n], ends[n + 1])])
            new = places[source] < 0
            places[source[new]] = total + np.flatnonzero(new)
            sources.append(source)
            total += len(source)
            wholes.append(total)
        source_E = torch.from_numpy(np.concatenate(sources)).to(device)
        cu_seqlens = torch.tensor([0, *wholes], dtype=torch.int32, device=device)
        layout = PackedLayout.from_cu_seqlens(cu_seqlens, batch.positions_T[source_E])
        return cls(layout, source_E, torch.from_numpy(places).to(device))


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that can live in a sequence-parallel region."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Tells Megatron to sum this weight's gradient over the TP ranks, each of which saw only
        # its share of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class PackedSDPA(torch.nn.Module):
    """Causal attention within each packed sequence, by torch.

    On a GPU in half precision by its kernel for packed sequences. Else by scaled_dot_product_attention, with
    the packed tokens laid on right-padded grids of sequences of similar length for this call only. Padding
    comes after every real token, so the causal mask alone keeps it from being seen.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError("context_parallel_size > 1 needs Transformer Engine's layer spec")
        self.scale = softmax_scale

    def forward(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout) -> Tensor:
        """(T, N, D), (T, G, D), (T, G, D) -> (T, N * D)."""
        if q_TND.is_cuda and q_TND.dtype != torch.float32 and (attend := packed_kernel()) is not None:
            out_TND = attend(q_TND, k_TGD, v_TGD, layout, self.scale)
            return out_TND.flatten(1)
        heads, groups = q_TND.shape[1], k_TGD.shape[1]
        qkv = torch.cat((q_TND, k_TGD, v_TGD), dim=1)
        if layout.place_T is not None:
            qkv = place_rows(qkv, layout.place_T, layout.places)
        parts = qkv.split([rows * columns for rows, columns in layout.grids])
        outs = [
            self._attend(part.view(*grid, *part.shape[1:]), heads, groups)
            for part, grid in zip(parts, layout.grids, strict=True)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if layout.place_T is None else out.index_select(0, layout.place_T)

    def _attend(self, grid: Tensor, heads: int, groups: int) -> Tensor:
        """(S, L, N + 2 G, D) -> (S * L, N * D)."""
        q, k, v = grid.transpose(1, 2).split((heads, groups, groups), dim=1)
        if q.is_cuda and q.dtype == torch.float32 and heads != groups:
            # torch's float32 kernel for GPUs takes no groups; without it the L x L scores would exist.
            k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != heads
        )
        return out.transpose(1, 2).reshape(grid.shape[0] * grid.shape[1], -1)


PackedKernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, float | None], Tensor]


@cache
def packed_kernel() -> PackedKernel | None:
    """torch's attention for packed sequences on a GPU (flash attention, half precision), where this torch has
    one that knows a causal mask and groups of heads: (T, N, D), (T, G, D), (T, G, D) -> (T, N, D)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        log.info("torch %s has no attention for packed sequences: they are padded", torch.__version__)
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" in known:
        causal: dict[str, Any] = {"window_size": (-1, 0)}  # all before, none after
    elif "is_causal" in known:
        causal = {"is_causal": True}
    else:
        log.info("torch's attention for packed sequences has another signature: they are padded")
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None) -> Tensor:
        more = dict(causal)
        if scale is not None:
            if "scale" in known:
                more["scale"] = scale
            else:  # it divides by the root of D
                q = q * (scale * q.shape[-1] ** 0.5)
        if k.shape[1] != q.shape[1]:
            if "enable_gqa" in known:
                more["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        ends, longest = layout.cu_seqlens_q, layout.max_seqlen_q
        out = varlen_attn(q, k, v, ends, ends, longest, longest, **more)
        assert isinstance(out, Tensor), "no log-sum-exp was asked for"
        return out

    return attend


def rotate(x_TND: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding with the cosines and sines of each token's own position, `rope` (2, T, 1, D)."""
    cos, sin = rope.to(x_TND.dtype).unbind(0)
    first, second = x_TND.chunk(2, dim=-1)
    return x_TND * cos + torch.cat((-second, first), dim=-1) * sin


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention (weights, sharding, checkpoint names) for packed sequences, with the core
    attention of either layer spec.

    Megatron's own forward applies the rotary embedding sequence by sequence in Python; here the
    angles were gathered once per micro-batch.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_seq_params is None or rotary_pos_emb is None:
            raise ValueError("this attention takes packed sequences with rotary embeddings only")
        q, k, v = (t.squeeze(1) for t in self.get_query_key_value_tensors(hidden_states, None))
        qkv = rotate(q, rotary_pos_emb), rotate(k, rotary_pos_emb), v
        core = partial(self._core, packed_seq_params)
        again = self.checkpoint_core_attention and self.training
        out = tensor_parallel.checkpoint(core, False, *qkv) if again else core(*qkv)
        return self.linear_proj(out.unsqueeze(1))

    def _core(self, layout: PackedLayout, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """(T, N * D)."""
        if layout.shared is None:
            return self._attend(layout, q_TND, k_TGD, v_TGD)
        whole = (x.index_select(0, layout.shared.source_E) for x in (q_TND, k_TGD, v_TGD))
        return self._attend(layout.shared.layout, *whole).index_select(0, layout.shared.place_T)

    def _attend(self, layout: PackedLayout, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """(T, N * D). Transformer Engine's takes rotated queries and keys too, and makes a padding mask of
        the causal one for sequences in a row."""
        if isinstance(self.core_attention, PackedSDPA):
            return self.core_attention(q_TND, k_TGD, v_TGD, layout)
        mask = dict(attention_mask=None, attn_mask_type=self.attn_mask_type)
        out = self.core_attention(q_TND, k_TGD, v_TGD, packed_seq_params=layout, **mask)
        return out.reshape(q_TND.shape[0], -1)


def take_own_swiglu(config: TransformerConfig) -> bool:
    """Whether Megatron would compose a plain SwiGLU of torch's functions; then it is told to take a module
    for the activation, by its switch that is named after Transformer Engine's."""
    composed = config.gated_linear_unit and config.activation_func is F.silu
    composed = composed and not config.bias_activation_fusion and not config.use_te_activation_func
    if not composed or config.activation_func_clamp_value is not None or config.glu_linear_offset:
        return False
    config.use_te_activation_func = True
    return True


def _mlp(own_swiglu: bool) -> Any:
    spec: Any = get_mlp_module_spec_for_backend(backend=LocalSpecProvider())
    if own_swiglu:
        submodules = spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]
        submodules.activation_func = SwiGLU
    return spec


def torch_layer_spec(*, qk_norm: bool, own_swiglu: bool = False) -> TransformerBlockSubmodules | ModuleSpec:
    """A dense pre-norm decoder layer with grouped-query attention and a gated MLP.

    With `qk_norm` each query and key head is normed over D before it is rotated. All TP ranks hold the
    same D weights, and each sees its own heads alone: Megatron sums their gradients over TP by the
    names q_layernorm and k_layernorm, with sequence parallelism or without, where the config's
    qk_layernorm is set. With `own_swiglu`, which the config must agree to (`take_own_swiglu`), the MLP's
    activation keeps its input alone for the backward pass.
    """
    backend = LocalSpecProvider()
    head_norm = RMSNorm if qk_norm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=PackedSDPA,
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(own_swiglu),
            mlp_bda=get_bias_dropout_add,
            # One checkpoint format for this spec and Transformer Engine's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def why_no_transformer_engine() -> str:
    """What Transformer Engine's layers lack here; empty where they can run."""
    from megatron.core.models.gpt import gpt_layer_specs

    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if not gpt_layer_specs.HAVE_TE:
        # Megatron goes on without it, and without a word: say what it did not.
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # a build for another torch fails in many ways
            said = " ".join(str(error).split()) or type(error).__name__
            return f"Transformer Engine is installed and cannot be imported: {said}"
        return "Megatron-Core does not take the Transformer Engine that is installed"
    return ""


def choose_spec(choice: str, params_dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the layer spec is the torch-native one, and why.

    `choice` is "torch", "transformer_engine" (raises ImportError where it cannot run) or "auto"
    (Transformer Engine where it can run and parameters are bfloat16: it has no float32 attention for
    packed sequences).
    """
    if choice == "torch":
        return True, "model.layer_spec asks for it"
    missing = why_no_transformer_engine()
    if choice == "transformer_engine":
        if missing:
            raise ImportError(f"model.layer_spec = 'transformer_engine': {missing}")
        return False, "model.layer_spec asks for it"
    if params_dtype != torch.bfloat16:
        return True, "Transformer Engine has no float32 attention for packed sequences"
    return bool(missing), missing or "Transformer Engine is installed, and parameters are bfloat16"


def block_spec(
    config: TransformerConfig, choice: str
) -> tuple[TransformerBlockSubmodules | ModuleSpec, bool]:
    """The layer spec of `choose_spec`, and whether its attention is `PackedSelfAttention`, which takes each
    token's cosines and sines. It is not where Transformer Engine's fused rotation is asked for
    (apply_rope_fusion), which takes angles by position."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    native, why = choose_spec(choice, config.params_dtype)
    # A GPU that goes without Transformer Engine although nobody asked for that is worth a warning.
    level = logging.WARNING if native and choice == "auto" and torch.cuda.is_available() else logging.INFO
    log.log(level, "layer spec: %s (%s)", "torch" if native else "transformer_engine", why)
    if not native:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if not config.apply_rope_fusion:
            spec.submodules.self_attention.module = PackedSelfAttention
        return spec, not config.apply_rope_fusion
    layer = torch_layer_spec(qk_norm=config.qk_layernorm, own_swiglu=take_own_swiglu(config))
    layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm), True
