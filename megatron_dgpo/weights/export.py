"""The policy's weights under their Hugging Face names, as a stream of bounded pieces.

Parameters travel in buckets, never the whole model at once. `export_stream` hands every tensor to every
rank of a replica: one all-gather over TP and one broadcast over the pipeline a bucket. `stage_buckets`
leaves them where they are: each pipeline stage gets its own, flat, ready to be sent to servers.
Both are collective: every rank of their groups must run them to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.mcore.model import ModelShape, PolicyModel
from megatron_dgpo.types import WeightBucket
from megatron_dgpo.weights.names import Entry, NameTable, global_name
from megatron_dgpo.weights.shards import from_full, hf_shapes, join, lay

DEFAULT_BUCKET_BYTES = 256 << 20
Value = Callable[[Tensor], Tensor]
"""Takes a parameter to the tensor of its shape that is exported: itself, or its gradient, say."""


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


def local_entries(
    model: PolicyModel, table: NameTable, *, but: Sequence[str] = ()
) -> Iterator[tuple[Entry, Tensor]]:
    """This stage's parameters, `but` some, with their table entries; KeyError on a parameter without one."""
    layers = getattr(model.decoder, "layers", [])
    first = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in model.named_parameters():
        if name not in but:
            yield table.from_megatron(global_name(name, first)), parameter


