"""Hugging Face folders into Megatron's distributed checkpoints and back, tensor by tensor.

One process, no process groups, no model: the name table says what each tensor becomes, and the numbers
pass from file to file. Everything that can be wrong with the source is found before anything is written.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dgpo.mcore.files import (
    CheckpointReader,
    Piece,
    check_files,
    check_shape,
    content_metadata,
    is_checkpoint,
    write_checkpoint,
)
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.weights.folders import (
    TensorSource,
    complete_or_absent,
    copy_beside_weights,
    describe,
    tensor_files,
    tensor_reader,
    weight_dtype,
)
from megatron_dgpo.weights.names import Entry, NameTable, checkpoint_key, some
from megatron_dgpo.weights.shards import from_full, full_shape, hf_shapes, to_full

OnBytes = Callable[[int], Any]
"""Called with the bytes that have been passed on since it was last called."""


def ignore(_: int) -> None:
    """Nobody watches."""


_WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


def name_table(shape: ModelShape) -> NameTable:
    return NameTable(shape.family, shape.num_layers, tied=shape.tied)


# --- import ---------------------------------------------------------------------------------------------


class HFFolder:
    """A Hugging Face folder whose weights are exactly those of its config.json, without the fields that
    `ignore` names.

    Raises:
        OSError: a file that is missing or cannot be read.
        ValueError: naming a field, file or tensor that is damaged or not as the others say.
        KeyError: naming tensors that are missing or have no counterpart.
    """

    def __init__(self, folder: Path, ignore: Collection[str] = ()) -> None:
        self.folder = folder
        self.shape = ModelShape.from_folder(folder, ignore)
        files = tensor_files(folder)
        table = name_table(self.shape)
        try:
            table.check_hf_names(list(files))
        except KeyError as error:
            raise KeyError(f"{folder}: {error.args[0]}") from error
        tensors = describe(folder, files)
        wanted = {n: s for e in table.entries for n, s in zip(e.hf, hf_shapes(e, self.shape), strict=True)}
        for name, want in wanted.items():
            if tensors[name][0] != want:
                raise ValueError(
                    f"{folder}: {name} has shape {tensors[name][0]}, config.json makes it {want}"
                )
        self.dtype = weight_dtype(folder, tensors)
        self.read = tensor_reader(folder, files)
        self.num_bytes = sum(torch.Size(s).numel() for s in wanted.values()) * self.dtype.itemsize
        if self.shape.tied and "lm_head.weight" in files:
            self._check_tied_head()

    def _check_tied_head(self) -> None:
        if not torch.equal(self.read("lm_head.weight"), self.read("model.embed_tokens.weight")):
            raise ValueError(
                f"{self.folder}: lm_head.weight differs from model.embed_tokens.weight, and config.json has "
                "tie_word_embeddings true"
            )


def import_hf(model: HFFolder, target: Path, *, overwrite: bool = False, on_bytes: OnBytes = ignore) -> None:
    """Write a distributed checkpoint that loads at any split, with the configuration and the tokenizer
    beside it: a folder that `model.path` can name.

    Raises FileExistsError for a target that is there, without `overwrite`.
    """
    with complete_or_absent(target, overwrite=overwrite) as folder:
        write_checkpoint(folder, list(pieces(model)), content_metadata(model.shape), on_bytes)
        copy_beside_weights(model.folder, folder, model.dtype)


def pieces(model: HFFolder) -> Iterator[Piece]:
    """The checkpoint of a Hugging Face folder. Wherever rows are merely stacked in Megatron's parameter,
    each tensor is a block of its own and is not copied in memory."""
    shape = model.shape
    padded = shape.padded_vocab_size(1)
    for entry in name_table(shape).entries:
        full = full_shape(entry, shape, padded)
        if entry.layout == "qkv":
            parts = [(full, partial(_joined, model, entry))]
        else:
            sizes = hf_shapes(entry, shape)
            parts = [(s, partial(model.read, n)) for n, s in zip(entry.hf, sizes, strict=True)]
        if entry.layout == "vocab" and padded > shape.vocab_size:
            rest = (padded - shape.vocab_size, *full[1:])
            parts.append((rest, partial(torch.zeros, rest, dtype=model.dtype)))
        yield from _placed(entry, full, parts, model)


def _joined(model: HFFolder, entry: Entry) -> Tensor:
    return to_full(entry, [model.read(name) for name in entry.hf], model.shape, 0)


def _placed(
    entry: Entry, full: tuple[int, ...], parts: list[tuple[tuple[int, ...], Any]], model: HFFolder
) -> Iterator[Piece]:
    """Blocks of the parameter, one below the other, where they are in the checkpoint."""
    key, layer = checkpoint_key(entry)
    row = 0
    for size, read in parts:
        offsets = (row, *(0 for _ in size[1:]))
        if layer is None:
            yield Piece(key, full, model.dtype, offsets, size, read)
        else:
            yield Piece(
                key,
                (model.shape.num_layers, *full),
                model.dtype,
                (layer, *offsets),
                (1, *size),
                partial(_as_layer, read),
            )
        row += size[0]


def _as_layer(read: Callable[[], Tensor]) -> Tensor:
    return read().unsqueeze(0)


# --- export ---------------------------------------------------------------------------------------------


class MegatronFolder:
    """A checkpoint, imported or written by training, whose weights are exactly those of a shape; `beside`
    is the folder with its configuration and tokenizer, if it is another one, and `ignored` are the fields of
    its config.json that the shape was made without.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: naming a file, field or tensor that is damaged or not of this shape.
        KeyError: naming parameters that are missing or have no counterpart.
    """

    def __init__(
        self, folder: Path, shape: ModelShape, beside: Path | None = None, ignored: tuple[str, ...] = ()
    ) -> None:
        if not is_checkpoint(folder):
            raise FileNotFoundError(f"{folder}: no distributed checkpoint (metadata.json and .metadata)")
        self.folder, self.shape, self.beside, self.ignored = folder, shape, beside or folder, ignored
        check_shape(folder, shape)
        self.table = name_table(shape)
        self._reader = CheckpointReader(folder)
        weights = {k: t for k, t in self._reader.tensors.items() if not k.startswith("optimizer.")}
        self._check_keys(set(weights))
        dtypes = {stored.dtype: key for key, stored in sorted(weights.items(), reverse=True)}
        if bad := [(key, dtype) for dtype, key in dtypes.items() if dtype not in _WEIGHT_DTYPES]:
            raise ValueError(f"{folder}: {bad[0][0]} is {bad[0][1]}; weights are float32 or bfloat16")
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise ValueError(f"{folder}: {first} is {one} and {second} is {other}; all must be of one dtype")
        (self.dtype,) = dtypes
        self._padded = {key: stored.shape[0] for key, stored in weights.items()}
        self._check_shapes()
        sizes = (s for e in self.table.entries for s in hf_shapes(e, shape))
        self.num_bytes = sum(torch.Size(s).numel() for s in sizes) * self.dtype.itemsize

    def _check_keys(self, found: set[str]) -> None:
        wanted = {checkpoint_key(entry)[0] for entry in self.table.entries}
        if missing := sorted(wanted - found):
            raise KeyError(f"{self.folder}: missing from the checkpoint: {some(missing)}")
        if extra := sorted(found - wanted):
            raise KeyError(f"{self.folder}: in the checkpoint and without a Hugging Face name: {some(extra)}")

    def _check_shapes(self) -> None:
        for entry in self.table.entries:
            key, layer = checkpoint_key(entry)
            stored = self._reader.tensors[key].shape
            want = full_shape(entry, self.shape, max(self.shape.vocab_size, self._padded[key]))
            want = want if layer is None else (self.shape.num_layers, *want)
            if stored != want:
                raise ValueError(f"{self.folder}: {key} has shape {stored}, config.json makes it {want}")
            if not self._reader.is_complete(key):
                raise ValueError(f"{self.folder}: parts of {key} are missing")

    def tensors(self, entry: Entry) -> list[Tensor]:
        """The Hugging Face tensors of an entry, read from the checkpoint."""
        key, layer = checkpoint_key(entry)
        full = full_shape(entry, self.shape, self._padded[key])
        if layer is None:
            return from_full(entry, self._reader.read(key, [0] * len(full), full), self.shape)
        block = self._reader.read(key, [layer, *(0 for _ in full)], [1, *full])
        return from_full(entry, block[0], self.shape)

    def stream(self, on_bytes: OnBytes = ignore) -> Iterator[tuple[str, Tensor]]:
        """Every (Hugging Face name, tensor), in export order; one entry's in memory."""
        for entry in self.table.entries:
            for name, tensor in zip(entry.hf, self.tensors(entry), strict=True):
                yield name, tensor
                on_bytes(tensor.numel() * tensor.element_size())


