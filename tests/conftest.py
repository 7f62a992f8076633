"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is
imported, here and in the processes that tests start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


# The same cases every time, however busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


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
