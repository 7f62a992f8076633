"""Model folders to convert and to spoil, and what the converter says of them: for tests."""

from __future__ import annotations

import json
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import hf_tensors, write_model

from megatron_dgpo.weights.folders import INDEX_FILE

TOKENIZER = {
    "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    "tokenizer_config.json": '{"eos_token": "a"}',
    "chat_template.jinja": "{{ messages }}",
}


def write_folder(folder: Path, **how) -> Path:
    write_model(folder, **how)
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    return folder


def same_tensors(a: Path, b: Path) -> bool:
    one, other = hf_tensors(a), hf_tensors(b)
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8))
        for n in one
    )


def edit(name, change):
    """Replace a tensor of the folder's one file; None takes it away."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = change(tensors.get(name))
        tensors = {n: t for n, t in tensors.items() if n != name} | ({} if new is None else {name: new})
        save_file(tensors, folder / "model.safetensors")

    return spoil


GONE = object()


def config(**fields):
    def spoil(folder: Path) -> None:
        new = json.loads((folder / "config.json").read_text()) | fields
        new = {name: value for name, value in new.items() if value is not GONE}
        (folder / "config.json").write_text(json.dumps(new))

    return spoil


def index(change):
    def spoil(folder: Path) -> None:
        old = json.loads((folder / INDEX_FILE).read_text())
        change(old["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(old))

    return spoil


def cut(name, share=0.5):
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return spoil


def refusal(words, capsys) -> str:
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main([str(word) for word in words])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ")
    return line.removeprefix("error: ")
