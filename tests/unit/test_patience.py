"""Waits in tests are guards against hanging, and one environment variable makes all of them longer."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
WAITS = {"wait", "join", "result", "wait_ready", "wait_procs", "wait_until", "communicate"}
A_TEST_OF_A_TIME_OUT = 10
"""Seconds; shorter ones are waited for."""


def seconds_of(call: ast.Call) -> Iterator[float]:
    """The numbers in a call that say how long something may take."""
    given = [word.value for word in call.keywords if word.arg and "timeout" in word.arg]
    if isinstance(call.func, ast.Attribute) and call.func.attr in WAITS:
        given += call.args
    for value in given:
        if isinstance(value, ast.Constant) and isinstance(value.value, int | float):
            yield value.value


def test_waits_are_those_of_patience() -> None:
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(s >= A_TEST_OF_A_TIME_OUT for s in seconds_of(node)):
                found.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    assert not found, "use patience() of tests/patience.py"


@pytest.mark.parametrize(("factor", "printed"), [("", "600 3"), ("1.5", "900 4"), ("0", "expected a factor")])
def test_one_variable_makes_all_waits_longer(factor: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "from patience import patience; print(patience(), patience(2.1))"],
        env={**os.environ, "PYTHONPATH": str(TESTS), "DGPO_TEST_PATIENCE": factor},
        capture_output=True,
        text=True,
    )
    assert printed in done.stdout + done.stderr
