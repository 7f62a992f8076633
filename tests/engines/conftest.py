"""Where the real SGLang is: `make sglang` puts it into .venv-sglang; SGLANG_PYTHON names another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    python = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"SGLang is not installed: {python} is not there (make sglang)")
    return python
