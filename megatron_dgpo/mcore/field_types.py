"""The fields of a dataclass of Megatron-Core, read from its source, and the values that a config can give.

Importing Megatron takes seconds, and a wrong setting should be refused at once. Where its source is not a
plain dataclass, the class itself is imported and asked.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import importlib.util
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


class _NotPlain(Exception):
    """The source alone does not tell the fields."""


@functools.cache
def field_types(module: str, cls: str) -> dict[str, str]:
    """The fields of a dataclass in order, those of its bases first, with their types as text.

    Raises ImportError where the module or the class is not there.
    """
    try:
        return dict(fields_in_source(module, cls))
    except (_NotPlain, OSError, SyntaxError):
        pass  # the class knows
    found = getattr(importlib.import_module(module), cls, None)
    if found is None:
        raise ImportError(f"{module} has no {cls}")
    return {f.name: type_text(f.type) for f in dataclasses.fields(found)}


def type_text(type_: Any) -> str:
    """A type as sources write it, without the names of modules other than torch's."""
    if isinstance(type_, str):
        return type_
    if isinstance(type_, type) and not typing.get_args(type_):
        return type_.__qualname__
    return str(type_).replace("typing.", "")


@functools.cache
def enum_members(module: str, name: str) -> tuple[str, ...]:
    """The members of an enumeration that a module defines or imports, in order; none where `name` is
    something else."""
    try:
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
        home = _where(name, tree, module)
        if home != module:
            return enum_members(home, name)
        (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        if [ast.unparse(base) for base in found.bases] in (["enum.Enum"], ["Enum"]):
            targets = [node.targets for node in found.body if isinstance(node, ast.Assign)]
            return tuple(of[0].id for of in targets if isinstance(of[0], ast.Name))
    except (_NotPlain, OSError, SyntaxError, ValueError):
        pass  # the module knows
    found_ = getattr(importlib.import_module(module), name, None)
    return tuple(found_.__members__) if isinstance(found_, enum.EnumMeta) else ()


def enum_class(module: str, name: str) -> Any:
    """The enumeration of that name, as a module that uses it has it."""
    return getattr(importlib.import_module(module), name)


# --- values -------------------------------------------------------------------------------------------

DTYPE = "torch.dtype"
_DTYPES = ("float32", "bfloat16", "float16", "uint8")
_PLAIN = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
}


@dataclasses.dataclass(frozen=True)
class Named:
    """What a config writes as text and Megatron holds as an object."""

    of: str
    """DTYPE (a precision), or the name of the enumeration that it is a member of."""
    name: str


class NotThis(ValueError):
    """The value is not what the field takes; the message says what it takes."""


def read(value: Any, type_: str, members: Callable[[str], tuple[str, ...]]) -> Any:
    """A value of a config as a field of this type holds it, with `Named` in place of objects.

    `members`: the members of the enumeration of a name. Raises NotThis.
    """
    expected: list[str] = []
    for kind in _alternatives(ast.parse(type_, mode="eval").body):
        try:
            return _read(value, kind, members)
        except NotThis as error:
            expected += [text for text in (str(error),) if text and text not in expected]
    if not expected:
        raise NotThis(f"{value!r} cannot be given: a config has no value of the type {type_}")
    raise NotThis(f"{value!r} is not {' or '.join(expected)}")


def made(value: Any, enumeration: Callable[[str], Any]) -> Any:
    """A value that `read` returned, with the objects themselves in place of `Named`."""
    if isinstance(value, (list, tuple)):
        return type(value)(made(item, enumeration) for item in value)
    if not isinstance(value, Named):
        return value
    if value.of == DTYPE:
        return getattr(importlib.import_module("torch"), value.name)
    return enumeration(value.of)[value.name]


def _alternatives(kind: ast.expr) -> Iterator[ast.expr]:
    """What a type may be: the members of unions, without None, which TOML does not have."""
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) in ("Optional", "Union"):
        yield from (one for part in _arguments(kind) for one in _alternatives(part))
    elif isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        yield from (one for part in (kind.left, kind.right) for one in _alternatives(part))
    elif ast.unparse(kind) not in ("None", "NoneType"):
        yield kind


