"""The only place where anything is patched: how Megatron-Core is imported, told to keep quiet, made to run
without a GPU, and to write checkpoints.

Without a GPU, or with `parallel.device = "cpu"`, Megatron-Core runs on CPU tensors and gloo: it asks for "the
current CUDA device" in many places, and the shim below answers "the CPU". The arithmetic is untouched. The
patches fit megatron-core from OLDEST_MEGATRON to BELOW_MEGATRON.
"""

from __future__ import annotations

import functools
import importlib.abc
import logging
import os
import queue
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_dgpo import torchrun

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
OLDEST_MEGATRON, BELOW_MEGATRON = "0.16.1", "0.20"
"""Versions of megatron-core that are supported, the second excluded, as in pyproject.toml."""

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
"""The process that `write_checkpoints` was last called in."""


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


def _own_part(own: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor] | None:
    """A buffer's parts, one a rank, where `own` is this rank's."""
    parts = list(whole.view(group.size(), -1))
    return parts if own.data_ptr() == parts[group.rank()].data_ptr() else None


def _sum_into_own_part(
    own: torch.Tensor, whole: torch.Tensor, *, op: Any, group: dist.ProcessGroup, async_op: bool = False
) -> Any:
    """The reduce-scatter of a gradient buffer, `own` being this rank's part of it.

    torch makes one over gloo by an all-reduce of a copy of the buffer. Nobody reads the other ranks' parts
    afterwards, so each part can be summed where it is, and to one rank alone.
    """
    parts = _own_part(own, whole, group)
    if async_op or parts is None:
        return dist.reduce_scatter_tensor(own, whole, op=op, group=group, async_op=async_op)
    for rank, part in enumerate(parts if len(parts) > 1 else []):
        dist.reduce(part, group=group, group_dst=rank, op=op)
    return None


def _share_own_part(
    whole: torch.Tensor, own: torch.Tensor, *, group: dist.ProcessGroup, async_op: bool = False
) -> Any:
    """The all-gather of a parameter buffer, `own` being this rank's part of it. torch's over gloo gathers
    into another buffer, and copies."""
    parts = _own_part(own, whole, group)
    if async_op or parts is None:
        return dist.all_gather_into_tensor(whole, own, group=group, async_op=async_op)
    for rank, part in enumerate(parts if len(parts) > 1 else []):
        dist.broadcast(part, group=group, group_src=rank)
    return None


def run_megatron_on_cpu() -> None:
    """Make Megatron-Core run on CPU tensors. Does nothing when called twice."""
    global _shim
    if _shim is not None:
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

    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random as megatron_random

    param_and_grad_buffer.dist_reduce_scatter_func = _sum_into_own_part
    param_and_grad_buffer.dist_all_gather_func = _share_own_part
    clip_grads.l2_norm_impl = _l2_norm
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    _shim = _CudaMeansCpu()
    log.info("on the CPU: Megatron-Core runs on CPU tensors and gloo, with torch's optimizer and norms")


def write_checkpoints() -> None:
    """Make Megatron write checkpoints without a manager process, by processes that end with this one."""
    global _rank_pid
    _rank_pid = os.getpid()
    _write_checkpoints_without_a_manager()
    _end_checkpoint_writers_with_their_rank()


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
