"""Between Hugging Face tensors and tensor-parallel shards: pure tensor arithmetic.

`to_full`/`from_full` change layout between the Hugging Face tensors and Megatron's unsplit
parameter; `shard`/`join` split that over TP ranks and put it together again. All are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.weights.names import Entry


def full_shape(entry: Entry, shape: ModelShape, padded_vocab: int) -> tuple[int, ...]:
    """Of the unsplit Megatron parameter. Raises KeyError for one that is not known."""
    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    qkv = heads + 2 * shape.num_query_groups * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (padded_vocab, hidden),
        "output_layer.weight": (padded_vocab, hidden),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (hidden, heads),
        "linear_fc1.weight": (2 * shape.ffn_hidden_size, hidden),
        "linear_fc2.weight": (hidden, shape.ffn_hidden_size),
        "q_layernorm.weight": (shape.head_dim,),
        "k_layernorm.weight": (shape.head_dim,),
        "input_layernorm.weight": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
        "final_layernorm.weight": (hidden,),
    }
    return sizes[".".join(entry.megatron.rsplit(".", 2)[-2:])]


def hf_shapes(entry: Entry, shape: ModelShape) -> list[tuple[int, ...]]:
    """Of the Hugging Face tensors, in the entry's order."""
    padded = shape.padded_vocab_size(1)
    full = torch.empty(full_shape(entry, shape, padded), device="meta")
    return [tuple(t.shape) for t in from_full(entry, full, shape)]


def to_full(entry: Entry, tensors: Sequence[Tensor], shape: ModelShape, padded_vocab: int) -> Tensor:
    """Hugging Face tensors, in the entry's order -> the unsplit Megatron parameter."""
    if entry.layout == "qkv":
        heads_per_group = shape.num_heads // shape.num_query_groups
        parts = [
            t.reshape(shape.num_query_groups, n * shape.head_dim, *t.shape[1:])
            for t, n in zip(tensors, (heads_per_group, 1, 1), strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)
    if entry.layout == "gate_up":
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if entry.layout == "vocab":
        return torch.cat((tensor, tensor.new_zeros(padded_vocab - tensor.shape[0], *tensor.shape[1:])))
    return tensor


def from_full(entry: Entry, full: Tensor, shape: ModelShape) -> list[Tensor]:
    """The unsplit Megatron parameter -> Hugging Face tensors, in the entry's order."""
    if entry.layout == "qkv":
        heads_per_group = shape.num_heads // shape.num_query_groups
        grouped = full.view(shape.num_query_groups, -1, *full.shape[1:])
        parts = grouped.split([heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim], dim=1)
        return [p.flatten(0, 1) for p in parts]
    if entry.layout == "gate_up":
        return list(full.chunk(2))
    return [full[: shape.vocab_size]] if entry.layout == "vocab" else [full]


def shard(entry: Entry, full: Tensor, rank: int, size: int) -> Tensor:
    """The part of the unsplit parameter that TP rank `rank` of `size` holds."""
    if entry.tp_dim is None or size == 1:
        return full
    if entry.layout == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=entry.tp_dim)[rank]


def join(entry: Entry, shards: Sequence[Tensor]) -> Tensor:
    """The shards of all TP ranks, in rank order -> the unsplit parameter."""
    if entry.tp_dim is None or len(shards) == 1:
        return shards[0]
    if entry.layout == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return torch.cat(list(shards), dim=entry.tp_dim)


def lay(entry: Entry, shards: Sequence[Tensor], shape: ModelShape, out: Sequence[Tensor]) -> None:
    """Write the shards of all TP ranks, in rank order, into the Hugging Face tensors they make.

    What `join` and `from_full` give, without anything of a tensor's size in between. `out`: one tensor
    of the right shape for each of `entry.hf`; only its elements are changed.
    """
    if entry.tp_dim is None or len(shards) == 1:
        for target, tensor in zip(out, from_full(entry, shards[0], shape), strict=True):
            target.copy_(tensor)
        return
    groups = max(1, shape.num_query_groups // len(shards))
    local = dataclasses.replace(
        shape,
        num_query_groups=groups,
        num_heads=groups * (shape.num_heads // shape.num_query_groups),
        vocab_size=shards[0].shape[0],
    )
    for rank, part in enumerate(shards):
        for target, tensor in zip(out, from_full(entry, part, local), strict=True):
            start = min(rank * tensor.shape[entry.tp_dim], target.shape[entry.tp_dim])
            # The last rows of a padded vocabulary have no place.
            size = min(tensor.shape[entry.tp_dim], target.shape[entry.tp_dim] - start)
            target.narrow(entry.tp_dim, start, size).copy_(tensor.narrow(entry.tp_dim, 0, size))
