"""The distributed optimizer's state in checkpoints: each tensor whole, from the rank that holds most of it.

Megatron cuts the optimizer's buffers into equal parts over the data-parallel ranks, wherever tensors begin
and end. Its own save in this format ("fully_reshardable") gathers all of it on every rank, through the GPU.
Here a rank writes the tensors that it holds the most of. Only the few that a cut goes through travel, in host
memory: the smaller pieces go to the largest. A load asks for the tensors that a rank holds a piece of, and
for no others. The files are those of Megatron's save: either reads what the other wrote, at any split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

KEYS = ("param", "exp_avg", "exp_avg_sq")
"""Float32 tensors of each parameter: its copy in the optimizer, and Adam's two averages."""
_MESSAGE = 1 << 26
"""Numbers that ranks send each other at a time."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a data-parallel rank holds of a parameter: numbers `start` to `stop` of the flattened tensor."""

    rank: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Cut:
    """A parameter and its pieces in the order of the ranks."""

    param: torch.nn.Parameter
    pieces: list[Piece]

    @property
    def owner(self) -> int:
        """The rank that holds most of it, of several the first."""
        return max(self.pieces, key=lambda piece: (piece.size, -piece.rank)).rank

    def of(self, rank: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.rank == rank), None)


def cuts(optimizer: Any) -> Iterator[Cut]:
    """Every parameter of a DistributedOptimizer, in the same order on all of its data-parallel ranks."""
    for buffer in optimizer.buffers:
        ranks = buffer.data_parallel_group.size()
        for param, (start, stop, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            share = bucket.grad_data.numel() // ranks
            pieces = []
            for rank in range((start - bucket.offset) // share, ranks):
                first = bucket.offset + rank * share
                if first >= stop:
                    break
                pieces.append(Piece(rank, max(start, first) - start, min(stop, first + share) - start))
            yield Cut(param, pieces)


def to_save(optimizer: Any, model_state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Sharded tensors of the parameters that this rank owns; collective over its data-parallel ranks."""
    shards, me = _shards(model_state), optimizer.data_parallel_group.rank()
    out = {}
    for number, cut in enumerate(cuts(optimizer)):
        held = _held(optimizer, cut.param) if cut.of(me) else {}
        if len(cut.pieces) > 1:
            held = _collect(optimizer, cut, held)
        if cut.owner == me:
            out[number] = {key: _sharded(shards[cut.param], key, held[key], main=True) for key in KEYS}
    return out


def to_load(optimizer: Any, model_state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Sharded tensors, in host memory and not filled yet, of the parameters that this rank has a piece of."""
    shards, me = _shards(model_state), optimizer.data_parallel_group.rank()
    out = {}
    for number, cut in enumerate(cuts(optimizer)):
        if cut.of(me):
            empty = [torch.empty(cut.param.numel(), dtype=torch.float32, device="cpu") for _ in KEYS]
            out[number] = {
                key: _sharded(shards[cut.param], key, whole, main=cut.owner == me)
                for key, whole in zip(KEYS, empty, strict=True)
            }
    return out


@torch.no_grad()
def take(optimizer: Any, loaded: dict[int, dict[str, Tensor]]) -> None:
    """Put this rank's pieces of loaded tensors, numbered as `to_load` asked for them, into the optimizer."""
    me = optimizer.data_parallel_group.rank()
    for number, cut in enumerate(cuts(optimizer)):
        if piece := cut.of(me):
            tensors = {key: loaded[number][key].flatten()[piece.start : piece.stop] for key in KEYS}
            group, order = optimizer.model_param_group_index_map[cut.param]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            # torch's Adam counts its steps here, and the checkpoint for a group of parameters.
            step = optimizer.optimizer.state[main].get("step")
            optimizer._set_main_param_and_optimizer_states(
                cut.param, tensors if step is None else {**tensors, "step": step}
            )
    if hasattr(optimizer.optimizer, "sub_optimizers"):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _shards(model_state: dict[str, Any]) -> dict[torch.nn.Parameter, Any]:
    """Of each parameter, how the model's own tensor is sharded."""
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return {shard.data: shard for shard in nested_values(tensors)}


def _held(optimizer: Any, param: torch.nn.Parameter) -> dict[str, Tensor]:
    """This rank's piece of a parameter's state, flat and in float32, where the optimizer keeps it."""
    tensors = optimizer._get_main_param_and_optimizer_states(param)
    return {key: tensors[key].detach().flatten().float() for key in KEYS}


def _collect(optimizer: Any, cut: Cut, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole state on the owner, in host memory; nothing elsewhere. All ranks go through the parameters in
    one order, so nobody waits for a rank that waits for it."""
    group = optimizer.data_parallel_group_gloo or optimizer.data_parallel_group
    me, whole = group.rank(), {}
    owner = dist.get_global_rank(group, cut.owner)
    for key in KEYS:
        if me == cut.owner:
            whole[key] = torch.empty(cut.param.numel(), dtype=torch.float32, device="cpu")
        for piece in cut.pieces:
            if me == cut.owner:
                place = whole[key][piece.start : piece.stop]
                if piece.rank == me:
                    place.copy_(held[key])
                else:
                    for part in place.split(_MESSAGE):
                        dist.recv(part, src=dist.get_global_rank(group, piece.rank), group=group)
            elif piece.rank == me:
                for part in held[key].cpu().split(_MESSAGE):
                    dist.send(part.contiguous(), dst=owner, group=group)
    return whole


def _sharded(shard: ShardedTensor | ShardedTensorFactory, key: str, whole: Tensor, *, main: bool) -> Any:
    """As the model's own tensor is sharded; `main`: of the data-parallel ranks this one writes it."""
    fields: dict[str, Any] = dict(
        key=f"optimizer.state.{key}.{shard.key}",
        data=whole.reshape(shard.data.shape),
        # Megatron numbers a tensor's copies by ranks, the data-parallel one last; all zeros write it.
        replica_id=(*shard.replica_id[:-1], 0 if main else 1),
    )
    if isinstance(shard, ShardedTensor):
        fields["dtype"] = torch.float32
    return dataclasses.replace(shard, **fields)
