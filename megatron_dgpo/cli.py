"""From TOML files and a command line to a checked config, or to one clear line a problem.

Files are composed left to right, then `--section.key value` overrides apply. Nothing here needs
torch, so a wrong setting is refused before a process group or a model exists.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import sys
import time
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_dgpo import torchrun
from megatron_dgpo.checks import Absent, check_all, local_world_size, read_json, replica_size
from megatron_dgpo.config import Config, SFTConfig
from megatron_dgpo.config.algorithms import PRESETS
from megatron_dgpo.jsontext import lone_surrogate
from megatron_dgpo.plan import plan

C = TypeVar("C", Config, SFTConfig)
SHORT_NAMES = {"resume": "run.resume", "quiet": "run.quiet"}
ExtraCheck = Callable[[Any], Iterable[str]]
"""A check that only the caller can make (it needs Megatron, say): problems as "key: message"."""
Inspect = Callable[[Any], Iterable[str]]
"""What the caller finds in the input files, for a dry run: lines. Raises ValueError or OSError."""
_PATIENCE_SECONDS = 20.0
"""How long a rank with a problem leaves the word to rank 0, under torchrun."""


class ConfigError(ValueError):
    """One or more settings are refused; `problems` has a line for each, "key: what is wrong"."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load(
    argv: Sequence[str],
    schema: type[C],
    *,
    extra_checks: Sequence[ExtraCheck] = (),
    world_size: int | None = None,
    inspect: Inspect | None = None,
) -> C:
    """The config of a command line, validated and cross-checked.

    `--help` and `--dry-run` print and raise SystemExit(0); a dry run makes every check first, but forgives
    files that are not there. What it can learn from those that are, `inspect` says.

    Raises:
        ConfigError: with all problems that were found.
        ValueError, OSError: what `inspect` raises.
    """
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(help_text(schema))
        raise SystemExit(0)
    dry_run = "--dry-run" in argv
    raw, problems = compose([a for a in argv if a != "--dry-run"], schema)
    if problems:
        raise ConfigError(problems)
    config: C = validate(raw, schema)
    if world_size is None and "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
    problems = [p for check in extra_checks for p in check(config)]
    # Where both complain of one key, the caller's check knows more.
    told = {p.partition(": ")[0] for p in problems}
    problems += [p for p in check_all(config, world_size) if p.partition(": ")[0] not in told]
    absent: list[str] = [p for p in problems if dry_run and isinstance(p, Absent)]
    if len(problems) > len(absent):
        raise ConfigError([p for p in problems if p not in absent])
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            _print_dry_run(config, world_size, [*(inspect(config) if inspect else []), *_notes(absent)])
        raise SystemExit(0)
    return config


def _notes(absent: Sequence[str]) -> list[str]:
    return [f"not there yet: {problem}" for problem in absent]


def _print_dry_run(config: BaseModel, world_size: int | None, notes: Sequence[str]) -> None:
    """The resolved config, and as comments of it the plan, the data and what is not there yet."""
    lines = list(notes)
    if isinstance(config, Config):
        hf, world_size = read_json(config.model.path / "config.json"), world_size or replica_size(config)
        sizes = hf if isinstance(hf, dict) else None
        lines[:0] = plan(config, world_size, sizes, local=local_world_size(world_size))
    print(dump_toml(config))
    for line in lines:
        print(f"# {line}")


