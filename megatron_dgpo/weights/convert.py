"""Hugging Face folders into this rank's shards, and the shards back into a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.mcore.model import ModelShape, PolicyModel
from megatron_dgpo.weights.export import export_stream, local_entries
from megatron_dgpo.weights.names import Entry, NameTable
from megatron_dgpo.weights.shards import from_full, shard, to_full

TensorSource = Callable[[str], Tensor]
DEFAULT_SHARD_BYTES = 5 << 30


def name_table(shape: ModelShape) -> NameTable:
    return NameTable(shape.family, shape.num_layers, tied=shape.tied)


def folder_source(folder: Path) -> tuple[list[str], TensorSource]:
    """Names in a folder's safetensors (one file or several) and a function that reads one of them.

    Raises FileNotFoundError when the folder has no safetensors file or lacks one of its index.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        if missing := sorted({f for f in files.values() if not (folder / f).is_file()}):
            raise FileNotFoundError(f"{folder}: {missing[0]} is listed in the index but is not there")
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as f:
            files = dict.fromkeys(f.keys(), "model.safetensors")
    else:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors (set model.init = 'random' to start from random weights)"
        )

    def read(name: str) -> Tensor:
        with safe_open(folder / files[name], framework="pt") as f:
            return f.get_tensor(name)

    return list(files), read


def random_source(folder: Path, seed: int) -> tuple[list[str], TensorSource]:
    """Random weights by transformers' own initialisation, the same on every rank and at any split."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
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
    padded = model.shape.padded_vocab_size(groups.tp.size())
    with torch.no_grad():
        for entry, parameter in local_entries(model, table):
            tensors = [read(n) for n in entry.hf]
            _check_shapes(entry, tensors, parameter, groups.tp.size(), model.shape)
            full = to_full(entry, tensors, model.shape, padded)
            part = shard(entry, full, groups.tp.rank(), groups.tp.size())
            parameter.copy_(part)


def _check_shapes(entry: Entry, tensors: list[Tensor], parameter: Tensor, tp: int, shape: ModelShape) -> None:
    """Raise ValueError for a tensor that is not of the shape that export would give it: joined with
    others or padded, a wrong one could make a parameter of the right shape."""
    full_shape = list(parameter.shape)
    if entry.tp_dim is not None:
        full_shape[entry.tp_dim] *= tp
    wanted = from_full(entry, torch.empty(full_shape, device="meta"), shape)
    for name, tensor, like in zip(entry.hf, tensors, wanted, strict=True):
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name}: the shape is {tuple(tensor.shape)}, but config.json makes it {tuple(like.shape)}"
            )


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
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for extra in source.iterdir():
        if (
            extra.is_file()
            and extra.suffix in (".json", ".jinja", ".txt", ".model")
            and "safetensors" not in extra.name
        ):
            shutil.copy(extra, partial / extra.name)
    write_safetensors(stream, partial, shard_bytes=shard_bytes)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


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
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
