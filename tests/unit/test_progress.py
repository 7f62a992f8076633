"""Long work shows how far it is: a bar on a terminal, lines in a log, nothing in a quiet run."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest

from megatron_dgpo.observe.console import Console
from megatron_dgpo.progress import BYTES, describe, progress, speaks, waits, watched

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("rollout", 0, 8192, "samples", 30.0), "rollout: 0 of 8,192 samples in 30 s"),
        (
            ("rollout", 1200, 8192, "samples", 300.4),
            "rollout: 1,200 of 8,192 samples in 5 min 0 s, 4.0 per second, about 29 min 10 s left",
        ),
        (
            ("update", 3, 40, "micro-batches", 90.0),
            "update: 3 of 40 micro-batches in 1 min 30 s, 2.0 per minute, about 18 min 30 s left",
        ),
        (
            ("cold start", 2, 100, "steps", 7200.0),
            "cold start: 2 of 100 steps in 2 h 0 min, 1.0 per hour, about 4 d 2 h left",
        ),
        (("reading", 120_000, None, "rows", 60.0), "reading: 120,000 rows in 1 min 0 s, 2,000.0 per second"),
        (("saving", 0, None, "", 3661.0), "saving: 1 h 1 min"),
        (
            ("import", 13 * 10**9, 65 * 10**9, BYTES, 60.0),
            "import: 13.0 of 65.0 GB in 1 min 0 s, 13.0 GB per minute, about 4 min 0 s left",
        ),
        (("rollout", 8, 8, "samples", 2.0), "rollout: 8 of 8 samples in 2 s, 4.0 per second"),
    ],
)
def test_a_line(given: tuple[Any, ...], line: str) -> None:
    assert describe(*given) == line


def test_what_was_done_before_is_no_speed() -> None:
    line = describe("cold start", 60, 100, "steps", 100.0, initial=50)
    assert line == "cold start: 60 of 100 steps in 1 min 40 s, 6.0 per minute, about 6 min 40 s left"


def test_lines_come_after_half_a_minute_and_then_less_often() -> None:
    assert list(islice(accumulate(waits(30.0)), 7)) == [30, 90, 210, 450, 750, 1050, 1350]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> Callable[[], list[str]]:
    """What stderr got, of work whose first line comes after a hundredth of a second."""
    monkeypatch.setenv("DGPO_PROGRESS_SECONDS", "0.01")
    return lambda: capsys.readouterr().err.splitlines()


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("quiet", "rank", "shown"), [(False, 0, True), (True, 0, False), (False, 1, False)])
def test_a_phase_in_a_log(lines: Callable[[], list[str]], quiet: bool, rank: int, shown: bool) -> None:
    with Console(quiet, rank).phase("rollout", 4, "samples") as bar:
        bar.update()
        if shown:  # nothing more is done, and still it speaks
            found: list[str] = []
            until(lambda: len(found.extend(lines()) or found) >= 2 and " 1 of 4 " in found[-1])
            bar.update(3)
        else:
            time.sleep(0.05)
    after = lines()
    if shown:
        assert re.fullmatch(
            r"rollout: 1 of 4 samples in [0-9]+ s, [0-9.]+ per (second|minute), about [0-9]+ s left",
            found[-1],
        )
        assert re.fullmatch(
            r"rollout: done, 4 of 4 samples in [0-9]+ s, [0-9.]+ per (second|minute)", after[-1]
        )
        assert not any("\r" in line for line in found + after)
    else:
        assert after == []


def test_short_or_failed_work_says_nothing_at_its_end(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    with pytest.raises(RuntimeError), progress("work", shown=True):
        until(lambda: bool(found.extend(lines()) or found))
        raise RuntimeError
    assert not any("done" in line for line in found + lines())
    monkeypatch.setenv("DGPO_PROGRESS_SECONDS", "30")
    assert list(watched([1, 2], "items")) == [1, 2]
    with progress("work", shown=True):
        pass
    assert lines() == []


def test_a_setting_that_is_no_number_is_named_and_passed_over(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DGPO_PROGRESS_SECONDS", "soon")
    for _ in range(2):
        with progress("work", shown=True):
            until(lambda: bool(caplog.messages))
    assert caplog.messages == ["DGPO_PROGRESS_SECONDS: 'soon' is no number above 0; it is 30 now"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_on_a_terminal_once_work_is_long(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    monkeypatch.setattr("megatron_dgpo.progress.DELAY_SECONDS", 0.15)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console = Console(quiet, 0)
    with console.phase("generate", 4) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""
    with console.phase("generate", 4) as bar:
        time.sleep(0.25)
        bar.update(2)
    error = capsys.readouterr().err
    assert ("generate" in error and "2/4" in error) == (not quiet)
    assert bool(error) == (not quiet)
    # Lines of work without counts, or beside a bar.
    monkeypatch.setenv("DGPO_PROGRESS_SECONDS", "0.01")
    for work in (progress("saving", shown=not quiet), progress("scoring", 3, shown=not quiet, bar=False)):
        with work:
            time.sleep(0.05)
        error = capsys.readouterr().err
        assert bool(re.search("saving: [0-9]+ s\n|scoring: 0 of 3 in [0-9]+ s\n", error)) == (not quiet), (
            error
        )


def test_parts_below_the_run_speak_where_its_notes_are_shown(
    lines: Callable[[], list[str]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Reading data and scoring have no console: the level of the package's log decides."""
    from megatron_dgpo.data.problems import read_problems
    from megatron_dgpo.rewards.pool import call_here

    def slow(**_: Any) -> dict[str, Any]:
        time.sleep(0.03)
        return {}

    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p", "answer": "1"}\n' * 3)
    for level in (logging.INFO, logging.WARNING):
        caplog.set_level(level, logger="megatron_dgpo")
        assert speaks() == (level == logging.INFO)
        for _ in read_problems([path], prompt_key="prompt", answer_key="answer"):
            time.sleep(0.03)
        call_here(slow, [{}] * 3)
        found = lines()
        if level == logging.INFO:
            assert any(re.match(rf"reading {path}: [0-2] rows in [0-9]+ s", line) for line in found)
            assert any(re.match(r"scoring: [0-2] of 3 responses in [0-9]+ s", line) for line in found)
        else:
            assert found == []
