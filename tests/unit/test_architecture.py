"""Who may import whom (ARCHITECTURE.md), read from the source."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import patience

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_dgpo"
SOURCES = sorted(PACKAGE.rglob("*.py"))

SHARED = {"types", "config", "platform"}
PARTS = {"ops", "algorithms", "mcore", "weights", "rollout", "data", "rewards", "evaluation", "observe"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "config": set(),
    "checks": {"config"},
    "plan": {"config"},
    "cli": {"config", "checks", "plan"},
    "patches": set(),
    "platform": {"patches"},
    "ops": {"platform", "types"},
    "algorithms": {"ops", "types", "config"},
    "mcore": SHARED | {"patches"},
    "weights": {"mcore", *SHARED},
    "rollout": SHARED | {"data"},
    "data": {"types", "config"},
    "rewards": {"types", "config"},
    "evaluation": {"rewards", "types"},
    "observe": {"types"},
    "learner": {*PARTS, *SHARED},
    "critic": {*PARTS, *SHARED, "learner"},
    "audit": {*PARTS, *SHARED, "learner"},
    "inputs": {"data", "mcore", "types", "config", "checks", "cli"},
    "entry": {"algorithms", "mcore", "observe", "rewards", "config", "platform", "checks", "cli", "inputs"},
    "run": {*PARTS, *SHARED, "checks", "cli", "learner", "critic"},
    "trainer": {*PARTS, *SHARED, "inputs", "learner", "audit", "run"},
    "coldstart": {*PARTS, *SHARED, "inputs", "learner", "run"},
    "train": {"config", "observe", "inputs", "entry", "run", "trainer"},
    "sft": {"config", "data", "observe", "inputs", "entry", "learner", "run", "coldstart"},
    "__init__": set(),
}
"""Room -> other rooms of the package that it may import, beside `LEAVES`."""
LEAVES = {"jsontext", "progress", "hostmemory", "torchrun"}
"""Import nothing of the package, and may be imported by all."""
PURE = {"types", "config", "jsontext", "torchrun", "checks", "plan", "cli", "weights.names"}
PURE |= {"mcore.fields", "mcore.field_types", "mcore.hf_config", "mcore.hf_fields"}
"""Need the standard library and pydantic alone."""
NAMES_MEGATRON = {"platform", "patches", "mcore"}
WITHOUT_MEGATRON = ("ops", "algorithms", "rewards", "data", "evaluation")


def parse(source: str) -> ast.Module:
    """ast.parse without garbage collection: in Python 3.11 a finalizer that parses too, as one that prints
    a traceback does, makes it raise SystemError (python/cpython issue 106905)."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def module_name(path: Path) -> str:
    """`mcore.policy` for megatron_dgpo/mcore/policy.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(imported module, line), wherever it stands, except for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(body=node.orelse, type_ignores=[]))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide what they name"
            assert node.module is not None
            if node.module == "megatron_dgpo":  # from megatron_dgpo import platform
                yield from ((f"megatron_dgpo.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno
        else:
            yield from imports(node)


def imported_rooms(source: str, own: str) -> set[str]:
    """Rooms of the package, other than its own, that a source imports."""
    names = [name for name, _ in imports(parse(source)) if name.startswith("megatron_dgpo.")]
    return {name.split(".")[1] for name in names} - {own}


def third_party(source: str) -> set[str]:
    tops = {name.split(".")[0] for name, _ in imports(parse(source))}
    return tops - set(sys.stdlib_module_names) - {"megatron_dgpo"}


def ids(paths: list[Path]) -> list[str]:
    return [module_name(path) for path in paths]


def test_every_room_has_its_rule() -> None:
    rooms = {room(module_name(path)) for path in SOURCES}
    assert rooms == set(MAY_IMPORT) | LEAVES
    # No room is above another one and below it.
    for name, allowed in MAY_IMPORT.items():
        for other in allowed:
            assert name not in MAY_IMPORT[other], (name, other)


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_imports_go_downward(path: Path) -> None:
    module, source = module_name(path), path.read_text()
    allowed = set() if room(module) in LEAVES else MAY_IMPORT[room(module)] | LEAVES
    assert imported_rooms(source, room(module)) <= allowed
    outside = third_party(source)
    if module != "rollout.sglang.launcher":  # which SGLang's own interpreter runs, and no other
        assert "sglang" not in outside
    assert not outside & {"examples", "tools", "tests", "trl"}
    if module in PURE:
        assert outside <= {"pydantic"}
    if room(module) not in NAMES_MEGATRON:
        assert "megatron" not in outside
    if room(module) == "ops":
        assert outside <= {"torch", "triton"}


@pytest.mark.parametrize("module", ["patches.py", "platform.py"])
def test_megatron_is_named_inside_functions_only(module: str) -> None:
    top = parse((PACKAGE / module).read_text()).body
    names = [n for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for n, _ in
             imports(ast.Module(body=[node], type_ignores=[]))]  # fmt: skip
    assert "torch" in names and not [n for n in names if n.startswith("megatron.")]


def test_weight_names_import_nothing_of_the_package() -> None:
    assert imported_rooms((PACKAGE / "weights" / "names.py").read_text(), own="") == set()


def test_the_reader_of_imports_sees_what_it_should() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport os, torch.nn\nfrom megatron_dgpo import platform\n"
        "if TYPE_CHECKING:\n    import sglang\n"
        "def f():\n    try:\n        from megatron_dgpo.ops.eager import x\n"
        "    finally:\n        import megatron.core\n"
    )
    assert imported_rooms(source, "mcore") == {"platform", "ops"}
    assert third_party(source) == {"torch", "megatron"}


def test_recipes_and_tools_import_the_package_and_not_the_reverse() -> None:
    for path in [*(ROOT / "examples").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for name, line in imports(parse(path.read_text())):
            assert name.split(".")[0] not in {"examples", "tools", "tests"}, f"{path}:{line}"


def test_parts_work_with_neither_megatron_nor_sglang() -> None:
    names = ", ".join(f"megatron_dgpo.{name}" for name in WITHOUT_MEGATRON)
    code = (
        "import sys\nsys.modules['megatron'] = sys.modules['sglang'] = None\n"
        f"import {names}\n"
        "try:\n    import megatron_dgpo.mcore.model\nexcept ImportError:\n    print('blocked')\n"
        "print(megatron_dgpo.rewards.build_reward('exact_match').canonical_answer('7'))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=patience(),
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["blocked", "7"]


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 500
    for node in ast.walk(parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, node.name
