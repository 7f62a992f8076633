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
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from megatron_dgpo import jsontext, patches, platform
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
from megatron_dgpo.mcore.optimizer_state import take, to_load, to_save
from megatron_dgpo.mcore.policy import Policy, the_optimizer
from megatron_dgpo.progress import progress

log = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step_\d{8,}")
_UNFINISHED = re.compile(r"step_\d{8,}(\.old)?\.partial")
"""Names of folders that the store reads, replaces and removes. It leaves all others alone: a user may have
put a copy of a checkpoint beside it."""
_STATE_FILE = "run_state.json"
CRITIC_FOLDER = "critic"
_REMEDY = "remove this folder to go on from the checkpoint before it"


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
        timeout_seconds: how long writing one may take before this rank ends with its tracebacks.
    """

    def __init__(
        self,
        folder: Path,
        groups: platform.Groups,
        *,
        keep_last: int = 0,
        keep_best: bool = False,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.folder = folder
        self.groups = groups
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.timeout_seconds = timeout_seconds
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
        self.write(policy, state["step"], critic)
        return self.complete(state)

    def write(self, policy: Policy, step: int, critic: Policy | None = None) -> None:
        """The large part of a save, which is no checkpoint before `complete`."""
        final = self._folder(step)
        partial = final.with_suffix(".partial")
        if self.groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        with progress(f"saving {final}"):
            _save(policy, partial, self.timeout_seconds)
            if critic is not None:
                _save(critic, partial / CRITIC_FOLDER, self.timeout_seconds)
            if self.groups.rank == 0:
                flush_to_disk(partial, contents=True)

    def complete(self, state: dict[str, Any]) -> Path:
        """Give what `write` wrote for this step its state and its name, and remove what is not kept."""
        final = self._folder(state["step"])
        partial = final.with_suffix(".partial")
        if self.groups.rank == 0:
            (partial / _STATE_FILE).write_text(json.dumps(state, indent=1))
            flush_to_disk(partial / _STATE_FILE, contents=False)
            flush_to_disk(partial, contents=False)
            replaced = partial.with_suffix(".old.partial")
            if final.exists():  # out of the way at once: half deleted, it would look complete
                final.rename(replaced)
            partial.rename(final)
            flush_to_disk(self.folder, contents=False)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()
        _barrier(self.groups)
        return final

    def _folder(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def rewrite_state(self, state: dict[str, Any]) -> None:
        """Replace what stands beside the weights of the checkpoint at `state["step"]`."""
        if self.groups.rank == 0:
            path = self._folder(state["step"]) / _STATE_FILE
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


def _save(policy: Policy, folder: Path, limit: float) -> None:
    """Weights, optimizer, schedule and generators, and the digests of their files."""
    groups = policy.groups
    if groups.rank == 0:
        folder.mkdir(parents=True)
    _barrier(groups)
    with _time_limit(limit), patches.megatron_calls():
        dist_checkpointing.save(
            _sharded_state(policy, loading=False),
            str(folder),
            _shared_out(groups),
            validate_access_integrity=True,
            content_metadata=content_metadata(policy.model.shape),
        )
    _barrier(groups)
    files = digests(folder, groups)
    if groups.rank == 0:
        write_digests(folder, files)


def _shared_out(groups: platform.Groups) -> Any:
    """How files are written: data-parallel ranks share out what each of them has, such as the weights."""
    strategy = get_default_save_sharded_strategy("torch_dist")
    return FullyParallelSaveStrategyWrapper(strategy, groups.dp) if groups.dp.size() > 1 else strategy


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Megatron waits without a limit for the processes that it forks to write files."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _barrier(groups: platform.Groups) -> None:
    if groups.world_size > 1:
        dist.barrier(group=groups.world)


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    model = policy.ddp.module.sharded_state_dict(metadata=dict(METADATA))
    groups = policy.groups
    optimizer = the_optimizer(policy.optimizer)
    return {
        "model": model,
        "optimizer": {
            **optimizer.state_dict(),
            "param_state": (to_load if loading else to_save)(optimizer, model),
            "param_state_sharding_type": METADATA["distrib_optim_sharding_type"],
        },
        "scheduler": policy.scheduler.state_dict(),
        # Generators differ by rank; with another number of ranks they cannot be restored, and
        # nothing in a run draws from them (sampling and shuffling are seeded by step).
        "rng": ShardedObject("rng", _rng_state(), (groups.world_size,), (groups.rank,)),
    }


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
    with patches.megatron_calls():
        wanted = _sharded_state(policy, loading=True)
        same_ranks = checkpoint.state.get("world_size") == policy.groups.world_size
        if not same_ranks:
            del wanted["rng"]
            log.warning("another number of ranks than when saving: random generators start afresh")
        wanted["model"] = _tensors(wanted["model"])
        loaded = _load(wanted, checkpoint.path)
        _put_weights(policy.model, wanted["model"], loaded["model"], checkpoint.path)
        state = loaded["optimizer"].pop("param_state")
        optimizer = the_optimizer(policy.optimizer)
        optimizer.load_state_dict(loaded["optimizer"])
        take(optimizer, state)
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
    with progress(f"loading {folder}"), patches.megatron_calls(), torch.no_grad():
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


def _separate_steps(policy: Policy) -> None:
    """Megatron hands one step tensor to all parameters; torch's Adam would count it up once for
    each of them. Transformer Engine's kernels take an integer, and torch's Adam saved a float."""
    optimizer = the_optimizer(policy.optimizer).optimizer
    for group in optimizer.param_groups:
        if isinstance(group.get("step"), float):
            group["step"] = int(group["step"])
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