def load_or_exit(
    argv: Sequence[str],
    schema: type[C],
    *,
    extra_checks: Sequence[ExtraCheck] = (),
    inspect: Inspect | None = None,
) -> C:
    """`load` for entry points: rank 0 prints each problem on a line, and every rank exits with 2."""
    with refusals():
        return load(argv, schema, extra_checks=extra_checks, inspect=inspect)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn a ConfigError, or what is wrong with an input file, into lines on stderr and status 2.

    Only for what comes before the process group: ranks do not wait for each other's problems.
    """
    try:
        yield
    except ConfigError as error:
        _refuse(error.problems)
    except (ValueError, OSError) as error:
        _refuse([" ".join(str(error).split())])


def _refuse(problems: Sequence[str]) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if rank and under_torchrun:
        # torchrun ends all ranks once one has failed, rank 0 too if it has not spoken yet. So the others
        # wait to be ended. A problem that rank 0 does not have (a file that one machine lacks) comes out
        # after the wait, from the first rank of that machine.
        time.sleep(_PATIENCE_SECONDS * (1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2))
    if rank == 0 or under_torchrun:
        for problem in problems:
            print(f"error: {f'[rank {rank}] ' if rank else ''}{problem}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun ends its own report, which follows ours on the terminal, with this message.
        message = {"message": "; ".join(problems), "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": message}))
    torchrun.end_agent()  # the next start would be refused as well
    raise SystemExit(2) from None


# --- files and overrides ----------------------------------------------------------------------------


def compose(argv: Sequence[str], schema: type[BaseModel]) -> tuple[dict[str, Any], list[str]]:
    """The nested settings of files and overrides, and what is wrong with the words themselves.

    Values are TOML, but a key of the schema that takes text or a path takes `7` or `2026-01-31` as text.
    """
    literal = {key for key, kind, *_ in keys(schema) if kind in ("text", "path")}
    raw: dict[str, Any] = {}
    problems: list[str] = []
    words = list(argv)
    overrides: list[tuple[str, str | None]] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, inline = word[2:].partition("=")
            follows = bool(words) and not words[0].startswith("--")
            if key in SHORT_NAMES and follows and words[0].endswith(".toml"):
                follows = False  # --resume CONFIG.toml
            value = inline if equals else words.pop(0) if follows else None
            overrides.append((SHORT_NAMES.get(key, key), value))
        else:
            _merge(raw, _read_toml(word, problems))
    for key, value in overrides:
        if value is not None and lone_surrogate(value) is not None:
            problems.append(f"{key}: {value!r} is not UTF-8")
            continue
        parsed = True if value is None else _parse_value(value)
        if key in literal and not isinstance(parsed, str):
            if value is None:
                problems.append(f"{key}: needs a value after it")
            parsed = value
        _set(raw, key, parsed, problems)
    return raw, problems


def _read_toml(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        return parse_toml(Path(path).read_bytes())
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"{path}: {error}")
    return {}


def parse_toml(content: bytes) -> dict[str, Any]:
    """Of a file's bytes, with or without a byte order mark. Raises ValueError where they are no TOML."""
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid TOML ({error})") from None
    except RecursionError:
        raise ValueError("TOML that cannot be read (brackets are nested too deep)") from None
    except ValueError:  # the one other that tomllib raises
        most = sys.get_int_max_str_digits()
        raise ValueError(f"TOML that cannot be read (an integer of more than {most:,} digits)") from None


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is not one (paths and names need no quotes)."""
    try:
        return parse_toml(f"x = {text}".encode())["x"]
    except ValueError:
        return text


def _set(raw: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    *parents, last = key.split(".")
    for name in parents:
        child = raw.setdefault(name, {})
        if not isinstance(child, dict):
            problems.append(f"{key}: {name} is not a section")
            return
        raw = child
    raw[last] = value


# --- validation -------------------------------------------------------------------------------------


def validate(raw: dict[str, Any], schema: type[C]) -> C:
    """Typed settings. Raises ConfigError with a line for each bad, missing or unknown key."""
    algorithm = raw.get("algorithm")
    if isinstance(algorithm, dict) and "algorithm" in schema.model_fields:
        algorithm = {"name": "dgpo", **algorithm}
        preset = copy.deepcopy(PRESETS.get(str(algorithm["name"]), {}))
        _merge(preset, {**raw, "algorithm": algorithm})
        raw = preset
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        # Of a value that is a number or a word, the complaint about the number says what is possible.
        problems = [p for p in error.errors() if not str(p["loc"][-1]).startswith("literal[")]
        raise ConfigError([_line(problem, schema) for problem in problems]) from None


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "tuple_type": "a list",
    "path_type": "a path",
}


def _line(problem: Any, schema: type[BaseModel]) -> str:
    # The tag of a union is part of pydantic's location, but not of the key.
    parts = [str(p) for p in problem["loc"]]
    if parts[:1] == ["algorithm"] and len(parts) > 1 and parts[1] in (*_algorithm_names(), "custom"):
        del parts[1]
    if parts[-1] in ("float", "constrained-float"):
        del parts[-1]
    key, kind, given = ".".join(parts), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _unknown(key, schema, given)
    if kind == "missing":
        return f"{key}: missing, and there is no default"
    if kind == "union_tag_invalid" and not isinstance(given, dict):
        return f"{key}: {given!r} is not a table"
    if kind == "union_tag_invalid":
        names = ", ".join(_algorithm_names())
        return f"{key}.name: {given.get('name')!r} is not one of {names}, or 'package.module:Class'"
    if kind in _EXPECTED:
        return f"{key}: {given!r} is not {_EXPECTED[kind]}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{key}: {given!r}: {message}"


def _unknown(key: str, schema: type[BaseModel], given: Any) -> str:
    known = [k for k, *_ in keys(schema)]
    if key in known:
        return f"{key}: not a setting of this {key.partition('.')[0]}; see its name"
    if "." not in key and isinstance(given, dict):
        sections = list(schema.model_fields)
        near = difflib.get_close_matches(key, sections, n=1) or [f"one of {', '.join(sections)}"]
        return f"{key}: unknown section (did you mean {near[0]}?)"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"{key}: unknown key (" + (f"did you mean {near[0]}?" if near else "--help lists all keys") + ")"


def _algorithm_names() -> list[str]:
    names = [m.model_fields["name"].default for m in _models_in(Config.model_fields["algorithm"].annotation)]
    return [name for name in names if isinstance(name, str)]


# --- help and output --------------------------------------------------------------------------------


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, description) of every setting, in the order of the schema."""
    for name, info in schema.model_fields.items():
        members = _models_in(info.annotation)
        if not members:
            default = "required" if info.is_required() else _toml_value(info.default)
            yield f"{prefix}{name}", _type_name(info.annotation), default, info.description or ""
        rows: dict[str, tuple[str, str, str, str]] = {}
        for member in members:
            for key, kind, default, text in keys(member, f"{prefix}{name}."):
                if key in rows and kind != rows[key][1]:  # the name that tells the members apart
                    kind, default, text = f"{rows[key][1]} | {kind}", *rows[key][2:]
                    rows[key] = key, kind, default, text
                rows.setdefault(key, (key, kind, default, text))
        yield from rows.values()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is typing.Annotated:
        return _models_in(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [m for a in typing.get_args(annotation) for m in _models_in(a)]
    return []


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        of = typing.get_args(annotation)[0]
        kinds = [f"{name}s" for name in _type_name(of).split(" | ")]
        return "list of tables" if _models_in(of) else f"list of {' or '.join(kinds)}"
    if typing.get_origin(annotation) is dict:
        return "table"
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(map(_type_name, typing.get_args(annotation)))
    return {"int": "integer", "float": "number", "bool": "true/false", "str": "text", "Path": "path"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def help_text(schema: type[BaseModel]) -> str:
    module = "train" if schema is Config else "sft"
    lines = [
        f"usage: torchrun --nproc-per-node N -m megatron_dgpo.{module} CONFIG.toml [MORE.toml ...]",
        "                [--section.key VALUE ...] [--resume] [--quiet] [--dry-run] [--help]",
        "",
        "Files are composed left to right, then the overrides apply. A VALUE is TOML, or plain text.",
        "--resume goes on from the last checkpoint in run.folder (short for --run.resume).",
        "--quiet prints results and advisories only, for logs (short for --run.quiet).",
        "--dry-run makes every check, prints the resolved config and the plan, and stops. WORLD_SIZE=N in",
        "the environment stands for N processes; weights, tokenizer and data need not be there, but data",
        "that are there are read.",
    ]
    section = ""
    for key, kind, default, text in keys(schema):
        head = key.partition(".")[0]
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines += [f"  --{key}  <{kind}>  ({default})", f"      {text}"]
    return "\n".join(lines)


def dump_toml(config: BaseModel) -> str:
    """The config as TOML that `load` reads back to an equal one."""
    lines: list[str] = []
    tables = config.model_dump(mode="json")
    for section, values in tables.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {_toml_value(value)}" for name, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
