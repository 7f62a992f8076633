"""Starts an SGLang server; run by the interpreter of SGLang's own environment, not by the trainer's.

Its top level runs again in every process that the server spawns. On a machine without a GPU it makes up
for two packages that have no build for CPUs; none of the stand-ins is ever called, as all arithmetic is
SGLang's torch-native path. There the server also forks its processes instead of spawning them.
"""

from __future__ import annotations

import importlib.machinery
import multiprocessing
import os
import signal
import sys
import threading
import types
from typing import Any

WITHOUT_GPU = "MEGATRON_DGPO_SGLANG_WITHOUT_GPU"
"""Environment variable by which the trainer asks for the stand-ins."""


class _NoKernels(types.ModuleType):
    """A package whose every function says that it has no kernels."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} has no build for CPUs")

        return missing


def _do_without_gpu_packages() -> None:
    import torch

    # torchvision's Python part registers shapes for these, and fails where its C++ part is missing.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["megatron_dgpo_torchvision_ops"] = library  # type: ignore[assignment]  # kept alive
    kernels = _NoKernels("sgl_kernel")
    kernels.__path__ = []
    kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    sys.modules["sgl_kernel"] = kernels


def _fork_processes() -> None:
    """SGLang's processes start as forks of this one, which has imported all that they need: two thirds of a
    start on a CPU are imports. SGLang asks for spawned ones because CUDA does not work in a fork."""
    choose = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        choose("fork", force=True)

    multiprocessing.set_start_method = fork  # type: ignore[assignment]


def _end_with_trainer() -> None:
    """The trainer holds the other end of stdin: when it goes, however it goes, so does this server with
    all of its processes."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if os.environ.get(WITHOUT_GPU):
    _do_without_gpu_packages()


def main(arguments: list[str]) -> None:
    """The server that these words of SGLang's command line describe, until it ends."""
    _end_with_trainer()
    if os.environ.get(WITHOUT_GPU) and sys.platform == "linux":
        _fork_processes()
    from sglang.launch_server import run_server  # type: ignore[import-not-found]
    from sglang.srt.server_args import prepare_server_args  # type: ignore[import-not-found]

    run_server(prepare_server_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
