"""Model folders: what a Hugging Face folder holds, checked, and folders that appear only when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dgpo import jsontext
from megatron_dgpo.mcore.files import FILES_FILE, flush_to_disk

TensorSource = Callable[[str], Tensor]
INDEX_FILE = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_WEIGHT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_BESIDE_WEIGHTS = (".json", ".jinja", ".txt", ".model")
_OF_CHECKPOINTS = (FILES_FILE, "metadata.json", "run_state.json")


# --- Hugging Face folders -------------------------------------------------------------------------------


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> safetensors file of the folder, with one file or several and an index.

    Raises:
        FileNotFoundError: the folder has no safetensors, or lacks a file of its index.
        ValueError: naming a file that is cut off or damaged, or a tensor on which index and files disagree.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / ONE_FILE).is_file():
            raise FileNotFoundError(f"{folder}: neither {ONE_FILE} nor {INDEX_FILE} is there")
        return dict.fromkeys(_names(folder / ONE_FILE), ONE_FILE)
    try:
        listed = dict(jsontext.loads(index.read_bytes())["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error})") from error
    files = sorted(set(listed.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder}: {missing[0]} is listed in the index but is not there")
    held = {file: set(_names(folder / file)) for file in files}
    for name, file in listed.items():
        if name not in held[file]:
            raise ValueError(f"{folder}: the index has {name} in {file}, which does not hold it")
    for file, names in held.items():
        if extra := sorted(name for name in names if listed.get(name) != file):
            raise ValueError(f"{folder}: {file} holds {extra[0]}, which the index does not have there")
    return listed


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as f:
            return list(f.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off or damaged ({error})") from error


def tensor_reader(folder: Path, files: dict[str, str]) -> TensorSource:
    """Reads one tensor; its numbers stay in the file until they are used."""

    def read(name: str) -> Tensor:
        with safe_open(folder / files[name], framework="pt") as f:
            return f.get_tensor(name)

    return read


def describe(folder: Path, files: dict[str, str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> (shape, safetensors' name of its dtype), without reading any numbers."""
    out: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as f:
            for name in f.keys():
                view = f.get_slice(name)
                out[name] = tuple(view.get_shape()), view.get_dtype()
    return out


def weight_dtype(folder: Path, tensors: dict[str, tuple[tuple[int, ...], str]]) -> torch.dtype:
    """The one dtype of all tensors, which config.json has to agree with where it names one.

    Raises ValueError naming a tensor of another dtype than the rest, or the field.
    """
    names: dict[str, str] = {}
    for name, (_, dtype) in sorted(tensors.items()):
        names.setdefault(dtype, name)
    if unknown := [dtype for dtype in names if dtype not in _WEIGHT_DTYPES]:
        kinds = " or ".join(_WEIGHT_DTYPES)
        raise ValueError(f"{folder}: {names[unknown[0]]} is {unknown[0]}; weights are {kinds}")
    if len(names) > 1:
        (one, first), (other, second) = list(names.items())[:2]
        raise ValueError(f"{folder}: {first} is {one} and {second} is {other}; all must be of one dtype")
    (found,) = names
    given = config_dtype(folder)
    if given is not None and getattr(torch, given, None) is not _WEIGHT_DTYPES[found]:
        raise ValueError(f"{folder}: config.json says {given}, and {names[found]} is {found}")
    return _WEIGHT_DTYPES[found]


def config_dtype(folder: Path) -> str | None:
    config = _config(folder)
    given = config.get("dtype") or config.get("torch_dtype")
    return given if given != "auto" else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = jsontext.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return config


# --- what is written ------------------------------------------------------------------------------------


def copy_beside_weights(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy the configuration and the tokenizer's files; config.json last, and with the weights' dtype."""
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and path.suffix in _BESIDE_WEIGHTS and "safetensors" not in path.name
        if wanted and path.name not in ("config.json", *_OF_CHECKPOINTS):
            shutil.copy(path, target / path.name)
    content = (source / "config.json").read_bytes()
    name = str(dtype).removeprefix("torch.")
    if config_dtype(source) not in (None, name):
        config = _config(source)
        config = {k: name if k in ("dtype", "torch_dtype") else v for k, v in config.items()}
        content = (json.dumps(config, indent=2) + "\n").encode()
    (target / "config.json").write_bytes(content)


@contextmanager
def complete_or_absent(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which gets the name `target` when the block ends without an error.

    Until then it is called `.<target>.dgpo-partial`, and a `target` that is there stays as it is. What a
    killed process left behind is cleaned up first.

    Raises what `check_target` raises, the last time before the folder gets its name.
    """
    check_target(target, overwrite=overwrite)
    target = target.resolve()  # of a link, what it points to is replaced
    partial, old = _private(target)
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_to_disk(partial, contents=True)
        check_target(target, overwrite=overwrite)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException:  # an end by a signal among them
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(target)
        raise
    flush_to_disk(target.parent, contents=False)
    shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError for a target that is there, without `overwrite`, or is no folder.

    Nothing is removed, and nothing renamed but this: a target that a process killed between two renames
    was replacing gets its name back.
    """
    _put_back(target.resolve())
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already (--overwrite replaces it)")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is not a folder")


def _put_back(target: Path) -> None:
    _, old = _private(target)
    if old.exists() and not target.exists():
        os.rename(old, target)


def _private(target: Path) -> tuple[Path, Path]:
    """Names for `target` while it is written, and while it is replaced, which nobody else's folder has."""
    partial, old = (target.with_name(f".{target.name}.dgpo-{what}") for what in ("partial", "old"))
    return partial, old
