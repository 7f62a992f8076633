"""Tests compute on the CPU, on a machine with GPUs too, unless DGPO_TEST_GPU=1 is set (`make test-gpu`).

The Triton kernels then run in Triton's interpreter, which has to be chosen before Triton is imported, here
and in the processes that tests start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

if os.environ.get("DGPO_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


# The same cases every time, however busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


ENGINES = "tests/engines/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With two workers, one runs all tests of SGLang servers: the four that they share take a minute of
    both cores to start, once instead of twice. More workers have the cores for it, and take whole files."""
    from xdist.scheduler import LoadFileScheduling

    class ServersTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = self.numnodes <= 2 and nodeid.startswith(ENGINES)
            return ENGINES if together else super()._split_scope(nodeid)

    return ServersTogether(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first."""
    items.sort(key=lambda item: not item.nodeid.startswith(ENGINES))


@pytest.fixture(autouse=True)
def _ending_at_once_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A rank that fails ends its process with os._exit; in pytest's own it would end all tests, silently."""
    own, really = os.getpid(), os._exit

    def end(code: int) -> None:
        if os.getpid() != own:  # a fork's
            really(code)
        pytest.fail(f"the process would have ended at once, with exit status {code}")

    monkeypatch.setattr(os, "_exit", end)
    yield
