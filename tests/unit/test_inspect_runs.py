"""What the inspector finds in a folder: runs, their state, new rows; and what it refuses."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspecting import append, metrics_row, write_run
from patience import patience

from megatron_dgpo.observe import jsonl
from megatron_dgpo.observe.inspect import follow, runs
from megatron_dgpo.observe.inspect.guard import host_guard
from megatron_dgpo.observe.inspect.runs import Found, Refused, RunsFolder
from megatron_dgpo.observe.inspect.work import Cache, Work


def state(folder: Path, *, now: float | None = None) -> str:
    return str(runs.summary(Found("x", folder), runs.held_locks(), now)["state"])


def test_runs_are_found_at_every_depth_but_not_through_links_or_inside_of_runs(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("a", "quickstart/seed1/dgpo", "1/2/3/4/5/6", "a/inside", ".hidden/run"):
        write_run(root / name, credit=())
    (root / "data").mkdir()
    write_run(tmp_path / "elsewhere", credit=())
    (root / "link").symlink_to(tmp_path / "elsewhere")
    write_run(root / "1/2/3/4/5/7/8", credit=())
    found, cut = RunsFolder(root).search()
    assert sorted(run.name for run in found) == ["1/2/3/4/5/6", "a", "quickstart/seed1/dgpo"] and not cut
    itself, _ = RunsFolder(root / "a").search()
    assert [run.name for run in itself] == ["."] and RunsFolder(root / "a").run(".").folder == root / "a"


def test_a_search_of_too_many_folders_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_FOLDERS", 10)
    for n in range(20):
        (tmp_path / f"{n:02d}").mkdir()
    write_run(tmp_path / "03/run", credit=())
    assert RunsFolder(tmp_path).search() == ([], True)


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(ValueError, match=f"{name}: not a folder of runs: No"):
            RunsFolder(tmp_path / name)


def test_states(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2, wanted=9, credit=())
    written = (run / "metrics.jsonl").stat().st_mtime
    assert state(run, now=written + 59) == "running"  # it was written lately
    assert state(run, now=written + 61) == "stopped"
    append(run / "metrics.jsonl", {**metrics_row(3), "time/step": 100.0})
    assert state(run, now=written + 250) == "running"  # its steps take that long
    assert state(run, now=written + 400) == "stopped"
    append(run / "metrics.jsonl", metrics_row(9))
    assert state(run, now=written + 1) == "finished"


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="needs the kernel's table of locks")
def test_a_lock_that_is_held_is_seen_and_never_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", credit=())
    later = (run / "metrics.jsonl").stat().st_mtime + 9999
    assert state(run, now=later) == "finished"
    with (run / ".lock").open("w") as file:
        assert state(run, now=later) == "finished"
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert state(run, now=later) == "running"
    assert state(run, now=later) == "finished"
    # A run that starts takes its lock however often the inspector looks.
    stop, looked = threading.Event(), threading.Event()

    def look() -> None:
        while not stop.is_set():
            state(run, now=later)
            looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert looked.wait(patience())
        for _ in range(200):
            with (run / ".lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        stop.set()
        thread.join(timeout=patience())


def test_lock_table() -> None:
    lines = [
        "1: POSIX  ADVISORY  WRITE 708 00:19:1 0 EOF",
        "2: FLOCK  ADVISORY  WRITE 26667 fe:00:2785766 0 EOF",
        "2: -> FLOCK  ADVISORY  WRITE 26668 fe:00:2785767 0 EOF",
        "3: FLOCK  ADVISORY  READ 26667 fe:00:5 0 EOF",
        "",
    ]
    assert list(runs._parse_locks(lines)) == [(os.makedev(0xFE, 0), 2785766)]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", credit=())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "pha')  # torn: not a problem
    summary = runs.summary(Found("run", run), set())
    assert (summary["step"], summary["reward"], summary["evaluation"]) == (4, 0.5904, {"avg@8": 0.54})
    assert summary["problem"] is None
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert "metrics.jsonl has a line" in runs.summary(Found("run", run), set())["problem"]
    (run / "config.toml").write_text("steps = ")
    summary = runs.summary(Found("run", run), set())
    assert "config.toml cannot be read" in summary["problem"] and summary["steps"] is None
    (run / "config.toml").write_bytes(b"\xff")
    assert "config.toml cannot be read" in runs.summary(Found("run", run), set())["problem"]


# --- paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("..", 403), ("../x", 403), ("../none", 403), ("a/../../x", 403), ("a/..", 403), ("/etc", 403),
        ("//etc", 403),
        ("", 400), ("a\0b", 400), ("a\\b", 400), ("..\\x", 400), ("a\nb", 400), ("\udc80", 400),
        ("x" * 1001, 400),
        ("a/", 404), ("./a", 404), ("a//b", 404), ("%2e%2e", 404), ("missing", 404), ("x" * 300, 404),
        ("file", 404),
        ("1/2/3/4/5/6/7", 404), (".", 404), ("link", 404), ("circle", 404),
        ("linked/run", 403), ("/tmp", 403),
    ],
)  # fmt: skip
def test_names_that_are_refused(tmp_path: Path, name: str, status: int) -> None:
    root = tmp_path / "runs"
    write_run(root / "a", credit=())
    write_run(tmp_path / "x/run", credit=())
    (root / "file").touch()
    (root / "link").symlink_to(tmp_path / "missing")
    (root / "circle").symlink_to(root / "circle")
    (root / "linked").symlink_to(tmp_path / "x")
    with pytest.raises(Refused) as refused:
        RunsFolder(root).run(name)
    assert refused.value.status == status
    assert str(tmp_path) not in str(refused.value) and "\n" not in str(refused.value)


@given(
    st.lists(
        st.sampled_from(["..", ".", "", "a", "b", "\\", "\0", "%2e%2e", "…", "run", "linked"]), max_size=6
    )
)
def test_no_name_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "no-name-leads-out"
    root = base / "runs"
    if not base.exists():
        write_run(root / "a/run", credit=())
        write_run(base / "run", credit=())
        (root / "linked").symlink_to(base)
    try:
        found = RunsFolder(root).run("/".join(parts))
    except Refused:
        return
    assert found.folder == root / "a/run"


# --- new rows ----------------------------------------------------------------------------------------


def test_each_row_comes_once_however_it_is_written(tmp_path: Path) -> None:
    path, cursor, got = tmp_path / "metrics.jsonl", follow.START, []
    content = "".join(jsonl.dump({"step": n, "text": "ü" * (n % 7)}) for n in range(40)).encode()
    assert follow.read(path, cursor).rows == []
    for start in range(0, len(content), 17):  # torn in every way
        with path.open("ab") as file:
            file.write(content[start : start + 17])
        news = follow.read(path, cursor)
        assert not news.restart and not news.problems
        got += news.rows
        cursor = news.cursor
        assert follow.end(path) == cursor
    assert [row["step"] for row in got] == list(range(40))


def test_a_file_that_was_written_again_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    jsonl.write(path, [{"step": n} for n in range(2000)])
    cursor = follow.end(path)
    assert follow.read(path, cursor).rows == []
    jsonl.write(path, [{"step": n} for n in range(1500)])  # a run resumed from there
    news = follow.read(path, cursor)
    assert news.restart and len(news.rows) == 1500
    # As long as it was, with other rows at the end.
    jsonl.write(path, [{"step": n} for n in [*range(1999), 3999]])
    assert follow.read(path, cursor).restart
    path.unlink()
    assert follow.read(path, cursor).restart and follow.read(path, cursor).cursor == follow.START


def test_lines_that_are_no_rows_are_named_and_the_others_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "x": NaN}\nno json\n\xff\xfe\n[1]\n{"step": "2"}\n' + b"[" * 9000 + b'\n{"step": 3}\n'
    )
    news = follow.read(path, follow.START)
    assert news.rows == [{"step": 1, "x": None}, {"step": 3}] and len(news.problems) == 5
    assert all(problem.startswith("metrics.jsonl: a line is left out") for problem in news.problems)


def test_a_large_file_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MOST_BYTES", 1000)
    path, cursor, got, answers = tmp_path / "metrics.jsonl", follow.START, [], 0
    rows = [{"step": n, "text": "x" * (3000 if n == 50 else 20)} for n in range(100)]
    jsonl.write(path, rows)
    more, problems = True, []
    while more:
        news = follow.read(path, cursor)
        got, cursor, more, answers = got + news.rows, news.cursor, news.more, answers + 1
        problems += news.problems
    assert [row["step"] for row in got] == [n for n in range(100) if n != 50] and answers > 4
    assert any("more than 1,000 bytes" in problem for problem in problems)


@pytest.mark.parametrize(
    "text", ["", "0", "x-00000000", "-1-00000000", "1-0000000", "9" * 19 + "-00000000", "0-0000000G"]
)
def test_what_is_no_cursor_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="a cursor looks like 0-00000000"):
        follow.read(tmp_path / "metrics.jsonl", text)


def test_a_place_beyond_the_end_is_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    jsonl.write(path, [{"step": 1}])
    for cursor in ("999999999999999999-00000000", "500-ffffffff"):
        news = follow.read(path, cursor)
        assert news.restart and news.rows == [{"step": 1}]


# --- host, cache -------------------------------------------------------------------------------------


def test_hosts_that_are_answered() -> None:
    local = host_guard("127.0.0.1")
    assert all(map(local, ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.8.8", "[::1]"]))
    assert not any(
        map(local, ["evil.example", "localhost.evil.example", "10.0.0.5", "127.0.0.1.evil.example", ""])
    )
    beyond = host_guard("0.0.0.0")
    assert all(map(beyond, ["localhost", "10.0.0.5", os.uname().nodename]))
    assert not beyond("evil.example")
    assert host_guard("gpu-box.lan")("gpu-box.lan") and not host_guard("gpu-box.lan")("evil.example")


def test_the_cache_keeps_within_its_bound() -> None:
    cache = Cache(1000)
    for n in range(50):
        cache.put((n,), bytes(100))
        cache.get((0,))
        assert cache.size <= 1000
    assert cache.get((0,)) is not None and cache.get((1,)) is None and cache.get((49,)) is not None
    cache.put(("large",), bytes(251))
    assert cache.get(("large",)) is None
    cache.put((49,), bytes(7))
    assert cache.size == 907


def test_work_under_way_is_done_once_and_errors_are_not_kept() -> None:
    calls: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def make() -> bytes:
        calls.append(1)
        begun.set()
        assert go.wait(patience())
        if len(calls) == 1:
            raise OSError("the first one fails")
        return b"made"

    async def ask() -> None:
        work = Work(threads=2, most_bytes=1000)
        asked = [asyncio.ensure_future(work.kept(("k",), make)) for _ in range(10)]
        await asyncio.to_thread(begun.wait, 30)
        asked[0].cancel()  # a client that went away
        go.set()
        got = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError) and len(calls) == 1
        assert all(isinstance(error, OSError) for error in got[1:])
        assert await work.kept(("k",), make) == await work.kept(("k",), make) == b"made"
        assert len(calls) == 2
        work.close()

    asyncio.run(ask())
