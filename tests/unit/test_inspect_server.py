"""The inspector's server, as clients see it that mean well and that do not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspecting import (
    ROOT,
    Answer,
    Server,
    append,
    command,
    inspector,
    metrics_row,
    response,
    write_credit,
    write_run,
)
from patience import patience, until

from megatron_dgpo.observe import jsonl
from megatron_dgpo.observe.inspect import guard, runs, views
from megatron_dgpo.observe.inspect.__main__ import main
from megatron_dgpo.observe.inspect.work import Cache
from megatron_dgpo.observe.report import data

SECRET = "not-for-the-inspector"
API = ("/api/runs", "/api/overview", "/api/news", "/api/files", "/api/sample")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/: `seed1/dgpo`, and links out of it beside and inside of a run; a secret beside it."""
    base = tmp_path_factory.mktemp("inspected")
    root = base / "runs"
    write_run(root / "seed1/dgpo")
    (base / "secret.txt").write_text(SECRET)
    outside = write_run(base / "outside")
    for path in (outside / "config.toml", outside / "metrics.jsonl"):
        path.write_text(f'{{"step": 1, "phase": "train", "{SECRET}": 1}}\n')
    (root / "linked").symlink_to(outside)
    for name in ("config.toml", "metrics.jsonl", "advisories.jsonl", "credit"):
        run = write_run(root / f"links/{name}")
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / ("secret.txt" if name == "advisories.jsonl" else name))
    run = write_run(root / "links/file")
    (run / "credit/step_000002-replica0.parquet").symlink_to(outside / "credit/step_000001-replica0.parquet")
    pipe = write_run(root / "links/pipe")
    os.mkfifo(pipe / "advisories.jsonl")
    os.mkfifo(pipe / "credit/step_000002-replica0.parquet")
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with inspector(root) as server:
        yield server
        status, errors = server.end()
        # Nothing that any test here did failed inside: these are the requests that were none.
        assert status == 0
        for line in errors.splitlines():
            assert line.startswith("error: Error handling request from 127.0.0.1: ")
            assert " 400, message: " in line


RUN = {"run": "seed1/dgpo"}
SAMPLE = {**RUN, "step": "1", "replica": "0", "row": "2"}
NEWS = {**RUN, "metrics": "0-00000000", "advisories": "0-00000000", "digest": "0"}


def refused(answer: Answer, *statuses: int) -> None:
    """One sentence, without what no client may see."""
    assert answer.status in statuses, answer
    assert answer.error.strip() and "\n" not in answer.error.strip() and len(answer.error) < 2000
    for word in (SECRET, "Traceback", 'File "', "/tmp", "aiohttp"):
        assert word not in answer.body.decode() + str(answer.headers)


def test_list_overview_and_sample_are_those_of_the_report(server: Server, root: Path) -> None:
    listed = server.get("/api/runs").json
    assert [run["name"] for run in listed["runs"] if run["name"].startswith("seed")] == ["seed1/dgpo"]
    assert listed["folder"] == str(root) and "linked" not in {run["name"] for run in listed["runs"]}
    run = root / "seed1/dgpo"
    overview = server.get("/api/overview", RUN).json
    live = overview.pop("live")
    assert overview == json.loads(views.encode({**data.overview(run), "run": "seed1/dgpo"}))
    assert len(overview["samples"]["row"]) == 8 and live["metrics"].startswith(
        f"{(run / 'metrics.jsonl').stat().st_size}-"
    )
    assert server.get("/api/sample", SAMPLE).body == data.sample(run, 1, 0, 2)
    files = server.get("/api/files", {**RUN, "want": "4-0,1-0,3-0"}).json
    assert [file["step"] for file in files["files"]] == [4, 1] and files["warnings"] == []
    assert files["files"][1]["samples"]["reward"] == [1.0, 0.0, 1.0, 0.0]
    for path in ("/", "/run?run=seed1/dgpo", "/run?run=seed1%2Fdgpo&compare=links/file"):
        page = server.get(path)
        assert page.status == 200 and b"<main>" in page.body
        assert b"<script>" not in page.body and b"style=" not in page.body


