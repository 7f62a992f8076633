"""Every field of Megatron's dataclasses that a config may set: taken as what the class expects, or refused by
name."""

from __future__ import annotations

import ast
import importlib
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from tiny import write_model

from megatron_dgpo.cli import validate
from megatron_dgpo.config import Config
from megatron_dgpo.mcore import fields
from megatron_dgpo.mcore.field_types import enum_members

OBJECTS = ("Callable", "ContextManager", "RecipeConfig")
"""Types of which a config has no value."""


def texts(of: fields.PassedThrough, type_: str) -> Iterator[Any]:
    """Values that a config may write for a type found apart from `read`."""
    for node in ast.walk(ast.parse(type_, mode="eval")):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            yield from (ast.literal_eval(part) for part in getattr(node.slice, "elts", [node.slice]))
        elif isinstance(node, ast.Name):
            yield from enum_members(of.module, node.id)
    if "torch.dtype" in type_:
        yield from ("float32", "bfloat16", "float16", "uint8")
    yield from {"bool": [True], "int": [3], "float": [0.5, 2], "str": ["a"]}.get(type_, [])
    if "list" in type_.lower():
        yield [1, 2] if "int" in type_ else ["a", "b"]
    if type_ in ("Optional[int]", "Optional[float]", "Optional[str]", "Optional[bool]"):
        yield {"int": 3, "float": 0.5, "str": "a", "bool": True}[type_.removeprefix("Optional[")[:-1]]
    if type_ == "Tuple[str, ...]":
        yield ["a", "b"]


@pytest.mark.parametrize("of", fields.PASSED_THROUGH, ids=lambda of: of.section)
def test_every_field(of: fields.PassedThrough) -> None:
    """Texts become members of enumerations, precisions or one of the words that the field knows; what a field
    cannot hold is refused by its name. pydantic judges the values by the class's own annotations."""
    cls = getattr(importlib.import_module(of.module), of.cls)
    hints = typing.get_type_hints(cls)
    types = of.types()
    assert list(types) == [field.name for field in cls.__dataclass_fields__.values()]
    for key, type_ in types.items():
        given = list(texts(of, type_))
        if of.refusal(key) is not None or type_.startswith(OBJECTS) or not given:
            assert of.refusal(key) is not None or any(name in type_ for name in OBJECTS), (key, type_)
            for value in (*given, "any", 1):
                (line,) = of.problems({key: value})
                assert line.startswith(f"{of.section}.{key}: "), line
            continue
        hint = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
        for value in given:
            assert list(of.problems({key: value})) == [], (key, value)
            hint.validate_python(of.values({key: value})[key], strict=True)
        lists = () if type_.startswith("Tuple") else ([], [{}])  # a config's lists become tuples
        for wrong in ("no such value", 17.25, -1, {"a": 1}, *lists):
            try:
                hint.validate_python(wrong, strict=True)
            except ValidationError:
                (line,) = of.problems({key: wrong})
                assert line.startswith(f"{of.section}.{key}: {wrong!r} is not "), line
                with pytest.raises(ValueError, match=rf"^{of.section}\.{key}: "):
                    of.values({key: wrong})


def test_names_become_what_they_name() -> None:
    from megatron.core.transformer.enums import AttnBackend

    assert fields.TRANSFORMER.values({"attention_backend": "flash"}) == {
        "attention_backend": AttnBackend.flash
    }
    assert fields.OPTIMIZER.values({"exp_avg_dtype": "bfloat16"}) == {"exp_avg_dtype": torch.bfloat16}
    given = {"recompute_modules": ["mlp"], "num_layers_in_first_pipeline_stage": 1}
    assert fields.TRANSFORMER.values(given) == given


def test_what_megatron_refuses_together(tmp_path: Any) -> None:
    """Megatron's own checks, before any process group: each is a line that names the section."""
    from megatron_dgpo.mcore.settings import refused_by_megatron

    path = str(write_model(tmp_path / "model", tied=True))
    raw = {
        **{"data": {"train": ["a"]}, "reward": {"name": "exact_match"}, "optimizer": {"lr": 1e-3}},
        "train": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "prompts_per_minibatch": 1},
    }
    right = validate({**raw, "model": {"path": path}}, Config)
    assert list(refused_by_megatron(right)) == []
    wrong = validate(
        {
            **raw,
            "model": {
                "path": path,
                "transformer": {"recompute_granularity": "full", "attention_backend": "flash"},
            },
            "optimizer": {"lr": 1e-3, "megatron": {"optimizer_offload_fraction": 2.0}},
        },
        Config,
    )
    lines = list(refused_by_megatron(wrong))
    assert lines[0].startswith(
        "model.transformer.attention_backend: only Transformer Engine's layers read it"
    )
    assert lines[1].startswith("model.transformer: Megatron refuses these settings: ")
