"""Checkpoints: complete or absent, resharded on load, pruned only after a good save.

A checkpoint is a folder `step_00000020` that appears under its final name only once all of it is on
disk; what a killed run leaves behind has another name and is removed by the next one.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_dgpo import jsontext, platform
from megatron_dgpo.mcore.files import (
    METADATA,
    check_files,
    check_shape,
    content_metadata,
    digests,
    flush_to_disk,
    write_digests,
)
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.mcore.policy import Policy, inner_optimizers
from megatron_dgpo.progress import progress

log = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step_\d{8,}")
_UNFINISHED = re.compile(r"step_\d{8,}(\.old)?\.partial")
"""Names of folders that the store reads, replaces and removes. It leaves all others alone: a user may have
put a copy of a checkpoint beside it."""
_STATE_FILE = "run_state.json"
CRITIC_FOLDER = "critic"
_REMEDY = "remove this folder to go on from the checkpoint before it"
_SAVE_LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Checkpoint:
    step: int
    path: Path
    state: dict[str, Any]
    """What the run wrote beside the weights: step, evaluations, score, number of ranks."""


class CheckpointStore:
    """The checkpoints of one run folder.

    Args:
        folder: `<run>/checkpoints`.
        keep_last: how many of the newest to keep (0 keeps all).
        keep_best: also keep the one whose state has the highest "score".
    """

    def __init__(
        self, folder: Path, groups: platform.Groups, *, keep_last: int = 0, keep_best: bool = False
    ) -> None:
        self.folder = folder
        self.groups = groups
        self.keep_last = keep_last
        self.keep_best = keep_best
        if groups.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.iterdir():
                if _UNFINISHED.fullmatch(leftover.name):
                    log.warning("removing %s: an unfinished checkpoint of an earlier run", leftover.name)
                    shutil.rmtree(leftover)
        _barrier(groups)

    def list(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first. Raises ValueError naming a state file that is no JSON."""
        found = []
        for path in sorted(self.folder.glob("step_*")):
            if _COMPLETE.fullmatch(path.name) and (path / _STATE_FILE).is_file():
                try:
                    state = jsontext.loads((path / _STATE_FILE).read_bytes())
                except ValueError as error:
                    raise ValueError(f"{path / _STATE_FILE} is damaged ({error}); {_REMEDY}") from error
                found.append(Checkpoint(int(state["step"]), path, state))
        return found

    def latest(self) -> Checkpoint | None:
        found = self.list()
        return found[-1] if found else None

    def best(self) -> Checkpoint | None:
        scored = [c for c in self.list() if c.state.get("score") is not None]
        return max(scored, key=lambda c: (c.state["score"], c.step)) if scored else None

    def save(self, policy: Policy, state: dict[str, Any], critic: Policy | None = None) -> Path:
        """Write everything a resumed run needs; `state` (JSON) must hold "step". A critic has a folder of its
        own in the checkpoint's."""
        final = self.folder / f"step_{state['step']:08d}"
        partial = final.with_suffix(".partial")
        if self.groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        with progress(f"saving {final}"):
            self._write(policy, partial, state, critic)
        if self.groups.rank == 0:
            replaced = partial.with_suffix(".old.partial")
            if final.exists():  # out of the way at once: half deleted, it would look complete
                final.rename(replaced)
            partial.rename(final)
            flush_to_disk(self.folder, contents=False)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()
        _barrier(self.groups)
        return final

    def _write(self, policy: Policy, folder: Path, state: dict[str, Any], critic: Policy | None) -> None:
        _save(policy, folder)
        if critic is not None:
            _save(critic, folder / CRITIC_FOLDER)
        if self.groups.rank == 0:
            (folder / _STATE_FILE).write_text(json.dumps(state, indent=1))
            flush_to_disk(folder, contents=True)

    def rewrite_state(self, state: dict[str, Any]) -> None:
        """Replace what stands beside the weights of the checkpoint at `state["step"]`."""
        if self.groups.rank == 0:
            path = self.folder / f"step_{state['step']:08d}" / _STATE_FILE
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(state, indent=1))
            os.replace(partial, path)
        _barrier(self.groups)

    def _prune(self) -> None:
        if self.keep_last <= 0:
            return
        found = self.list()
        keep = {c.path for c in found[-self.keep_last :]}
        if self.keep_best and (best := self.best()):
            keep.add(best.path)
        for old in found:
            if old.path not in keep:
                # Renamed first: a half-deleted checkpoint must not look like a complete one.
                doomed = old.path.with_suffix(".partial")
                old.path.rename(doomed)
                shutil.rmtree(doomed)


