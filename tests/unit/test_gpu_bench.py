"""tools/bench/gpu.py: its table says what passed, failed, took too long or could not be tried."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

TESTS = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "one | two"
@pytest.mark.skip(reason="why not")
def test_elsewhere(): pass
"""

HANGS = "import os, time; open({}, 'w').write(str(os.getpid())); time.sleep(600)"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools" / "bench")
    import gpu

    return gpu


def python(code: str) -> tuple[str, ...]:
    return "-c", code.replace("{", "{{").replace("}", "}}").replace("OUT", "'{out}'")


def test_one_table_for_what_passed_failed_hung_or_is_missing(gpu, tmp_path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    summary = json.dumps({"summary": [["small", "1.5 s"], ["large", "3 s"]]})
    pytest_command = ("-m", "pytest", str(tmp_path / "test_some.py"), "-q", "-p", "no:cacheprovider")
    parts = (
        gpu.Part("tests", (*pytest_command, "--junit-xml", "{out}"), gpu.read_tests),
        gpu.Part("good", python(f"open(OUT, 'w').write({summary!r})"), gpu.read_summary),
        gpu.Part("bad", python("raise SystemExit(3)"), gpu.read_summary),
        gpu.Part("silent", python("pass"), gpu.read_summary),
        gpu.Part(
            "hangs",
            python(HANGS.format(repr(str(tmp_path / "pid")))),
            gpu.read_summary,
            seconds=3.0,
        ),
        gpu.Part("absent", python(""), gpu.read_summary, gpu.without_package("no_such_package.inside")),
    )
    lines, failed = gpu.run_parts(parts, tmp_path, minutes=None)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert failed and [row[:2] for row in cells] == [
        ["tests", "all"], ["", "test_some::test_wrong"], ["good", "small"], ["", "large"],
        ["bad", "all"], ["silent", "all"], ["hangs", "all"], ["absent", "all"],
    ]  # fmt: skip
    results = [row[2] for row in cells]
    assert results[0] == "1 passed, 1 failed, 1 skipped" and "one / two" in results[1]
    assert results[2:4] == ["1.5 s", "3 s"]
    assert results[4].startswith("failed: exit status 3") and results[5].startswith(
        "failed: it left no result"
    )
    assert results[6].startswith("failed: took longer than 3 s")
    assert results[7] == "left out: no_such_package is not installed"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_parts_that_find_no_time_left_are_left_out(gpu, tmp_path) -> None:
    parts = [gpu.Part(name, python("import time; time.sleep(600)"), gpu.read_summary) for name in ("a", "b")]
    started = time.monotonic()
    lines, failed = gpu.run_parts(parts, tmp_path, minutes=0.05)
    assert failed and time.monotonic() - started < 60
    assert "took longer" in lines[2] and "| left out: no time is left |" in lines[3]
