"""The stream of Hugging Face tensors that every consumer of weights reads.

Collective: every rank of a replica must run the stream to its end. Parameters travel in buckets of
bounded size: one all-gather over TP and one broadcast over the pipeline a bucket, never the whole
model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.weights.names import Entry, NameTable, global_name
from megatron_dgpo.weights.shards import from_full, join

DEFAULT_BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class _Item:
    """One parameter as a pipeline stage describes it to the others."""

    name: str
    shape: tuple[int, ...]
    """Of the TP shard."""
    dtype: torch.dtype
    stage: int

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


def local_entries(model: PolicyModel, table: NameTable) -> Iterator[tuple[Entry, Tensor]]:
    """This stage's parameters with their table entries; KeyError on a parameter without one."""
    layers = getattr(model.decoder, "layers", [])
    first = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in model.named_parameters():
        yield table.from_megatron(global_name(name, first)), parameter


def export_stream(
    model: PolicyModel,
    groups: platform.Groups,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    value: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (Hugging Face name, full tensor) of the policy, on every rank, in one order.

    `value` takes a parameter to the tensor of its shape that is exported: itself, or its gradient, say.
    The tensors are in that one's dtype on the policy's device and are the consumer's to keep.
    """
    table = NameTable(model.shape.family, model.shape.num_layers, tied=model.shape.tied)
    mine = {entry.megatron: value(p) for entry, p in local_entries(model, table)}
    described = [_Item(n, tuple(t.shape), t.dtype, groups.pp.rank()) for n, t in mine.items()]
    owned: dict[str, _Item] = {}
    for stage_items in platform.gather_objects(described, groups.pp):
        for item in stage_items:
            owned.setdefault(item.name, item)  # a tied embedding has two owners; the first serves
    if left_over := [e.megatron for e in table.entries if e.megatron not in owned]:
        raise KeyError(f"no pipeline stage holds {left_over[0]!r}")
    for bucket in _buckets([owned[e.megatron] for e in table.entries], bucket_bytes, groups.tp.size()):
        shards = _deliver(bucket, mine, groups)
        for item, parts in zip(bucket, shards, strict=True):
            entry = table.from_megatron(item.name)
            yield from zip(entry.hf, from_full(entry, join(entry, parts), model.shape), strict=True)


def _buckets(items: list[_Item], limit: int, tp: int) -> Iterator[list[_Item]]:
    """Runs of consecutive items of one stage and dtype whose gathered size stays under the limit (or one
    item)."""
    bucket: list[_Item] = []
    size = 0
    for item in items:
        item_bytes = item.numel * 4 * tp
        alike = bucket and (item.stage, item.dtype) == (bucket[0].stage, bucket[0].dtype)
        if bucket and (size + item_bytes > limit or not alike):
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += item_bytes
    if bucket:
        yield bucket


def _deliver(bucket: list[_Item], mine: dict[str, Tensor], groups: platform.Groups) -> list[list[Tensor]]:
    """The TP shards of each item, on every rank: gathered where they live, then sent along the pipeline."""
    numel = sum(i.numel for i in bucket)
    tp = groups.tp.size()
    gathered = torch.empty(tp, numel, dtype=bucket[0].dtype, device=groups.device)
    if bucket[0].stage == groups.pp.rank():
        flat = torch.cat([mine[i.name].reshape(-1) for i in bucket])
        if tp == 1:
            gathered[0].copy_(flat)
        else:
            dist.all_gather(list(gathered.unbind(0)), flat, group=groups.tp)
    if groups.pp.size() > 1:
        dist.broadcast(gathered, dist.get_global_rank(groups.pp, bucket[0].stage), group=groups.pp)
    per_rank = [row.split([i.numel for i in bucket]) for row in gathered.unbind(0)]
    return [[per_rank[r][k].view(i.shape) for r in range(tp)] for k, i in enumerate(bucket)]