def _save(policy: Policy, folder: Path) -> None:
    """Weights, optimizer, schedule and generators, and the digests of their files."""
    groups = policy.groups
    if groups.rank == 0:
        folder.mkdir(parents=True)
    _barrier(groups)
    with _time_limit(), platform.megatron_calls():
        dist_checkpointing.save(
            _sharded_state(policy, loading=False),
            str(folder),
            validate_access_integrity=True,
            content_metadata=content_metadata(policy.model.shape),
        )
    _barrier(groups)
    files = digests(folder, groups)
    if groups.rank == 0:
        write_digests(folder, files)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Megatron waits without a limit for the processes that it forks to write files."""
    faulthandler.dump_traceback_later(_SAVE_LIMIT_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _barrier(groups: platform.Groups) -> None:
    if groups.world_size > 1:
        dist.barrier(group=groups.world)


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    metadata = dict(METADATA)  # Megatron writes a process group into it
    model = policy.ddp.module.sharded_state_dict(metadata=metadata)
    groups = policy.groups
    with _padded_buckets(policy):
        optimizer = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": policy.scheduler.state_dict(),
        # Generators differ by rank; with another number of ranks they cannot be restored, and
        # nothing in a run draws from them (sampling and shuffling are seeded by step).
        "rng": ShardedObject("rng", _rng_state(), (groups.world_size,), (groups.rank,)),
    }


@contextmanager
def _padded_buckets(policy: Policy) -> Iterator[None]:
    """Megatron lays the optimizer's state out without the padding at the ends of buckets and then takes each
    parameter from where it is with that padding. A tied embedding on several pipeline stages has a bucket
    of its own, the second, and would be saved from beside its place. Here all of a bucket counts as used."""
    buffers = [b for inner in inner_optimizers(policy.optimizer) for b in inner.buffers]
    parts = [part for buffer in buffers for part in (buffer, *buffer.buckets)]
    before = [part.numel_unpadded for part in parts]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in zip(parts, before, strict=True):
            part.numel_unpadded = numel


def _rng_state() -> dict[str, Any]:
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {"torch": torch.get_rng_state(), "tracker": tracker}


def _restore_rng(state: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def restore(policy: Policy, checkpoint: Checkpoint, critic: Policy | None = None) -> None:
    """Load weights, optimizer, schedule and generators; the split may differ from the saved one.

    Raises ValueError on all ranks, before anything is loaded, naming a file that is not what was saved, or a
    field of the model that has changed since then.
    """
    parts = [(policy, checkpoint.path)]
    if critic is not None:
        parts.append((critic, checkpoint.path / CRITIC_FOLDER))
    for part, folder in parts:
        try:
            check_files(folder, part.groups)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{error}; {_REMEDY}") from error
        check_shape(folder, part.model.shape)
    with progress(f"loading {checkpoint.path}"):
        for part, folder in parts:
            _restore(part, dataclasses.replace(checkpoint, path=folder))


def _restore(policy: Policy, checkpoint: Checkpoint) -> None:
    with platform.megatron_calls():
        _accept_missing_step(policy)
        wanted = _sharded_state(policy, loading=True)
        same_ranks = checkpoint.state.get("world_size") == policy.groups.world_size
        if not same_ranks:
            del wanted["rng"]
            log.warning("another number of ranks than when saving: random generators start afresh")
        wanted["model"] = _tensors(wanted["model"])
        loaded = _load(wanted, checkpoint.path)
        _put_weights(policy.model, wanted["model"], loaded["model"], checkpoint.path)
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["scheduler"])
    _separate_steps(policy)
    if same_ranks:
        _restore_rng(loaded["rng"])


def _load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Megatron uses names that torch has deprecated
        return dist_checkpointing.load(wanted, str(folder))


def load_weights(model: PolicyModel, groups: platform.Groups, folder: Path) -> None:
    """Load a checkpoint's weights, and nothing else of it, into the model at whatever split it has.

    Raises ValueError on all ranks, before anything is loaded, naming a file that is not what was saved, or a
    field in which the model is not the one that was saved.
    """
    check_files(folder, groups)
    check_shape(folder, model.shape)
    with progress(f"loading {folder}"), platform.megatron_calls(), torch.no_grad():
        wanted = _tensors(model.sharded_state_dict(metadata=dict(METADATA)))
        _put_weights(model, wanted, _load(wanted, folder), folder)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state without the extra states of its layers: they are empty without FP8, imports
    have none, and which layers have one depends on the layer spec."""
    return {k: v for k, v in state.items() if isinstance(v, (ShardedTensor, ShardedTensorFactory))}


def _put_weights(model: PolicyModel, wanted: dict[str, Any], loaded: dict[str, Any], folder: Path) -> None:
    tensors = {name: tensor for name, tensor in loaded.items() if name in wanted}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith("._extra_state")]
    if missing or unexpected:
        raise RuntimeError(f"{folder}: not loaded: {missing}; not expected: {unexpected}")


def _accept_missing_step(policy: Policy) -> None:
    """torch's Adam counts steps in a tensor of its state, which the checkpoint format holds per
    parameter group instead; Megatron's loader looks for it among the sharded tensors."""
    for optimizer in inner_optimizers(policy.optimizer):
        original = optimizer._set_main_param_and_optimizer_states

        def with_step(
            model_param: Any, tensors: dict, optimizer: Any = optimizer, original: Any = original
        ) -> None:
            group, order = optimizer.model_param_group_index_map[model_param]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            step = optimizer.optimizer.state[main].get("step")
            original(model_param, tensors if step is None else {**tensors, "step": step})

        optimizer._set_main_param_and_optimizer_states = with_step


def _separate_steps(policy: Policy) -> None:
    """Megatron hands one step tensor to all parameters; torch's Adam would count it up once for
    each of them. Transformer Engine's kernels take an integer, and torch's Adam saved a float."""
    for optimizer in inner_optimizers(policy.optimizer):
        for group in optimizer.optimizer.param_groups:
            if isinstance(group.get("step"), float):
                group["step"] = int(group["step"])
        for state in optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