def _arguments(kind: ast.Subscript) -> list[ast.expr]:
    return kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]


def _read(value: Any, kind: ast.expr, members: Callable[[str], tuple[str, ...]]) -> Any:
    """Raises NotThis with what is expected, which is empty where no config can write it."""
    text = ast.unparse(kind)
    if text in _PLAIN:
        accepted, expected = _PLAIN[text]
        return _of(value, type(value) in accepted, expected)
    if text in (DTYPE, "dtype"):
        name = _of(value, type(value) is str and value in _DTYPES, _one_of(_DTYPES))
        return Named(DTYPE, name)
    if text == "list":
        return _of(value, type(value) is list, "a list")
    if isinstance(kind, ast.Subscript):
        return _read_many(value, kind, members)
    if isinstance(kind, ast.Name) and (names := members(text)):
        return Named(text, _of(value, type(value) is str and value in names, _one_of(names)))
    raise NotThis("")


def _read_many(value: Any, kind: ast.Subscript, members: Callable[[str], tuple[str, ...]]) -> Any:
    of, parts = ast.unparse(kind.value), _arguments(kind)
    if of == "Literal":
        choices = [ast.literal_eval(part) for part in parts]
        same = [choice for choice in choices if type(choice) is type(value) and choice == value]
        return _of(value, bool(same), _one_of([str(choice) for choice in choices]))
    if of not in ("List", "list", "Tuple", "tuple"):
        raise NotThis("")
    same_kind = of in ("List", "list") or ast.unparse(parts[-1]) in ("...", "Ellipsis")
    if type(value) is not list or (not same_kind and len(value) != len(parts)):
        raise NotThis("a list" if same_kind else f"a list of {len(parts)}")
    kinds = [ast.unparse(parts[0])] * len(value) if same_kind else [ast.unparse(part) for part in parts]
    items = [read(item, one, members) for item, one in zip(value, kinds, strict=True)]
    return items if of in ("List", "list") else tuple(items)


def _of(value: Any, right: bool, expected: str) -> Any:
    if not right:
        raise NotThis(expected)
    return value


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else names[0]


# --- sources ------------------------------------------------------------------------------------------


def _source(module: str) -> Path:
    """The file of a module, found without importing the packages that it is in, as `find_spec` would."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec and spec.submodule_search_locations) or ():
        if parts and Path(folder, parts[0]).is_dir():  # a namespace package may have several folders
            return Path(folder, *parts).with_suffix(".py")
    raise _NotPlain(module)


def fields_in_source(module: str, cls: str) -> Iterator[tuple[str, str]]:
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    if len(found) != 1 or not _is_plain(found[0]):
        raise _NotPlain(f"{module}.{cls}")
    for base in reversed(found[0].bases):  # a later base's fields come first
        if not isinstance(base, ast.Name):
            raise _NotPlain(f"{module}.{cls}")
        yield from fields_in_source(_where(base.id, tree, module), base.id)
    for node in found[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            type_ = ast.unparse(node.annotation)
            if isinstance(node.annotation, ast.Constant) or "ClassVar" in type_ or "InitVar" in type_:
                raise _NotPlain(f"{module}.{cls}.{node.target.id}")
            yield node.target.id, type_


def _is_plain(node: ast.ClassDef) -> bool:
    """@dataclass, or @dataclass(...), and nothing else that could change which fields there are."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    if [ast.unparse(d) for d in decorators] not in (["dataclass"], ["dataclasses.dataclass"]):
        return False
    simple = (ast.AnnAssign, ast.Expr, ast.FunctionDef, ast.Pass)
    return not node.keywords and all(isinstance(statement, simple) for statement in node.body)


def _where(name: str, tree: ast.Module, module: str) -> str:
    """The module that defines a name which this one uses."""
    if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
        return module
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [a.asname or a.name for a in node.names]:
            if any(a.asname == name for a in node.names):
                break
            parent = module.split(".")[: -node.level] if node.level else []
            return ".".join([*parent, *([node.module] if node.module else [])])
    raise _NotPlain(f"{module}: {name}")
