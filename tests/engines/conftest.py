"""Real SGLang servers for the tests: `make sglang` installs them into .venv-sglang; SGLANG_PYTHON names
the interpreter of another environment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import patience
from tiny import write_model

from megatron_dgpo.config import LaunchConfig
from megatron_dgpo.rollout.sglang.servers import ServerProcess, stop_servers

ROOT = Path(__file__).resolve().parents[2]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "tied": False},
    "llama": {"family": "llama", "tied": False},
}
CONFIG_EOS = 7
"""Of the folder "ends": its weights are qwen2's, but its config has an end-of-sequence token."""


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    python = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"SGLang is not installed: {python} is not there (make sglang)")
    return python


@pytest.fixture(scope="session")
def warm_python(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sglang_python` for servers that start in a second: they are forks of one process, which has imported
    what they need. Their process is not a child of the one that starts them (see `warm_python.py`)."""
    folder = tmp_path_factory.mktemp("warm")
    script = folder / "python"
    words = [
        sys.executable,
        "-IS",
        Path(__file__).with_name("warm_python.py"),
        sglang_python,
        folder,
        os.getpid(),
    ]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {name: write_model(root / name, **how) for name, how in FAMILIES.items()}
    made["ends"] = root / "ends"
    shutil.copytree(made["qwen2"], made["ends"])
    config = json.loads((made["ends"] / "config.json").read_text())
    (made["ends"] / "config.json").write_text(json.dumps({**config, "eos_token_id": CONFIG_EOS}))
    return made


@pytest.fixture(scope="session")
def servers(
    folders: dict[str, Path], warm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServerProcess]]:
    """A server of each folder, started side by side, with the folder's weights."""
    logs = tmp_path_factory.mktemp("logs")
    launch = LaunchConfig(python=warm_python, args={"load_format": "auto"})
    made: dict[str, ServerProcess] = {}
    try:
        for n, (name, folder) in enumerate(folders.items()):
            log = logs / f"{name}.log"
            made[name] = ServerProcess(folder, launch, number=n, dtype="float32", log_file=log)
        for server in made.values():
            server.wait_ready(patience())
        yield made
    finally:
        stop_servers(made.values())
