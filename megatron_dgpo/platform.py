"""Device, backend and process groups. What is patched is in `patches`."""

from __future__ import annotations

import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgpo import patches, torchrun

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def use_device(kind: str, ranks: int, key: str = "parallel.device") -> None:
    """Settle what this process, and those that it starts, compute on: `kind` is "auto", "cpu" or "cuda", for
    `ranks` processes on this machine.

    "cpu" hides the GPUs from torch by CUDA_VISIBLE_DEVICES, so that nothing can overlook the setting.

    Raises:
        ValueError: naming `key`, where not every rank can have a device of that kind for itself.
        RuntimeError: GPUs are to be hidden, and this process has used one already.
    """
    # Images of containers allow TF32 by this variable, with which float32 logits are off by 1e-3.
    os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap counts on one queue
    if kind == "cpu":
        if torch.cuda.is_initialized():
            raise RuntimeError(f"{key}: 'cpu' comes too late, since this process has used a GPU already")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not has_gpu():
        if kind == "cuda":
            raise ValueError(
                f"{key}: 'cuda' needs a GPU, and torch {torch.__version__} finds none on this machine"
            )
    elif ranks > (there := number_of_gpus()):
        gpus = "1 GPU" if there == 1 else f"{there} GPUs"
        raise ValueError(
            f"{key}: {kind!r} gives each rank a GPU of its own, and this machine has {ranks} ranks and "
            f"{gpus}; start at most {there} here, or use 'cpu'"
        )


def has_gpu() -> bool:
    """Whether this process computes on a GPU, once `use_device` has settled it."""
    return torch.cuda.is_available()


def number_of_gpus() -> int:
    """Those that this process may use (CUDA_VISIBLE_DEVICES)."""
    return torch.cuda.device_count()


def device() -> torch.device:
    """The device of this rank: its local GPU, or the CPU."""
    if not has_gpu():
        return _CPU
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


# --- process groups -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """The process groups of a run. A *replica* is one data-parallel copy of the model:
    TP x PP x CP ranks."""

    rank: int
    world_size: int
    device: torch.device
    world: dist.ProcessGroup
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    replica: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def speaks_for_tokens(self) -> bool:
        """One rank a replica: on the last stage, where the loss is, first of its TP group."""
        return self.is_last_stage and self.tp.rank() == 0 and self.cp.rank() == 0


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The value of every rank of the group, in rank order, on every rank."""
    out: list[Any] = [None] * group.size()
    if group.size() == 1:
        return [value]
    dist.all_gather_object(out, value, group=group)
    return out


def shared_store(name: str) -> dist.Store:
    """A key-value store that all ranks share, for threads that may take no part in collectives: it has a
    connection of its own, so nobody's waiting holds it up. Ranks that give the same name meet."""
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]


def _init_under_launcher(backend: str, timeout: timedelta) -> None:
    """The default process group of ranks that torchrun started, or another launcher with its environment."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(torchrun.meet(store, rank, world_size, timeout.total_seconds()), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def any_rank(flag: bool, groups: Groups) -> bool:
    """True on every rank when it is true on one."""
    if groups.world_size == 1:
        return flag
    t = torch.tensor([int(flag)], device=groups.device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX, group=groups.world)
    return bool(t.item())


def _groups(device_: torch.device) -> Groups:
    from megatron.core import parallel_state as ps

    world = dist.group.WORLD
    assert world is not None, "start() initialises it first"
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device_,
        world=world,
        tp=ps.get_tensor_model_parallel_group(),
        pp=ps.get_pipeline_model_parallel_group(),
        cp=ps.get_context_parallel_group(),
        dp=ps.get_data_parallel_group(),
        replica=ps.get_model_parallel_group(),
    )


def start(parallel: Any, seed: int) -> Groups:
    """Initialise torch.distributed and Megatron's parallel state.

    `parallel` has `device`, `tensor_model_parallel_size`, `pipeline_model_parallel_size`,
    `context_parallel_size` and `timeout_seconds`; rank and world size come from torchrun's
    environment (one process without it). Raises what `use_device` and `patches.check_megatron` raise.
    """
    torchrun.end_with_agent()
    use_device(parallel.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    import megatron.core

    patches.check_megatron(megatron.core.__version__)
    if not has_gpu():
        patches.run_megatron_on_cpu()
    patches.write_checkpoints()
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel

    this = device()
    if has_gpu():
        torch.cuda.set_device(this)
        # SGLang sets it in its servers; processes that differ in it cannot form a group.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    elif "OMP_NUM_THREADS" not in os.environ:
        # Several ranks share a machine's cores; more than one thread each makes them fight.
        torch.set_num_threads(1)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    backend = "nccl" if has_gpu() else "gloo"
    if dist.is_initialized():
        log.info("using the process group that is there")
    elif "RANK" in os.environ:
        _init_under_launcher(backend, timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    with patches.megatron_calls():
        ps.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=max(1, math.ceil(parallel.timeout_seconds / 60)),
            create_gloo_process_groups=has_gpu(),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return _groups(this)


def stop() -> None:
    """Undo `start`; safe to call when nothing was started."""
    from megatron.core import parallel_state as ps

    if dist.is_initialized():
        ps.destroy_model_parallel()
        dist.destroy_process_group()


def _end_children() -> None:
    """End the processes this one started (reward workers, checkpoint writers)."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass


@contextmanager
def distributed(
    parallel: Any, *, seed: int, on_error: Callable[[BaseException], None] | None = None
) -> Iterator[Groups]:
    """Process groups for a run.

    An exception on one rank ends that rank at once with its traceback; the others' collectives then
    fail instead of waiting, and torchrun ends the rest, or starts all again. Cleaning up politely would make
    the failing rank wait for ranks that wait for it. `on_error` is called before the rank ends, and before
    any other rank notices.
    """
    try:
        groups = start(parallel, seed)
    except Exception as error:
        if on_error is not None:
            on_error(error)
        raise
    try:
        yield groups
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        sys.stdout.flush()
        _end_children()
        trace = traceback.format_exc()
        print(f"\n[rank {groups.rank}] {type(error).__name__}: {error}\n{trace}", file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)
        if on_error is not None:
            on_error(error)
        os._exit(1)
    stop()
