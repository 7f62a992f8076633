"""Metrics on W&B, in its offline mode: what it wrote is read back from its own file."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import patience
from place import Place

from megatron_dgpo.cli import load
from megatron_dgpo.config import Config, ObserveConfig
from megatron_dgpo.entry import _wandb
from megatron_dgpo.observe.metrics import MetricsWriter, read_metrics
from megatron_dgpo.observe.wandb_run import WandbRun

wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; a record, or part of one, is a
    checksum, a length, a kind and the bytes) behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def written(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Rows and run records, over all starts of a run."""
    rows, runs = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                rows.append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
            elif record.HasField("run"):
                runs.append(record.run)
    return rows, runs


START = """
import math, sys
from pathlib import Path
from megatron_dgpo.observe.metrics import MetricsWriter
from megatron_dgpo.observe.wandb_run import WandbRun
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run = WandbRun(folder, "project", {"train": {"steps": 9}, "model": {"path": "m"}})
with MetricsWriter(folder, tensorboard=False, wandb=run) as writer:
    for step in range(first, last):
        writer.write(step, {"loss": math.sin(step) / 3, "time/step": 0.1 * step, "bad": math.nan})
        if step == 3:
            writer.write(step, {"avg@8": 0.25}, phase="eval")
"""


def command(folder: Path, first: int, last: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [sys.executable, "-c", START, str(folder), str(first), str(last)]


def variables(folder: Path, **more: str) -> dict[str, str]:
    root = Path(__file__).parents[2]
    own = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(root)}
    return own | {"WANDB_ERROR_REPORTING": "false"} | more


def start(folder: Path, first: int, last: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, first, last),
        capture_output=True, text=True, timeout=patience(), env=variables(folder, **environment),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_what_wandb_holds_is_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    """A run and its resumption go on in one W&B run."""
    folder = tmp_path / "my run"
    for first, last in ((0, 4), (4, 6)):
        done = start(folder, first, last, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    rows, runs = written(folder)
    known = json.loads((folder / "wandb.json").read_text())
    assert {run.run_id for run in runs} == {known["id"]} and known["id"].startswith("my-run-")
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    assert {(run.project, run.display_name) for run in runs} == {("project", "my run")}
    config = {u.key: json.loads(u.value_json) for u in runs[0].config.update}
    assert config["train"] == {"steps": 9} and config["model"] == {"path": "m"}
    want = [
        {"step": row["step"]}
        | {f"{row['phase']}/{k}": v for k, v in row.items() if k not in ("step", "phase")}
        for row in read_metrics(folder)
    ]
    assert len(rows) == len(want) == 7
    for got, row in zip(rows, want, strict=True):
        assert {k: v for k, v in got.items() if k != "train/bad"} == {
            k: v for k, v in row.items() if k != "train/bad"
        }
        assert ("train/bad" in row) == ("train/bad" in got) and (
            "train/bad" not in got or got["train/bad"] == "NaN" or math.isnan(got["train/bad"])
        )


def test_switched_off_it_gets_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    done = start(tmp_path / "off", 0, 2, WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    settings = tmp_path / "by command/.config/wandb/settings"  # what `wandb disabled` writes
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = disabled\n")
    done = start(tmp_path / "by command", 0, 2)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "by command")) == 2


def test_no_key_is_refused_and_no_network_is_not(tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    done = start(tmp_path / "keyless", 0, 2, **nowhere)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: observe.wandb_project: ") and "WANDB_MODE=offline" in last
    done = start(tmp_path / "cut_off", 0, 3, **nowhere, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr
    assert "W&B gets nothing more of this run" in done.stderr
    assert len(read_metrics(tmp_path / "cut_off")) == 3


def test_a_terminal_is_not_asked_for_a_key_for_ever(tmp_path: Path) -> None:
    env = variables(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_LOGIN_TIMEOUT="2", TERM="xterm")
    keyboard, terminal = os.openpty()
    try:
        words = command(tmp_path, 0, 2)
        process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, env=env)
        os.close(terminal)
        said, deadline = b"", time.monotonic() + patience()
        with contextlib.suppress(OSError):  # at its end
            while select.select([keyboard], [], [], max(0.0, deadline - time.monotonic()))[0]:
                part = os.read(keyboard, 4096)
                if not part:
                    break
                said += part
        assert time.monotonic() < deadline, said
        assert process.wait(patience()) == 1
    finally:
        process.kill()
        os.close(keyboard)
    last = said.decode().strip().splitlines()[-1]
    assert last.startswith("ValueError: observe.wandb_project: no key was entered; set WANDB_API_KEY, or ")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """W&B's time limits for a key, from starts that begin nothing of W&B's own."""
    monkeypatch.delenv("WANDB_LOGIN_TIMEOUT", raising=False)
    given: list[float | None] = []

    def setup(settings: Any) -> SimpleNamespace:
        given.append(settings.login_timeout)
        return SimpleNamespace(settings=SimpleNamespace(mode="online"))

    monkeypatch.setattr(wandb, "setup", setup)
    return given


class Failing:
    """A W&B run that fails from the second row on."""

    disabled = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def define_metric(self, *_: Any, **__: Any) -> None:
        self.calls.append("define")

    def log(self, row: dict[str, Any]) -> None:
        self.calls.append(f"log {row['step']}")
        if row["step"] > 1:
            raise ConnectionError("gone\nfor good")

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_failure_later_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog, limits) -> None:
    failing = Failing()
    monkeypatch.setattr(wandb, "init", lambda **_: failing)
    caplog.set_level(logging.WARNING)
    with MetricsWriter(tmp_path, tensorboard=False, wandb=WandbRun(tmp_path, "p", {})) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": 1.0})
    assert failing.calls == ["define", "define", "log 1", "log 2"] and limits == [60.0]
    assert [r.getMessage() for r in caplog.records] == [
        "W&B gets nothing more of this run, metrics.jsonl has it all: gone for good"
    ]
    assert len(read_metrics(tmp_path)) == 4


def test_another_project_is_another_run(tmp_path, monkeypatch, limits) -> None:
    ids = []
    monkeypatch.setattr(wandb, "init", lambda **words: (ids.append(words["id"]), Failing())[1])
    for project in ("one", "one", "two"):
        WandbRun(tmp_path, project, {})
    assert ids[0] == ids[1] != ids[2]


def test_nobody_needs_it_unasked(tmp_path, monkeypatch, original: Place) -> None:
    code = "import sys, megatron_dgpo.observe.metrics as m; print(m.WandbRun, 'wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience())
    assert done.stdout.endswith(" False\n"), done.stderr
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    config = load(original.words("train"), Config)
    assert not list(_wandb(config))
    asked = config.model_copy(update={"observe": ObserveConfig(wandb_project="p")})
    assert list(_wandb(asked)) == ["observe.wandb_project: needs the package wandb (pip install wandb)"]
    with pytest.raises(ImportError, match="install the wandb package"):
        WandbRun(tmp_path, "p", {})
