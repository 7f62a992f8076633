"""Fixtures that several files share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from place import EXAMPLES, TORCHRUN, Place


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("original")
    size = ("--traces", 70, "--train-prompts", 40, "--heldout-prompts", 10)
    command = [sys.executable, EXAMPLES / "make_data.py", "--out", folder / "data", *size]
    subprocess.run([str(word) for word in command], check=True, timeout=100)
    (folder / "data" / "model").rename(folder / "model")
    return Place(folder)


@pytest.fixture
def place(original: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy to spoil, seen by one process of the world that a test says."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(original.model, tmp_path / "model")
    shutil.copytree(original.data, tmp_path / "data")
    return Place(tmp_path)
