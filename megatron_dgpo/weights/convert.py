"""Model folders into this rank's shards, and the shards back into a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.mcore.checkpoint import load_weights
from megatron_dgpo.mcore.files import is_checkpoint
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.mcore.model import PolicyModel
from megatron_dgpo.progress import progress, watched
from megatron_dgpo.weights.checkpoints import (
    MegatronFolder,
    OnBytes,
    checkpoint_source,
    ignore,
    name_table,
)
from megatron_dgpo.weights.export import export_stream, local_entries
from megatron_dgpo.weights.folders import (
    INDEX_FILE,
    ONE_FILE,
    TensorSource,
    complete_or_absent,
    copy_beside_weights,
    tensor_files,
    tensor_reader,
)
from megatron_dgpo.weights.names import Entry
from megatron_dgpo.weights.shards import hf_shapes, shard, to_full

DEFAULT_SHARD_BYTES = 5 << 30


def folder_source(folder: Path, shape: ModelShape | None = None) -> tuple[list[str], TensorSource]:
    """Hugging Face names in a folder, of safetensors (one file or several) or of an imported checkpoint,
    and a function that reads one of them. `shape` is the model's; without it config.json gives it.

    Raises FileNotFoundError when the folder has no weights or lacks a file, ValueError for a file that is
    damaged or is not what the others say (see `folders.tensor_files` and `checkpoints.checkpoint_source`).
    """
    if is_checkpoint(folder):
        return checkpoint_source(folder, shape or ModelShape.from_folder(folder))
    files = tensor_files(folder)
    return list(files), tensor_reader(folder, files)


def random_source(folder: Path, seed: int) -> tuple[list[str], TensorSource]:
    """Random weights by transformers' own initialisation, the same on every rank and at any split."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with progress("making random weights"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    state = model.state_dict()
    return list(state), state.__getitem__


def load_hf(model: PolicyModel, groups: platform.Groups, names: list[str], read: TensorSource) -> None:
    """Fill this rank's parameters from Hugging Face tensors.

    Raises:
        KeyError: naming a tensor that is missing or has no Megatron counterpart.
        ValueError: naming a tensor whose shape does not fit.
    """
    table = name_table(model.shape)
    table.check_hf_names(names)
    _fill(model, groups, local_entries(model, table), read)


def load_trunk(
    model: PolicyModel, groups: platform.Groups, shape: ModelShape, names: list[str], read: TensorSource
) -> None:
    """Fill this rank's parameters but the head's from Hugging Face tensors of a model of this shape; the head
    keeps what it has. Raises what `load_hf` raises."""
    table = name_table(shape)
    table.check_hf_names(names)
    _fill(model, groups, local_entries(model, table, but=("output_layer.weight",)), read)


@torch.no_grad()
def _fill(
    model: PolicyModel, groups: platform.Groups, entries: Iterator[tuple[Entry, Tensor]], read: TensorSource
) -> None:
    padded = model.shape.padded_vocab_size(groups.tp.size())
    there = list(entries)
    for entry, parameter in watched(there, "loading weights", len(there), "parameters"):
        tensors = [read(n) for n in entry.hf]
        _check_tensors(entry, tensors, model.shape)
        full = to_full(entry, tensors, model.shape, padded)
        parameter.copy_(shard(entry, full, groups.tp.rank(), groups.tp.size()))


def _check_tensors(entry: Entry, tensors: list[Tensor], shape: ModelShape) -> None:
    """Raise ValueError for a tensor that is not of the shape that export would give it (joined with others
    or padded, a wrong one could make a parameter of the right shape), or that does not hold weights."""
    for name, tensor, wanted in zip(entry.hf, tensors, hf_shapes(entry, shape), strict=True):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: the shape is {tuple(tensor.shape)}, but config.json makes it {wanted}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype} holds no weights")


def save_hf(
    model: PolicyModel,
    groups: platform.Groups,
    source: Path,
    target: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the policy as a Hugging Face folder; collective, rank 0 writes.

    Config and tokenizer files come from `source`. The folder appears under its name only when it is
    complete.
    """
    stream = export_stream(model, groups)
    if groups.rank != 0:
        for _ in stream:
            pass
        return
    with complete_or_absent(target, overwrite=True) as partial:
        total = len(name_table(model.shape).hf_names())
        stream = watched(stream, f"writing {target}", total, "tensors")
        write_safetensors(stream, partial, shard_bytes=shard_bytes)
        copy_beside_weights(source, partial, model.config.params_dtype)


def export_hf(
    checkpoint: MegatronFolder,
    target: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> None:
    """Write a distributed checkpoint's weights as a Hugging Face folder, tensor by tensor.

    Raises FileExistsError for a target that is there, without `overwrite`.
    """
    with complete_or_absent(target, overwrite=overwrite) as folder:
        write_safetensors(checkpoint.stream(on_bytes), folder, shard_bytes=shard_bytes)
        copy_beside_weights(checkpoint.beside, folder, checkpoint.dtype)


def load_folder(model: PolicyModel, groups: platform.Groups, folder: Path) -> None:
    """Fill this rank's parameters from a model folder: Hugging Face's, or an imported checkpoint.

    Raises what `folder_source`, `load_hf` and `mcore.checkpoint.load_weights` raise.
    """
    names, read = folder_source(folder, model.shape)
    if is_checkpoint(folder):
        load_weights(model, groups, folder)
    else:
        load_hf(model, groups, names, read)


def write_safetensors(
    stream: Iterator[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write named tensors as Hugging Face's safetensors: one file, or several with an index, so that no
    more than one file's tensors are in memory. `folder_source` reads them."""
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        nonlocal pending
        save_file(pending, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(pending))
        pending = {}

    for name, tensor in stream:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > shard_bytes:
            flush()
        pending[name] = tensor.detach().to("cpu").clone().contiguous()
        total += size
    flush()
    if len(files) == 1:
        (folder / "part-0").rename(folder / ONE_FILE)
        return
    weight_map = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
