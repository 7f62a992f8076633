"""Runs tests/gpu and the benches on this machine's GPU, one after the other, and prints one table.

    python tools/bench/gpu.py [--minutes 10] [--out FOLDER]

A part that fails, takes too long or lacks something is a row that says so, and the others go on; the exit
status is then 1 (0 where parts were only left out). FOLDER takes the table, each part's log and its numbers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT, RunFailed, run

from megatron_dgpo.observe.machine import describe_machine

Row = tuple[str, str]
"""(What, result)."""


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    """Without the interpreter. {out} stands for the file that it writes."""
    read: Callable[[Path], list[Row]]
    """Rows from that file; raises Failed where they say that the part did."""
    lacks: Callable[[], str] = lambda: ""
    """What this machine has not, if anything."""
    seconds: float = 1800.0
    """As long as it may take."""


class Failed(Exception):
    """A part that ended badly, with what it has to say."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(rows)
        self.rows = rows


def read_summary(file: Path) -> list[Row]:
    return [(what, result) for what, result in json.loads(file.read_text())["summary"]]


def read_tests(file: Path) -> list[Row]:
    """Raises Failed naming the tests that failed."""
    rows: list[Row] = []
    passed, skipped = 0, 0
    for case in xml.etree.ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("skipped") is not None:
            skipped += 1
        elif (bad := case.find("failure")) is not None or (bad := case.find("error")) is not None:
            rows.append((name, f"failed: {_short(bad.get('message', ''))}"))
        else:
            passed += 1
    rows.insert(0, ("all", f"{passed} passed, {len(rows)} failed, {skipped} skipped"))
    if len(rows) > 1 or not passed:
        raise Failed(rows)
    return rows


def without_package(name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else f"{name} is not installed"


def without_file(path: Path, how: str) -> Callable[[], str]:
    return lambda: "" if path.exists() else f"{path.relative_to(ROOT)} is not there ({how})"


BENCH = "tools/bench/"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
PARTS = (
    Part("tests/gpu", ("-m", "pytest", "tests/gpu", "-q", "--junit-xml", "{out}"), read_tests),
    Part("the loss", (BENCH + "token_stats.py", "--json", "{out}"), read_summary),
    Part(
        "attention",
        (BENCH + "attention.py", "--json", "{out}"),
        read_summary,
        without_package("megatron.core"),
    ),
    Part(
        "a whole update",
        (BENCH + "step.py", "--json", "{out}"),
        read_summary,
        without_package("megatron.core"),
    ),
    Part(
        "a weight sync",
        (BENCH + "weight_sync.py", "--json", "{out}"),
        read_summary,
        without_file(ROOT / ".venv-sglang" / "bin" / "python", "SGLang's environment"),
    ),
    Part(
        "recording credit",
        (*TORCHRUN, BENCH + "recording.py", "--json", "{out}"),
        read_summary,
        without_file(ROOT / "runs" / "quickstart" / "seed1" / "coldstart" / "hf", "make quickstart"),
    ),
)


def run_part(part: Part, folder: Path, limit: float) -> list[Row]:
    """Its rows. Raises Failed."""
    stem = part.name.replace(" ", "-").replace("/", "-")
    file = folder / f"{stem}.out"
    command = [sys.executable, *(word.format(out=file) for word in part.command)]
    try:
        said = run(command, folder / f"{stem}.log", 1, limit, {"DGPO_TEST_GPU": "1"})
        (folder / f"{stem}.txt").write_text(said)
    except RunFailed as error:
        if file.exists() and part.read is read_tests:  # pytest's status is 1 where a test failed
            return part.read(file)
        raise Failed([("all", f"failed: {_short(str(error))}")]) from None
    try:
        return part.read(file)
    except (OSError, ValueError, KeyError) as error:
        raise Failed([("all", f"failed: it left no result ({_short(repr(error))})")]) from None


def run_parts(parts: Sequence[Part], folder: Path, minutes: float | None) -> tuple[list[str], bool]:
    """Lines of the table, and whether a part failed."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    lines, failed = ["| part | | result | seconds |", "|---|---|---|---|"], False
    for part in parts:
        left = part.seconds if end is None else min(part.seconds, end - time.monotonic())
        missing = _lacks(part) or ("" if left > 1 else "no time is left")
        started = time.monotonic()
        if missing:
            rows = [("all", f"left out: {missing}")]
        else:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            try:
                rows = run_part(part, folder, left)
            except Failed as error:
                rows, failed = error.rows, True
        spent = "" if missing else f"{time.monotonic() - started:.0f}"
        for n, (what, result) in enumerate(rows):
            lines.append(f"| {part.name if n == 0 else ''} | {what} | {result} | {spent if n == 0 else ''} |")
    return lines, failed


def _lacks(part: Part) -> str:
    try:
        return part.lacks()
    except ModuleNotFoundError as error:  # the package above the one that is looked for
        return f"{error.name} is not installed"


def _short(text: str) -> str:
    """One line that a table's cell can hold."""
    return " ".join(text.replace("|", "/").split())[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for all parts together")
    now = datetime.datetime.now()
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / f"gpu-{now:%Y%m%d-%H%M%S}")
    args = parser.parse_args()
    found = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"],
                           capture_output=True, text=True)  # fmt: skip
    if found.stdout.strip() != "True":
        sys.exit("error: torch finds no GPU here")
    folder = args.out.resolve()
    folder.mkdir(parents=True)
    lines, failed = run_parts(PARTS, folder, args.minutes)
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine.pop("versions").items())
    head = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items())
    table = "\n".join([f"{head}; {versions}", "", *lines]) + "\n"
    (folder / "table.md").write_text(table)
    print(table + f"\nlogs and numbers are in {folder}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
