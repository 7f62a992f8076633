"""Fixtures that several files share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import patience
from place import EXAMPLES, TORCHRUN, Place


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("original")
    size = ("--traces", 70, "--train-prompts", 40, "--heldout-prompts", 10)
    command = [sys.executable, EXAMPLES / "make_data.py", "--out", folder / "data", *size]
    subprocess.run([str(word) for word in command], check=True, timeout=patience())
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


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders to convert. `one`: a file. `several`: files and an index. `imported`: converted."""
    from converting import write_folder
    from tiny import hf_tensors

    from megatron_dgpo.weights.checkpoints import HFFolder, import_hf
    from megatron_dgpo.weights.convert import write_safetensors

    root = tmp_path_factory.mktemp("originals")
    write_folder(root / "one", tied=False, family="qwen3")
    shutil.copytree(root / "one", root / "several")
    (root / "several" / "model.safetensors").unlink()
    write_safetensors(iter(hf_tensors(root / "one").items()), root / "several", shard_bytes=40_000)
    assert len(list((root / "several").glob("*.safetensors"))) > 2
    import_hf(HFFolder(root / "one"), root / "imported")
    return root
