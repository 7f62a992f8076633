"""Whether a model is still the one it was, without reading all of a large one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_dgpo import jsontext
from megatron_dgpo.mcore.files import FILES_FILE, is_checkpoint
from megatron_dgpo.progress import progress
from megatron_dgpo.weights.checkpoints import hf_folder_of
from megatron_dgpo.weights.folders import tensor_files

WHOLE_BYTES = 1 << 30
"""Weights up to this size are read whole: a second or two."""
BLOCK_BYTES = 1 << 14
BLOCKS = 8
"""What is read of each tensor of a larger model, spread evenly: 100 MB of 60 GB. (Training moves all.)"""


def fingerprint(model: Path) -> str:
    """Of the weights and the config.json of a Hugging Face folder or a checkpoint, in hex.

    A checkpoint's is that of the list of its files with their checksums (which loading it compares with the
    files). Of safetensors it covers names, shapes and sizes, and the numbers as far as WHOLE_BYTES says.

    Raises FileNotFoundError where files are missing, ValueError for a file that is cut off or damaged.
    """
    found = hashlib.blake2b(digest_size=8)
    if is_checkpoint(model):
        found.update((hf_folder_of(model)[0] / "config.json").read_bytes())
        found.update((model / FILES_FILE).read_bytes())
        return found.hexdigest()
    found.update((model / "config.json").read_bytes())
    with progress(f"the fingerprint of {model}"):
        _add_tensors(found, model)
    return found.hexdigest()


def _add_tensors(found: Any, model: Path) -> None:
    files = [model / name for name in sorted(set(tensor_files(model).values()))]
    whole = sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    for path in files:
        found.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
            found.update(text)
            tensors = [
                t["data_offsets"] for name, t in jsontext.loads(text).items() if name != "__metadata__"
            ]
            for start, end in sorted(tensors):
                for at, size in _pieces(start, end, whole):
                    file.seek(8 + length + at)
                    found.update(file.read(size))


def _pieces(start: int, end: int, whole: bool) -> list[tuple[int, int]]:
    """(offset, bytes) of what is read of a tensor's numbers."""
    if whole or end - start <= BLOCKS * BLOCK_BYTES:
        return [(start, end - start)]
    step = (end - start - BLOCK_BYTES) // (BLOCKS - 1)
    return [(start + k * step, BLOCK_BYTES) for k in range(BLOCKS)]
