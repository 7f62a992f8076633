"""Device, backend, process groups, and the only place where anything is patched.

On GPUs nothing is patched. Without one, or with `parallel.device = "cpu"`, Megatron-Core runs on CPU tensors
and gloo: it asks for "the current CUDA device" in many places, and the shim below answers "the CPU". The
arithmetic is untouched. The patches fit megatron-core from OLDEST_MEGATRON to BELOW_MEGATRON.
"""

from __future__ import annotations

import functools
import importlib.abc
import logging
import math
import os
import queue
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_dgpo import torchrun

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")

# Megatron warns about every optional package once per module and rank, and about its own use of
# names that torch or Megatron has deprecated. What a run falls back to is logged once instead.
for _message in (
    ".*(Transformer Engine|Apex).*not installed",
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to",
):
    warnings.filterwarnings("ignore", message=_message)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
# Its advice to those who call it, once for each model, layout and save: nothing that a user could follow.
for _logger, _message in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("dist_checkpointing.strategies.common", "load_common is deprecated"),
    ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
):
    logging.getLogger(f"megatron.core.{_logger}").addFilter(
        lambda record, advice=_message: not record.getMessage().startswith(advice)  # type: ignore[misc]
    )
_shim: _CudaMeansCpu | None = None
_rank_pid: int | None = None
"""The process that `start` was last called in."""

OLDEST_MEGATRON, BELOW_MEGATRON = "0.16.1", "0.20"
"""Versions of megatron-core that are supported, the second excluded, as in pyproject.toml."""


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


# --- Megatron-Core's imports ------------------------------------------------------------------------


def _compile_when_called(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """torch.compile for a decorator of a function that may never be called."""
    if fn is None:
        return functools.partial(_compile_when_called, **options)
    if not isinstance(fn, types.FunctionType):
        return _compile(fn, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(_compile(fn, **options))
        return compiled[0](*args, **kwargs)

    return call


_compile = torch.compile


class _FrugalImport(SourceFileLoader):
    """Imports Megatron-Core without what it loads in vain, two thirds of the time that its import takes.

    It decorates fused functions, which a run here does not call, with torch.compile, and that loads torch's
    compiler; and it loads W&B for an inference engine that is not used.
    """

    def exec_module(self, module: ModuleType) -> None:
        wandb = "wandb" in sys.modules
        torch.compile = _compile_when_called  # type: ignore[assignment]
        if not wandb:
            sys.modules["wandb"] = None  # type: ignore[assignment]
        try:
            super().exec_module(module)
        finally:
            torch.compile = _compile
            if not wandb:
                del sys.modules["wandb"]


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "megatron.core":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _FrugalImport(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _MegatronFinder())

# --- Megatron-Core on CPU -------------------------------------------------------------------------


def check_megatron(found: str) -> None:
    """Raises RuntimeError where this version of megatron-core is older than the oldest that is supported, and
    logs a warning where it is newer than all that are."""
    from packaging.version import Version

    supported = f"megatron-core {OLDEST_MEGATRON} or later, below {BELOW_MEGATRON}"
    if Version(found) < Version(OLDEST_MEGATRON):
        raise RuntimeError(f"megatron-core {found} is too old: megatron_dgpo needs {supported}")
    if Version(found).release >= Version(BELOW_MEGATRON).release:
        log.warning("megatron-core %s has not been tested: megatron_dgpo supports %s", found, supported)


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every factory call or move that names a CUDA device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and (target := kwargs.get("device")) is not None:
            if (type(target) is str and target.startswith("cuda")) or (
                type(target) is torch.device and target.type == "cuda"
            ):
                kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


class _InOrder:
    """Stands for every CUDA stream: the CPU does what it is given in order, so nothing waits."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def _tensor_type(original: Any) -> Any:
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            # Megatron's optimizers accept parameters by this string.
            name = original(self)
            return name.replace("torch.", "torch.cuda.", 1) if not name.startswith("torch.cuda.") else name
        return original(self, dtype, *args, **kwargs)

    return type_


def _l2_norm(
    chunk_size: int, _: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, shape (1,), in the form that Megatron calls it.

    Its own fallback takes torch's norm, which adds a float32 tensor's squares one after the other on a
    CPU: 0.04 % off at ten million numbers and 0.8 % at eighty, so that the norm depended on the split.
    """
    assert not per_tensor, "Megatron clips by the norm of all"
    square = torch.zeros((), dtype=torch.float64)
    for tensor in tensor_lists[0]:
        chunks = torch._foreach_norm(tensor.reshape(-1).split(chunk_size))
        square += torch.stack(chunks).double().square().sum()
    return square.sqrt().float().reshape(1), None


def run_megatron_on_cpu() -> None:
    """Make Megatron-Core run on CPU tensors. Does nothing where there is a GPU, or when called twice."""
    global _shim
    if has_gpu() or _shim is not None:
        return
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *a, **k: None
    in_order = _InOrder()
    torch.cuda.current_stream = lambda *a, **k: in_order  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda *a, **k: in_order  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]

    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random as megatron_random

    clip_grads.l2_norm_impl = _l2_norm
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    _shim = _CudaMeansCpu()
    log.info("on the CPU: Megatron-Core runs on CPU tensors and gloo, with torch's optimizer and norms")


def _write_checkpoints_without_a_manager() -> None:
    """Megatron hands write results over through a spawned manager process even when it saves
    synchronously. That process takes seconds to start and outlives a killed run."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if getattr(filesystem_async, "_results_queue", False) is None:
        filesystem_async._results_queue = queue.Queue()


def _end_checkpoint_writers_with_their_rank() -> None:
    """Before 0.17 Megatron forks processes that write files. One whose rank is killed would wait for ever to
    be asked for its result, holding a copy of the rank's memory. Later versions write in the rank itself and
    its threads, where a signal meant for a writer would be the rank's own."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    original = writer.write_preloaded_data
    if sys.platform != "linux" or hasattr(original, "ends_with_rank"):
        return

    @functools.wraps(original)
    def write(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != _rank_pid:
            torchrun.end_with_parent()
        return original(*args, **kwargs)

    write.ends_with_rank = True  # type: ignore[attr-defined]
    writer.write_preloaded_data = staticmethod(write)


@contextmanager
def megatron_calls() -> Iterator[None]:
    """Wrap calls into Megatron-Core that may name a CUDA device in a factory call.

    A torch function mode costs about a microsecond per torch call, so it is entered around
    Megatron's own code and not around generation.
    """
    if _shim is None or _shim in torch.overrides._get_current_function_mode_stack():
        yield
    else:
        with _shim:
            yield


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
    environment (one process without it). Raises what `use_device` and `check_megatron` raise.
    """
    global _rank_pid
    _rank_pid = os.getpid()
    torchrun.end_with_agent()
    use_device(parallel.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    import megatron.core

    check_megatron(megatron.core.__version__)
    run_megatron_on_cpu()
    _write_checkpoints_without_a_manager()
    _end_checkpoint_writers_with_their_rank()
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
    with megatron_calls():
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