def test_new_rows_only(server: Server, root: Path) -> None:
    run = write_run(root / "seed2/dgpo", steps=3, wanted=9)
    about = {"run": "seed2/dgpo"}
    live = server.get("/api/overview", about).json["live"]
    at = {name: live[name] for name in ("metrics", "advisories", "digest")}
    quiet = server.get("/api/news", about | at).json
    assert quiet["metrics"]["rows"] == quiet["advisories"]["rows"] == [] and quiet["files"] is None
    assert quiet["summary"]["state"] == "running"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(jsonl.dump(metrics_row(4)) + jsonl.dump(metrics_row(5))[:30])
    append(run / "advisories.jsonl", {"step": 4, "name": "uniform_credit", "message": "m", "suggestion": "s"})
    path = write_credit(run, 6)
    news = server.get("/api/news", about | at).json
    assert [row["step"] for row in news["metrics"]["rows"]] == [4] and not news["metrics"]["restart"]
    assert [row["name"] for row in news["advisories"]["rows"]] == ["uniform_credit"]
    assert [file[:2] for file in news["files"]] == [[1, 0], [4, 0], [6, 0]]
    at = {
        "metrics": news["metrics"]["cursor"],
        "advisories": news["advisories"]["cursor"],
        "digest": news["digest"],
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(jsonl.dump(metrics_row(5))[30:])
    path.unlink()
    news = server.get("/api/news", about | at).json
    assert [row["step"] for row in news["metrics"]["rows"]] == [5] and news["advisories"]["rows"] == []
    assert [file[:2] for file in news["files"]] == [[1, 0], [4, 0]]
    jsonl.write(run / "metrics.jsonl", [metrics_row(1)])
    news = server.get("/api/news", about | at).json
    assert news["metrics"]["restart"] and [row["step"] for row in news["metrics"]["rows"]] == [1]


def test_what_was_not_changed_is_not_sent_again(server: Server) -> None:
    for path, query in (
        ("/api/overview", RUN),
        ("/api/sample", SAMPLE),
        ("/assets/run.js", None),
        ("/", None),
    ):
        first = server.get(path, query)
        again = server.get(path, query, If_None_Match=first.headers["etag"])
        assert (first.status, again.status, again.body) == (200, 304, b"")
        other = server.get(path, query, If_None_Match='"other"')
        assert (other.status, other.body) == (200, first.body)
        head = server.get(path, query, method="HEAD")
        assert (head.status, head.body) == (200, b"") and head.headers["etag"] == first.headers["etag"]
        assert head.headers["content-length"] == str(len(first.body))


# --- what leads out ------------------------------------------------------------------------------------

OUT = [
    "..", "../outside", "../secret.txt", "../../../../etc", "seed1/../../outside", "seed1/../..",
    "seed1/dgpo/../../../outside", "/etc", "//etc/passwd", "/proc/self", "~", "~root", "linked", "linked/",
    "links/../../outside", "%2e%2e/outside", "%252e%252e%252foutside", "..%2foutside", "..\\outside",
    "..%5coutside", "....//outside", ".%00./outside", "seed1/dgpo\0", "seed1/dgpo\0/../..", "\0",
    "..;/outside",
    "%c0%ae%c0%ae/outside", "．．/outside", "file:///etc", "seed1/dgpo/credit", "seed1/dgpo/metrics.jsonl",
    "links/config.toml", "links/metrics.jsonl",
]  # fmt: skip


def test_no_run_leads_out(server: Server, root: Path) -> None:
    names = [*OUT, str(root / "seed1/dgpo"), str(root.parent / "outside")]
    for name in names:
        for path in (*API[1:], "/run"):
            refused(
                server.get(path, {**({} if path != "/api/sample" else SAMPLE), "run": name}), 400, 403, 404
            )
        raw = urllib.parse.quote(name, safe="/%.~\\;:")  # escaped once, as a client may have done already
        refused(server.get(f"/api/overview?run={raw}"), 400, 403, 404)


def test_no_path_leads_out(server: Server, root: Path) -> None:
    for name in [
        *OUT,
        "source.js",
        "live.js",
        "page.html",
        "__init__.py",
        str(root / "seed1/dgpo/config.toml"),
    ]:
        for raw in (urllib.parse.quote(name, safe=""), urllib.parse.quote(name, safe="/%.~\\;:")):
            for prefix in ("/assets/", "/", "/api/", "/run/"):
                refused(server.get(prefix + raw), 400, 404)
    with socket.create_connection(("127.0.0.1", server.port), timeout=patience()) as connection:
        connection.sendall(
            b"GET /../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        with connection.makefile("rb") as file:
            assert b" 404 " in file.readline()


def test_links_inside_of_a_run_are_not_followed(server: Server) -> None:
    for name in ("advisories.jsonl", "credit"):
        answer = server.get("/api/overview", {"run": f"links/{name}"})
        refused(answer, 403)
        assert name in answer.error
    overview = server.get("/api/overview", {"run": "links/file"}).json
    assert [file["step"] for file in overview["files"]] == [1, 4]
    assert "step_000002-replica0.parquet: links are not followed" in overview["warnings"][0]
    refused(server.get("/api/sample", {"run": "links/file", "step": 2, "replica": 0, "row": 0}), 403)
    # A pipe that nobody writes to does not make anybody wait.
    refused(server.get("/api/overview", {"run": "links/pipe"}), 403)


# --- what is malformed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "query", "names"),
    [
        ("/api/overview", {}, "run: is wanted once, and was given 0 times"),
        ("/api/overview", {**RUN, "other": "1"}, "'other' is not a parameter of this; it takes run"),
        ("/api/overview", {"run": "x" * 2000}, "run: a name has at most 1000 characters, not 2000"),
        ("/api/runs", {"x": ""}, "it takes none"),
        ("/", RUN, "it takes none"),
        ("/run", {**RUN, "compare": ".."}, ""),
        ("/api/sample", {**SAMPLE, "step": "-1"}, "step: a whole number of at most nine digits is wanted"),
        ("/api/sample", {**SAMPLE, "step": "1e3"}, "step: "),
        ("/api/sample", {**SAMPLE, "step": "٣"}, "step: "),
        ("/api/sample", {**SAMPLE, "replica": "0" * 4000}, "replica: "),
        ("/api/sample", {**SAMPLE, "row": ""}, "row: "),
        ("/api/sample", {**SAMPLE, "row": "0\n"}, "row: "),
        ("/api/sample", {**SAMPLE, "row": "9999999999"}, "row: "),
        ("/api/news", {**NEWS, "metrics": "1-2"}, "metrics: a cursor looks like 0-00000000"),
        ("/api/news", {**NEWS, "advisories": "x"}, "advisories: "),
        ("/api/news", {**NEWS, "digest": "f" * 41}, "digest: "),
        ("/api/files", {**RUN, "want": ""}, "want: steps and replicas such as 12-0,12-1 are wanted"),
        ("/api/files", {**RUN, "want": ",".join(["1-0"] * 65)}, "want: at most 64 files at once, not 65"),
        ("/api/files", {**RUN, "want": "1-0,../x"}, "want: "),
    ],
)  # fmt: skip
def test_malformed_parameters(server: Server, path: str, query: dict[str, str], names: str) -> None:
    answer = server.get(path, query)
    refused(answer, 403 if query.get("compare") else 400)
    assert names in answer.error


def test_a_parameter_given_twice(server: Server) -> None:
    answer = server.get("/api/overview?run=seed1/dgpo&run=../outside")
    refused(answer, 400)
    assert "run: is wanted once, and was given 2 times" in answer.error


def test_what_is_too_long_for_a_request(server: Server) -> None:
    assert server.get(f"/api/overview?run={'x' * 100_000}").status == 400
    assert server.get("/api/runs", X_Long="x" * 100_000).status == 400
    assert server.get("/api/runs").status == 200


def test_rows_that_are_not_there(server: Server) -> None:
    for other in ({"row": "4"}, {"step": "2"}, {"replica": "1"}, {"step": "999999999"}):
        answer = server.get("/api/sample", SAMPLE | other)
        refused(answer, 404)
    assert "has 4 responses, and no row 4" in server.get("/api/sample", SAMPLE | {"row": "4"}).error


# --- who asks, and how -----------------------------------------------------------------------------------


def test_it_only_reads(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        for path in ("/", "/api/runs", "/api/overview?run=seed1/dgpo"):
            answer = server.get(path, method=method)
            refused(answer, 405)
            assert answer.headers["allow"] == "GET, HEAD"


def test_foreign_hosts_are_refused(server: Server) -> None:
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1:9000", "[::1]:8080", "LocalHost"):
        assert server.get("/api/runs", Host=host).status == 200
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "localhost.evil.example",
        "10.1.2.3",
        "a" * 5000,
    ):
        refused(server.get("/api/runs", Host=host), 403)
        refused(server.get("/", Host=host), 403)
    for host in ("", "localhost:x", ":80"):
        refused(server.get("/api/runs", Host=host), 400)
    with socket.create_connection(("127.0.0.1", server.port), timeout=patience()) as connection:
        connection.sendall(b"GET /api/runs HTTP/1.0\r\n\r\n")
        with connection.makefile("rb") as file:
            assert b" 400 " in file.readline()


def test_every_answer_has_the_headers(server: Server) -> None:
    for path in ("/", "/assets/run.js", "/api/runs", "/api/overview?run=..", "/nothing", "/api/sample"):
        for method in ("GET", "POST"):
            headers = server.get(path, method=method).headers
            for name, value in guard.HEADERS.items():
                assert headers[name.lower()] == value
            assert "frame-ancestors 'none'" in headers["content-security-policy"] and "server" not in headers
            assert "access-control-allow-origin" not in headers


def test_garbage_is_no_request(server: Server) -> None:
    dice = random.Random(3)
    for content in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", dice.randbytes(4000), b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=patience()) as connection:
            connection.sendall(content + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as file:
                got = file.read()
            assert b"Traceback" not in got and b" 200 " not in got
    assert server.get("/api/runs").status == 200


# --- runs under way, damaged or gone ---------------------------------------------------------------------


def test_a_truncated_file_is_named_and_the_others_are_shown(server: Server, root: Path) -> None:
    run = write_run(root / "damaged", credit=(1, 2, 3, 4))
    for step, content in ((2, (run / "credit/step_000002-replica0.parquet").read_bytes()[:-100]), (3, b"")):
        (run / f"credit/step_{step:06d}-replica0.parquet").write_bytes(content)
    overview = server.get("/api/overview", {"run": "damaged"}).json
    assert [file["step"] for file in overview["files"]] == [1, 4] and len(overview["samples"]["row"]) == 8
    for step, warning in zip((2, 3), overview["warnings"], strict=True):
        assert warning.startswith(
            f"damaged/credit/step_{step:06d}-replica0.parquet: not a readable Parquet file"
        )
        answer = server.get("/api/sample", {"run": "damaged", "step": step, "replica": 0, "row": 0})
        refused(answer, 422)
        assert f"damaged/credit/step_{step:06d}-replica0.parquet" in answer.error
    files = server.get("/api/files", {"run": "damaged", "want": "1-0,2-0"}).json
    assert [file["step"] for file in files["files"]] == [1]
    assert [(w["step"], w["replica"]) for w in files["warnings"]] == [(2, 0)]
    write_credit(run, 2)  # it is whole after all
    assert server.get("/api/files", {"run": "damaged", "want": "2-0"}).json["warnings"] == []
    assert server.get("/api/sample", {"run": "damaged", "step": 2, "replica": 0, "row": 0}).status == 200


def test_every_damage_to_a_file_is_an_answer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", credit=(1,))
    path = run / "credit/step_000001-replica0.parquet"
    whole = path.read_bytes()
    views_ = views.Views(runs.RunsFolder(tmp_path), Cache(1 << 20))
    found, dice, damaged = views_.run("run"), random.Random(7), 0
    for n in range(60):
        content = bytearray(whole[: dice.randrange(len(whole))] if n % 3 == 0 else whole)
        for _ in range(dice.choice([0, 1, 30])):
            if content:
                content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        os.utime(path, ns=(n, n))
        overview = json.loads(views_.overview(found))
        damaged += len(overview["warnings"])
        assert len(overview["warnings"]) + len(overview["files"]) == 1
        try:
            views_.sample(found, 1, 0, 0)
        except runs.Refused as error:
            assert error.status in (404, 422) and "step_000001-replica0.parquet" in str(error)
    assert damaged > 10


def test_a_file_of_another_hand_is_named(server: Server, root: Path) -> None:
    """Readable Parquet of the right columns, which no run writes."""
    run = write_run(root / "foreign", credit=(1,))
    write_credit(run, 2, [{**response(2, 0), "token_id": None, "token_text": None}])
    write_credit(run, 3, [{**response(3, 0), "entropy": [0.1], "token_text": ["a"]}])
    overview = server.get("/api/overview", {"run": "foreign"}).json
    assert [file["step"] for file in overview["files"]] == [1, 3]
    (warning,) = overview["warnings"]
    assert warning.startswith("foreign/credit/step_000002-replica0.parquet: cannot be read as a credit log: ")
    for step in (2, 3):
        answer = server.get("/api/sample", {"run": "foreign", "step": step, "replica": 0, "row": 0})
        refused(answer, 422)
        assert f"foreign/credit/step_{step:06d}-replica0.parquet: cannot be read" in answer.error


def test_a_torn_line_and_a_damaged_one(server: Server, root: Path) -> None:
    run = write_run(root / "torn", credit=())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "tr')
    overview = server.get("/api/overview", {"run": "torn"}).json
    assert overview["metrics"]["train"]["step"] == [1, 2, 3, 4] and overview["warnings"] == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 6, "phase": "train", "reward": NaN, "text": "\\ud800"}\n')
    overview = server.get("/api/overview", {"run": "torn"})
    assert overview.status == 200 and "metrics.jsonl, line 6" in overview.json["warnings"][0]
    news = server.get("/api/news", {**NEWS, "run": "torn"}).body.decode("utf-8", "replace")
    rows = json.loads(news, parse_constant=lambda name: pytest.fail(name))["metrics"]["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 6] and rows[-1]["reward"] is None


def test_a_run_that_is_deleted(server: Server, root: Path) -> None:
    run = write_run(root / "deleted")
    about = {"run": "deleted"}
    assert server.get("/api/overview", about).status == 200
    shutil.rmtree(run / "credit")
    assert server.get("/api/overview", about).json["files"] == []
    shutil.rmtree(run)
    for path, query in (
        ("/api/overview", about), ("/api/news", NEWS | about), ("/api/sample", SAMPLE | about),
        ("/run", about), ("/api/files", {**about, "want": "1-0"}),
    ):  # fmt: skip
        answer = server.get(path, query)
        refused(answer, 404)
        assert "there is no run 'deleted'" in answer.error
    listed = lambda: [run["name"] for run in server.get("/api/runs").json["runs"]]  # noqa: E731
    until(lambda: "deleted" not in listed(), "the list without it")


def test_one_bad_run_is_no_trouble_for_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad")
    deep = b"[" * 9000
    with (bad / "metrics.jsonl").open("ab") as file:
        file.write(deep + b"\n" + b'{"step": 9, "phase": "train", "reward": "abc"}\n')
    (bad / "config.toml").write_bytes(b"x = " + deep)
    os.mkfifo(bad / "credit/step_000007-replica0.parquet")
    with inspector(tmp_path) as server:
        rows = {row["name"]: row for row in json.loads(server.get("/api/runs").body)["runs"]}
        assert rows["good"]["problem"] is None
        assert "config.toml cannot be read" in rows["bad"]["problem"]
        assert (rows["bad"]["step"], rows["bad"]["reward"]) == (9, None)
        for _ in range(6):  # more than there are threads
            place = {"run": "bad", "step": 7, "replica": 0, "row": 0}
            refused(server.get("/api/sample", place), 404)
        assert server.get("/api/overview", {"run": "bad"}).status == 200
        assert server.get("/api/overview", {"run": "good"}).status == 200


def test_ten_clients_while_runs_come_grow_and_go(server: Server, root: Path) -> None:
    """Readers of everything beside a writer that appends, tears, truncates, removes and makes again."""
    stop, problems = threading.Event(), []
    busy = root / "busy/run"

    def write() -> None:
        dice = random.Random(1)
        for turn in range(30):
            run = write_run(busy, steps=1, wanted=100, credit=())
            for step in range(2, 8):
                line = jsonl.dump(metrics_row(step))
                cut = dice.randrange(len(line))
                for part in (line[:cut], line[cut:]):
                    with (run / "metrics.jsonl").open("a") as file:
                        file.write(part)
                path = write_credit(run, step, [response(step, index) for index in range(2)])
                if step % 3 == 0:
                    os.truncate(path, path.stat().st_size // 2)
                if step % 3 == 1:
                    path.unlink()
            if turn % 2:
                jsonl.write(run / "metrics.jsonl", [metrics_row(1)])
            shutil.rmtree(run)

    def read(seed: int) -> int:
        dice, answers, about = random.Random(seed), 0, {"run": "busy/run"}
        while not stop.is_set():
            path = dice.choice(API)
            query = {
                "/api/runs": {},
                "/api/overview": about,
                "/api/news": NEWS | about,
                "/api/files": {**about, "want": "2-0,3-0,4-0"},
                "/api/sample": {**about, "step": dice.randrange(8), "replica": 0, "row": 0},
            }[path]
            answer = server.get(path, query)
            answers += 1
            if answer.status not in (200, 404, 422) or answer.status == 422 and path != "/api/sample":
                problems.append((path, answer))
        return answers

    with ThreadPoolExecutor(10) as clients:
        reading = [clients.submit(read, seed) for seed in range(10)]
        try:
            write()
        finally:
            stop.set()
        assert all(done.result(timeout=patience()) > 0 for done in reading)
    assert not problems, problems[:3]


PIECES = st.sampled_from(
    [".." , "/", "%2e", "%00", "\\", "run", "compare", "=", "&", "?", "#", "seed1/dgpo", "api", "overview",
     "news", "sample", "files", "assets", "run.js", "step", "row", "0", "-", "%", "%zz", "é", "'", '"',
     "<script>", "+", ";"]
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=12))
def test_any_path_and_query(server: Server, pieces: list[str]) -> None:
    answer = server.get("/" + urllib.parse.quote("".join(pieces), safe="/%?&=;+~.-"))
    assert answer.status in (200, 400, 403, 404)
    assert SECRET.encode() not in answer.body and b"Traceback" not in answer.body


# --- start and end -------------------------------------------------------------------------------------


def test_an_error_inside_is_one_line_in_the_log_and_no_stack_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio
    import logging

    from aiohttp.test_utils import TestClient, TestServer

    from megatron_dgpo.observe.inspect.server import Inspector

    def broken(*_: object) -> bytes:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(views.Views, "overview", broken)
    write_run(tmp_path / "run")
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(guard.OneLine().format(record))

    async def ask() -> tuple[int, str]:
        server = TestServer(Inspector(runs.RunsFolder(tmp_path)).app("127.0.0.1"))
        async with TestClient(server) as client:
            answer = await client.get("/api/overview", params={"run": "run"})
            return answer.status, await answer.text()

    handler = Keep()
    logging.getLogger("megatron_dgpo").addHandler(handler)
    try:
        status, text = asyncio.run(ask())
    finally:
        logging.getLogger("megatron_dgpo").removeHandler(handler)
    assert status == 500 and json.loads(text) == {"error": "the inspector failed at this; its log says more"}
    assert len(records) == 1 and "\n" not in records[0]
    assert "/api/overview?run=run" in records[0] and "RuntimeError" in records[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it(tmp_path: Path, number: int) -> None:
    with inspector(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port)):
        assert server.get("/api/runs").json["runs"] == []  # with a client that keeps its connection
        assert server.end(number) == (0, "")


def test_what_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str | Path) -> str:
        assert main([str(word) for word in arguments]) == 2
        out, errors = capsys.readouterr()
        assert out == ""
        return errors

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        wanted = f"error: port {port} of 127.0.0.1 is in use; choose another one with --port, "
        wanted += "or 0 for any free one"
        assert said(tmp_path, "--port", str(port)) == wanted + "\n"
        done = subprocess.run(
            command(tmp_path, "--port", str(port)),
            capture_output=True,
            text=True,
            timeout=patience(),
            cwd=ROOT,
        )
        assert (done.returncode, done.stderr) == (2, wanted + "\n")
    assert "no address of this machine" in said(tmp_path, "--host", "192.0.2.1", "--port", "0")
    assert (
        said(tmp_path / "none")
        == f"error: {tmp_path}/none: not a folder of runs: No such file or directory\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--port", "70000"])
    assert "70000 is not a port: 0 to 65535" in capsys.readouterr().err


def test_beyond_loopback_only_when_told_and_with_a_warning(tmp_path: Path) -> None:
    with inspector(tmp_path, "--host", "0.0.0.0") as server:
        assert server.get("/api/runs").status == 200
        refused(server.get("/api/runs", Host="evil.example"), 403)
        status, errors = server.end()
    assert status == 0
    assert errors == (
        "warning: --host 0.0.0.0: whoever reaches this machine can read the runs' prompts and responses\n"
    )
