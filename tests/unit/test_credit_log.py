"""The credit log's files: what comes back, what is refused, what a full or slow disk does."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import patience

from megatron_dgpo.observe import credit_log
from megatron_dgpo.observe.credit_log import CreditWriter

SETTINGS: dict[str, Any] = {"algorithm": "dgpo", "credit": "distribution", "tau": 0.1, "kappa": 1.0}
FLOATS = [name for name, kind in credit_log.COLUMNS.items() if kind == "list float32"]


def response(index: int = 0, tokens: int = 3, **more: Any) -> dict[str, Any]:
    """A row as the collector gives it: numbers of its own in every column."""
    values = {name: np.arange(tokens) / 7 + k + index for k, name in enumerate(FLOATS)}
    return {
        **{"index": index, "prompt_id": "train:7", "prompt": "1+1=", "response": "2 <b>", "answer": "2"},
        **{"finish_reason": "stop", "prompt_tokens": 4, "extracted": None, "reward": 1 / 3},
        **{"reward_parts": {"correct": 1.0, "length": -2 / 3}, "advantage": -0.5},
        **{"token_id": list(range(tokens)), "version": [4] * tokens, "clipped": np.arange(tokens) > 1},
        **values,
        **more,
    }


def letters(ids: Sequence[int]) -> list[str]:
    return [chr(97 + i % 26) for i in ids]


def writer(run: Path, **more: Any) -> CreditWriter:
    return CreditWriter(run, **{"replica": 0, "pieces": letters, "max_bytes": None, **more})


def written(run: Path, steps: Sequence[int], rows: Callable[[], Any], **more: Any) -> list[Path]:
    log = writer(run, **more)
    for step in steps:
        assert log.put(step, {**SETTINGS, "step": step}, rows)
        _wait(log)
    log.close()
    return credit_log.files(run)


def _wait(log: CreditWriter) -> None:
    """Until the thread has done with what it was given."""
    idle = threading.Event()

    def rows() -> list[dict[str, Any]]:
        idle.set()
        raise ValueError("nothing to write")

    log._said.add("error")
    assert log.put(0, {}, rows) and idle.wait(patience())


def test_rows_come_back(tmp_path: Path) -> None:
    nothing = {name: None for name in ("hellinger", "reverse_kl", "score", "ratio", "clipped")}
    given = [response(), response(1, 5, extracted="3", reward_parts={}, **nothing), response(2, 1)]
    (path,) = written(tmp_path, [12], lambda: [dict(row) for row in given])
    assert path == tmp_path / "credit" / "step_000012-replica0.parquet"
    assert not list(path.parent.glob("*.partial"))
    table = credit_log.read(path)
    assert credit_log.settings(table) == {"format": 1, "step": 12, **SETTINGS}
    assert table.schema.names == list(credit_log.COLUMNS)
    rows = list(credit_log.rows(tmp_path))
    for row, want in zip(rows, given, strict=True):
        assert row.pop("token_text") == letters(want["token_id"]) and row.pop("step") == 12
        for name, value in row.items():
            if isinstance(want[name], np.ndarray):
                assert value == [pytest.approx(x, rel=1e-6) for x in want[name].tolist()], name
            else:
                assert value == want[name], name
    only = credit_log.read(path, ["weight", "reward"])
    assert only.schema.names == ["weight", "reward"] and only["reward"].to_pylist() == [1 / 3] * 3
    assert list(credit_log.rows(tmp_path, [11])) == []


def test_files_are_in_order_of_step_and_replica(tmp_path: Path) -> None:
    for replica in (10, 2):
        written(tmp_path, [7, 1_000_000, 20], lambda: [response()], replica=replica)
    other = tmp_path / "credit" / "step_notes.parquet"
    other.write_text("of the user's own")
    places = [
        (credit_log.step_of(path), path.stem.split("replica")[1]) for path in credit_log.files(tmp_path)
    ]
    assert places == [(s, r) for s in (7, 20, 1_000_000) for r in ("2", "10")]
    with pytest.raises(ValueError, match="step_notes.parquet"):
        credit_log.step_of(other)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    (path,) = written(tmp_path, [3], lambda: [response(i, 50) for i in range(20)])
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="step_000003-replica0.parquet: not a readable Parquet file"):
            credit_log.read(path)
    with pytest.raises(ValueError, match="step_000003"):
        list(credit_log.rows(tmp_path))
    form = credit_log.schema({"step": 3})
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match="step_000003-replica0.parquet: not a credit log"):
        credit_log.read(path)
    pq.write_table(form.remove(5).empty_table(), path)
    with pytest.raises(ValueError, match="has no column finish_reason of type string"):
        credit_log.read(path)
    pq.write_table(form.with_metadata({b"credit": b'{"format": 2}'}).empty_table(), path)
    with pytest.raises(ValueError, match="of format 2, and this release reads 1"):
        credit_log.read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        credit_log.read(path)


def test_damage_inside_of_a_file_is_no_crash(tmp_path: Path) -> None:
    (path,) = written(tmp_path, [3], lambda: [response(i, 50) for i in range(20)])
    whole = path.read_bytes()
    refused = 0
    for place in range(8, len(whole), len(whole) // 60):
        path.write_bytes(
            whole[:place] + bytes(x ^ 0xFF for x in whole[place : place + 8]) + whole[place + 8 :]
        )
        try:
            credit_log.read(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


def test_a_resumed_run_removes_later_steps_and_torn_files(tmp_path: Path) -> None:
    for replica in (0, 1):
        written(tmp_path, [1, 10, 20, 30], lambda: [response()], replica=replica)
    folder = tmp_path / "credit"
    (folder / "step_000001-replica0.parquet.partial").write_bytes(b"PAR1")
    (folder / "step_000040-replica1.parquet.partial").write_bytes(b"PAR1")
    (folder / "step_000040-notes.txt").write_text("of the user's own")
    assert len(credit_log.files(tmp_path)) == 8
    credit_log.truncate_after(tmp_path, 10)
    left = sorted(path.name for path in folder.iterdir())
    kept = [f"step_0000{step}-replica{r}.parquet" for step in ("01", "10") for r in (0, 1)]
    assert left == [*kept, "step_000040-notes.txt"]
    credit_log.truncate_after(tmp_path / "none", 0)


def test_the_folder_stays_within_its_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = written(tmp_path, range(1, 6), lambda: [response()], replica=1)
    size = other[0].stat().st_size
    steps = list(range(1, 41))
    with caplog.at_level(logging.WARNING):
        files = written(tmp_path, steps, lambda: [response()], max_bytes=int(8.5 * size))
    left = [credit_log.step_of(path) for path in files]
    assert 4 <= len(left) <= 8 and sum(path.stat().st_size for path in files) <= 8.5 * size
    assert left[0] == 1 and left[-1] == 40
    assert [r.message.split(" is larger")[0] for r in caplog.records] == [
        f"credit log: {tmp_path / 'credit'}"
    ]
    # What no removal can bring within its bound stays.
    files = written(tmp_path, [41], lambda: [response()], max_bytes=1)
    assert {credit_log.step_of(path) for path in files} == {1, 41}


def test_a_disk_that_fails_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "credit").write_text("in the way")
    log = writer(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            assert log.put(step, SETTINGS, lambda: [response()])
        log.close()
    assert not log._thread.is_alive()
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1 and "step 1 is not written: FileExistsError" in messages[0]
    # A step that fails is no reason to lose the next.
    (tmp_path / "credit").unlink()
    bad = [response(reward="no number")]
    log = writer(tmp_path)
    log.put(5, SETTINGS, lambda: bad)
    log.put(6, SETTINGS, lambda: [response()])
    log.close()
    assert [path.name for path in (tmp_path / "credit").iterdir()] == ["step_000006-replica0.parquet"]


def test_a_slow_disk_costs_steps_and_not_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credit_log, "_PATIENCE_SECONDS", 0.01)
    begun, go_on = threading.Event(), threading.Event()

    def pieces(ids: Sequence[int]) -> list[str]:
        begun.set()
        assert go_on.wait(patience())
        return letters(ids)

    log = writer(tmp_path, pieces=pieces)
    assert log.put(1, SETTINGS, lambda: [response()]) and begun.wait(patience())
    with caplog.at_level(logging.WARNING):
        assert [log.put(step, SETTINGS, lambda: [response()]) for step in (2, 3, 4, 5)] == [
            True,
            True,
            False,
            False,
        ]
        log.close(timeout=0.01)
    assert [r.message.split("; ")[-1] for r in caplog.records][0] == "step 4 is left out (said once)"
    assert len(caplog.records) == 2 and "still writing after 0.01 s" in caplog.records[1].message
    go_on.set()
    log.close(patience())
    assert [credit_log.step_of(path) for path in credit_log.files(tmp_path)] == [1, 2, 3]


def test_no_torch_and_no_pyarrow_at_import() -> None:
    code = (
        "import sys\nfrom megatron_dgpo.observe import credit_log\n"
        "print(sorted({'torch', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_not_a_number_comes_back(tmp_path: Path) -> None:
    written(tmp_path, [1], lambda: [response(ratio=np.array([math.inf, math.nan, 0.5]))])
    (row,) = credit_log.rows(tmp_path)
    assert row["ratio"][0] == math.inf and math.isnan(row["ratio"][1]) and row["ratio"][2] == 0.5