def checkpoint_source(folder: Path, shape: ModelShape) -> tuple[list[str], TensorSource]:
    """Hugging Face names of a checkpoint and a function that reads one of them."""
    checkpoint = MegatronFolder(folder, shape)
    table = checkpoint.table

    def read(name: str) -> Tensor:
        entry = table.from_hf(name)
        return checkpoint.tensors(entry)[entry.hf.index(name)]

    return table.hf_names(), read


def hf_folder_of(checkpoint: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder with config.json and tokenizer of a checkpoint: itself where it was imported, or the
    model.path of the run that wrote it; and the fields of config.json that this run ignores. Raises
    FileNotFoundError where neither is there."""
    if (checkpoint / "config.json").is_file():
        return checkpoint, ()
    run = checkpoint.resolve().parent.parent / "config.toml"
    if not run.is_file():
        raise FileNotFoundError(f"{checkpoint}: neither config.json in it nor {run} (name a model folder)")
    settings = tomllib.loads(run.read_text(encoding="utf-8"))["model"]
    model = Path(settings["path"])
    if not (model / "config.json").is_file():
        raise FileNotFoundError(
            f"{run} has model.path {model}, where no config.json is (name a model folder)"
        )
    return model, tuple(settings.get("ignore_config_fields", ()))


def open_checkpoint(source: Path, model: Path | None = None, ignore: Collection[str] = ()) -> MegatronFolder:
    """A checkpoint whose files are what was written. `model` has its config.json and tokenizer; by default
    they are where `hf_folder_of` finds them. Fields of config.json that `ignore` names are ignored, and those
    that the run which wrote the checkpoint ignores. Raises what `hf_folder_of`, `check_files` and
    `MegatronFolder` raise."""
    if not is_checkpoint(source):
        raise FileNotFoundError(f"{source}: no distributed checkpoint (metadata.json and .metadata)")
    if model is None:
        model, of_run = hf_folder_of(source)
        ignore = dict.fromkeys((*of_run, *ignore))
    shape = ModelShape.from_folder(model, ignore)
    check_files(source)
    return MegatronFolder(source, shape, model, tuple(ignore))