def export_stream(
    model: PolicyModel,
    groups: platform.Groups,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    value: Value = Tensor.detach,
    to_keep: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (Hugging Face name, full tensor) of the policy, on every rank, in one order.

    The tensors have the dtype of `value`'s, are on the policy's device and the consumer's to keep. Without
    `to_keep` they may be views of the policy's memory, where a rank holds the whole model.

    Raises KeyError for a parameter without a name, or a name that no stage holds.
    """
    plan = _Plan(model, groups, value)
    if not to_keep and groups.tp.size() * groups.pp.size() == 1:
        for item in plan.items:
            entry = plan.table.from_megatron(item.name)
            yield from zip(entry.hf, from_full(entry, plan.mine[item.name], plan.shape), strict=True)
        return
    for items in _runs(plan.items, bucket_bytes, groups.tp.size()):
        mine = items[0].stage == groups.pp.rank()
        gathered = _gather(items, plan.mine, groups) if mine else _empty(items, groups)
        if groups.pp.size() > 1:
            dist.broadcast(gathered, dist.get_global_rank(groups.pp, items[0].stage), group=groups.pp)
        for item, shards in zip(items, _shards(items, gathered), strict=True):
            entry = plan.table.from_megatron(item.name)
            yield from zip(entry.hf, from_full(entry, join(entry, shards), plan.shape), strict=True)


def shared_tensors(model: PolicyModel, groups: platform.Groups) -> dict[str, Tensor]:
    """Those of the policy's tensors that are, whole and under their Hugging Face names, views of its own
    memory, and so change with it. All but queries, keys and values, on a rank that holds the whole model;
    none on others."""
    if groups.tp.size() * groups.pp.size() > 1:
        return {}
    table = NameTable(model.shape.family, model.shape.num_layers, tied=model.shape.tied)
    found: dict[str, Tensor] = {}
    for entry, parameter in local_entries(model, table):
        memory = parameter.untyped_storage().data_ptr()
        for name, tensor in zip(entry.hf, from_full(entry, parameter.detach(), model.shape), strict=True):
            if tensor.is_contiguous() and tensor.untyped_storage().data_ptr() == memory:
                found[name] = tensor
    return found


def stage_buckets(
    model: PolicyModel,
    groups: platform.Groups,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    value: Value = Tensor.detach,
    everywhere: bool = False,
) -> Iterator[WeightBucket]:
    """The tensors that this pipeline stage owns, in buckets.

    They come out on the stage's first TP rank; on the others the iterator gives nothing, and sends their
    shards there. With `everywhere` they come out on all of them. The call is collective over the pipeline,
    running the iterator over the stage. The next bucket is gathered while the consumer sends the present
    one. At most two exist: the gathered shards and what is being sent, or, without shards to gather, two
    that are sent in turn.
    """
    plan = _Plan(model, groups, value)
    mine = [i for i in plan.items if i.stage == groups.pp.rank()]
    runs = list(_runs(mine, bucket_bytes, groups.tp.size()))
    if groups.tp.size() == 1:
        return _local_buckets(plan, runs, groups)
    return _gathered_buckets(plan, runs, groups, _ToAll if everywhere else _ToFirst)


def _local_buckets(plan: _Plan, runs: list[list[_Item]], groups: platform.Groups) -> Iterator[WeightBucket]:
    buffers = _Buffers(2)
    for items in runs:
        bucket = buffers.next(items, groups)
        _fill(bucket, items, [[plan.mine[i.name]] for i in items], plan)
        yield bucket
    buffers.settle()


def _gathered_buckets(
    plan: _Plan, runs: list[list[_Item]], groups: platform.Groups, gather: type[_ToFirst] | type[_ToAll]
) -> Iterator[WeightBucket]:
    buffers = _Buffers(1)
    coming = gather(runs[0], plan.mine, groups) if runs else None
    for k, items in enumerate(runs):
        assert coming is not None, "there is one for every run"
        gathered = coming.wait()
        bucket = None
        if gathered is not None:
            bucket = buffers.next(items, groups)
            _fill(bucket, items, _shards(items, gathered), plan)
        gathered = coming = None  # the buffer goes before the next one comes
        coming = gather(runs[k + 1], plan.mine, groups) if k + 1 < len(runs) else None
        if bucket is not None:
            yield bucket
    buffers.settle()


class _Plan:
    """Who owns what: every parameter once, in the table's order, the same on every rank."""

    def __init__(self, model: PolicyModel, groups: platform.Groups, value: Value) -> None:
        self.shape: ModelShape = model.shape
        self.table = NameTable(model.shape.family, model.shape.num_layers, tied=model.shape.tied)
        self.mine = {entry.megatron: value(p) for entry, p in local_entries(model, self.table)}
        described = [_Item(n, tuple(t.shape), t.dtype, groups.pp.rank()) for n, t in self.mine.items()]
        owned: dict[str, _Item] = {}
        for stage_items in platform.gather_objects(described, groups.pp):
            for item in stage_items:
                owned.setdefault(item.name, item)  # a tied embedding has two owners; the first serves
        if left_over := [e.megatron for e in self.table.entries if e.megatron not in owned]:
            raise KeyError(f"no pipeline stage holds {left_over[0]!r}")
        self.items = [owned[e.megatron] for e in self.table.entries]


def _runs(items: list[_Item], limit: int, tp: int) -> Iterator[list[_Item]]:
    """Consecutive items of one stage and dtype whose gathered size stays under the limit (or one item)."""
    run: list[_Item] = []
    size = 0
    for item in items:
        item_bytes = item.numel * item.dtype.itemsize * tp
        alike = run and (item.stage, item.dtype) == (run[0].stage, run[0].dtype)
        if run and (size + item_bytes > limit or not alike):
            yield run
            run, size = [], 0
        run.append(item)
        size += item_bytes
    if run:
        yield run


def _empty(items: list[_Item], groups: platform.Groups) -> Tensor:
    """(TP ranks, numel of all items) for their shards."""
    numel = sum(i.numel for i in items)
    return torch.empty(groups.tp.size(), numel, dtype=items[0].dtype, device=groups.device)


def _gather(items: list[_Item], mine: dict[str, Tensor], groups: platform.Groups) -> Tensor:
    """The shards of some items from all TP ranks of a stage, (TP ranks, numel), on each of them."""
    gathered = _empty(items, groups)
    own = gathered[groups.tp.rank()]
    _lay(items, mine, own)
    if groups.tp.size() > 1:
        dist.all_gather_into_tensor(gathered.view(-1), own, group=groups.tp)
    return gathered


def _lay(items: list[_Item], mine: dict[str, Tensor], flat: Tensor) -> None:
    for part, item in zip(flat.split([i.numel for i in items]), items, strict=True):
        part.copy_(mine[item.name].reshape(-1))


class _ToFirst:
    """The shards of some items on their way from all TP ranks of a stage to the first."""

    def __init__(self, items: list[_Item], mine: dict[str, Tensor], groups: platform.Groups) -> None:
        tp = groups.tp
        self._gathered: Tensor | None = None
        if tp.rank() == 0:
            self._gathered = _empty(items, groups)
            own, *others = self._gathered.unbind(0)
            calls = [
                dist.P2POp(dist.irecv, row, group=tp, group_peer=r) for r, row in enumerate(others, start=1)
            ]
        else:
            own = torch.empty(sum(i.numel for i in items), dtype=items[0].dtype, device=groups.device)
            calls = [dist.P2POp(dist.isend, own, group=tp, group_peer=0)]
        _lay(items, mine, own)
        self._own = own  # kept until it is sent
        self._works = dist.batch_isend_irecv(calls)

    def wait(self) -> Tensor | None:
        """(TP ranks, numel), on the first; None on the others."""
        for work in self._works:
            work.wait()
        return self._gathered


class _ToAll:
    """The same, on their way to every one of them."""

    def __init__(self, items: list[_Item], mine: dict[str, Tensor], groups: platform.Groups) -> None:
        self._gathered = _empty(items, groups)
        own = self._gathered[groups.tp.rank()]
        _lay(items, mine, own)
        self._work = dist.all_gather_into_tensor(self._gathered.view(-1), own, group=groups.tp, async_op=True)

    def wait(self) -> Tensor:
        """(TP ranks, numel)."""
        self._work.wait()
        return self._gathered


def _shards(items: list[_Item], gathered: Tensor) -> list[list[Tensor]]:
    """For each item its shard of every TP rank, out of (TP ranks, numel)."""
    by_rank = [row.split([i.numel for i in items]) for row in gathered.unbind(0)]
    return [[row[k].view(item.shape) for row in by_rank] for k, item in enumerate(items)]


class _Buffers:
    """Flat buffers that are sent in turn; one is written again once it has been sent."""

    def __init__(self, count: int) -> None:
        self._last: list[WeightBucket | None] = [None] * count
        self._turn = 0

    def next(self, items: list[_Item], groups: platform.Groups) -> WeightBucket:
        slot = self._turn % len(self._last)
        self._turn += 1
        old = self._last[slot]
        if old is not None and old.in_use is not None:
            old.in_use()
        numel = sum(i.numel for i in items) * groups.tp.size()
        flat = None if old is None or old.flat.dtype != items[0].dtype else old.flat
        self._last[slot] = old = None
        if flat is None or flat.untyped_storage().nbytes() < numel * flat.element_size():
            flat = torch.empty(numel, dtype=items[0].dtype, device=groups.device)
        bucket = WeightBucket([], [], items[0].dtype, flat)
        self._last[slot] = bucket
        return bucket

    def settle(self) -> None:
        for bucket in self._last:
            if bucket is not None and bucket.in_use is not None:
                bucket.in_use()


def _fill(bucket: WeightBucket, items: list[_Item], shards: list[list[Tensor]], plan: _Plan) -> None:
    """Lay the tensors that the items' shards make end to end into the bucket's buffer, which becomes a
    view of what they take."""
    whole = torch.empty(0, dtype=bucket.dtype, device=bucket.flat.device).set_(bucket.flat.untyped_storage())
    end = 0
    for item, parts in zip(items, shards, strict=True):
        entry = plan.table.from_megatron(item.name)
        out = []
        for name, shape in zip(entry.hf, hf_shapes(entry, plan.shape), strict=True):
            start, end = end, end + torch.Size(shape).numel()
            out.append(whole[start:end].view(shape))
            bucket.names.append(name)
            bucket.shapes.append(shape)
        lay(entry, parts, plan.shape, out)
    bucket.flat = whole[:end]
