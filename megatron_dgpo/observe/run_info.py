"""Which software a run was made with."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "megatron-core", "transformers")


def versions() -> dict[str, Any]:
    """Versions of Python, the main packages (None: not installed) and the platform, and the
    repository's commit with whether files differ from it (None outside a checkout)."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", Path(__file__).name) else None
    return {
        "python": platform.python_version(),
        **{name: _installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "commit": commit,
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
    }


def write_versions(folder: str | Path) -> Path:
    """Write `versions.json` into the run's folder and return its path."""
    path = Path(folder) / "versions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
    return path


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """git's answer about the folder of this file; None where git or a repository is missing."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
