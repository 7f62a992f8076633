"""A Megatron distributed checkpoint on disk: checked, written and read one tensor at a time.

Megatron's own save takes the tensors of all ranks at once. What is written here is the same format
(`torch_dist`: torch's distributed checkpoint with two files of Megatron's beside it), by one process,
without process groups, and with no more in memory than the tensors being written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import load_content_metadata
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dgpo import jsontext, platform
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.progress import BYTES, progress

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
"""Of the checkpoint's content, for Megatron."""
_SHAPE = "megatron_dgpo.model_shape"
"""Beside METADATA in a checkpoint: `ModelShape.identity` of the weights. Tensors do not show all of it, such
as where the vocabulary ends and its padding begins, or the angles of rotary embeddings."""
FILES_FILE = "files.json"
"""Size and checksum of the others: torch loads changed numbers without a word."""
_INDEX = ".metadata"
_COMMON_STATE = "common_state/"
"""megatron-core 0.19 and later keep under this key what earlier versions keep in COMMON_STATE_FNAME."""


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a distributed checkpoint (complete or not)."""
    return (folder / CONFIG_FNAME).is_file() and (folder / _INDEX).is_file()


def own_files(folder: Path) -> list[str]:
    """Names of the files that make up the checkpoint, sorted; others, such as a tokenizer's, may be there."""
    fixed = (CONFIG_FNAME, COMMON_STATE_FNAME, _INDEX)
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".distcp" or p.name in fixed)


def content_metadata(shape: ModelShape) -> dict[str, Any]:
    """What Megatron keeps with a checkpoint of a model of this shape."""
    return {**METADATA, _SHAPE: shape.identity()}


def check_shape(folder: Path, shape: ModelShape) -> None:
    """Raise ValueError naming every field in which the checkpoint's weights are of another shape than this
    one. Checkpoints that do not say of which they are, as earlier versions wrote them, pass."""
    try:
        kept = (load_content_metadata(str(folder)) or {}).get(_SHAPE, {})
    except Exception as error:  # of an unpickler fed with anything
        file = folder / COMMON_STATE_FNAME
        problem = f"{file} cannot be read ({type(error).__name__}: {error})"
        if not file.exists() and any(k.startswith(_COMMON_STATE) for k in CheckpointReader(folder).keys()):
            problem = (
                f"{folder}: saved by megatron-core 0.19 or later, which keeps there what megatron-core "
                f"{megatron.core.__version__} reads from {COMMON_STATE_FNAME}; upgrade megatron-core"
            )
        raise ValueError(problem) from error
    if wrong := shape.differences(kept):
        raise ValueError(f"{folder}: {'; '.join(wrong)}")


# --- integrity ------------------------------------------------------------------------------------------


def digests(folder: Path, groups: platform.Groups | None = None) -> dict[str, str]:
    """File name -> size and CRC-32; over several ranks each reads its share, and all have all."""
    rank, ranks = (groups.rank, groups.world_size) if groups else (0, 1)
    found: dict[str, str] = {}
    mine = own_files(folder)[rank::ranks]
    total = sum((folder / name).stat().st_size for name in mine)
    with progress(f"checksums of {folder}", total, BYTES) as bar:
        for name in mine:
            crc = size = 0
            with (folder / name).open("rb") as file:
                while chunk := file.read(1 << 24):
                    crc, size = zlib.crc32(chunk, crc), size + len(chunk)
                    bar.update(len(chunk))
            found[name] = f"{size} {crc:08x}"
    if groups is None:
        return found
    return {name: d for part in platform.gather_objects(found, groups.world) for name, d in part.items()}


def write_digests(folder: Path, found: dict[str, str]) -> None:
    (folder / FILES_FILE).write_text(json.dumps(found, indent=1))


def check_files(folder: Path, groups: platform.Groups | None = None) -> None:
    """Raise ValueError, on all ranks, naming a file that is not what was written."""
    listed = folder / FILES_FILE
    written: dict[str, str] = {FILES_FILE: "is there"}
    if listed.is_file():
        try:
            written = dict(jsontext.loads(listed.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{listed} is damaged ({error})") from error
    found = digests(folder, groups)
    if bad := sorted(n for n in written.keys() | found.keys() if written.get(n) != found.get(n)):
        raise ValueError(f"{folder}: {bad[0]} is missing or not what was saved")


def flush_to_disk(folder: Path, *, contents: bool) -> None:
    """fsync the folder's entries and, with `contents`, every file under it."""
    files = [path for path in folder.rglob("*") if not path.is_symlink()] if contents else []
    for path in [*files, folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- writing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A block of a tensor of the checkpoint, which is read when it is written."""

    key: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """A tensor of `shape`."""


class _OneByOne(dcp.DefaultSavePlanner):
    """Hands torch's writer each piece when its turn comes."""

    def __init__(self, pieces: Sequence[Piece], on_written: Callable[[int], Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {(p.key, torch.Size(p.offsets)): p for p in pieces}
        self._on_written = on_written

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(key, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, torch.Size(piece.shape)),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.global_shape),
                ),
            )
            for (key, offsets), piece in self._pieces.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        piece = self._pieces[write_item.index.fqn, write_item.index.offset]
        tensor = piece.read()
        if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
            raise ValueError(f"{piece.key} at {piece.offsets}: read {tuple(tensor.shape)} of {tensor.dtype}")
        self._on_written(tensor.numel() * tensor.element_size())
        return tensor


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    metadata: Mapping[str, Any],
    on_written: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write a checkpoint of weights into an empty folder, the list of its files last. `metadata` is what
    `content_metadata` makes.

    `on_written` is called with the bytes of each piece. Raises what a piece's `read` raises.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True, thread_count=1)
    try:
        dcp.save({}, storage_writer=writer, planner=_OneByOne(pieces, on_written), no_dist=True)
    except dcp.api.CheckpointException as error:  # no Exception, and its text is a whole traceback
        raise next(iter(error.failures.values()))[0] from error
    torch.save({"content_metadata": dict(metadata)}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    write_digests(folder, digests(folder))


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says of one of its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Into(dcp.DefaultLoadPlanner):
    """Lays what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.transform_tensor(read_item, self._target)


class CheckpointReader:
    """The tensors of a checkpoint by key, read in blocks, without process groups.

    Raises ValueError where the folder's index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = dcp.FileSystemReader(folder)
        try:
            self._index = self._reader.read_metadata()
        except Exception as error:  # of an unpickler fed with anything
            raise ValueError(f"{folder / _INDEX} cannot be read ({type(error).__name__}: {error})") from error
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        self.tensors = {
            key: Stored(tuple(stored.size), stored.properties.dtype)
            for key, stored in self._index.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def keys(self) -> list[str]:
        """Of everything in it, tensors and other things."""
        return list(self._index.state_dict_metadata)

    def is_complete(self, key: str) -> bool:
        """Whether the blocks that were saved make up the whole tensor."""
        stored = self._index.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        return sum(chunk.sizes.numel() for chunk in stored.chunks) == stored.size.numel()

    def read(self, key: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A block of a tensor. Raises ValueError where the checkpoint does not hold all of it."""
        stored = self._index.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        block = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [block])
        target = torch.empty(tuple(shape), dtype=stored.properties.dtype)
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise ValueError(f"{self.folder}: {key} is not all there at {tuple(offsets)}")
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target
