"""Starting and ending real SGLang servers, and what is asked of them first."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from patience import patience, until

from megatron_dgpo.config import LaunchConfig
from megatron_dgpo.rollout.sglang import servers as servers_
from megatron_dgpo.rollout.sglang.servers import (
    ServerFailed,
    ServerProcess,
    answers,
    check_nccl,
    check_server,
    command_line,
    end_left_over,
    visible_devices,
    workers_of_router,
)


def start(folder: Path, launch: LaunchConfig, log_file: Path) -> ServerProcess:
    return ServerProcess(folder, launch, number=0, dtype="float32", log_file=log_file)


def test_a_port_that_is_taken_is_named(folders: dict[str, Path], warm_python: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = LaunchConfig(python=warm_python, args={"port": port})
        with pytest.raises(ServerFailed, match=f"launch.args.port: 127.0.0.1:{port} is in use"):
            start(folders["qwen2"], launch, tmp_path / "log")


def test_an_interpreter_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="rollout.sglang.launch.python: .*nothing.* `make sglang`"):
        start(folders["qwen2"], LaunchConfig(python=tmp_path / "nothing"), tmp_path / "log")


def test_a_server_that_cannot_start_says_why(
    folders: dict[str, Path], warm_python: Path, tmp_path: Path
) -> None:
    launch = LaunchConfig(python=warm_python, args={"no_such_option": 3})
    server = start(folders["qwen2"], launch, tmp_path / "log")
    try:
        with pytest.raises(ServerFailed, match="(?s)ended with status.*--no-such-option"):
            server.wait_ready(patience())
    finally:
        server.stop()


def test_a_server_of_another_family_is_refused(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    url = servers["llama"].url
    assert check_server(url, folders["llama"]) == 1
    with pytest.raises(ServerFailed, match=f"{url} serves .*llama.*, whose model_type is 'llama'.*'qwen3'"):
        check_server(url, folders["qwen3"])


def test_what_is_no_server_is_said_so(servers: dict[str, ServerProcess], folders: dict[str, Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerFailed, match=f"{url} does not answer as an SGLang server does"):
            check_server(url, folders["qwen2"])
    with pytest.raises(ServerFailed, match="is it an SGLang server"):
        workers_of_router(servers["llama"].url)


def test_arguments_become_options() -> None:
    given = {"tp_size": 2, "disable_radix_cache": True, "quiet": False, "cuda_graph_bs": [1, 2], "x": None}
    assert command_line(given) == ["--tp-size", "2", "--disable-radix-cache", "--cuda-graph-bs", "1", "2"]


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_is_not_asked(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, Path],
    servers: dict[str, ServerProcess],
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert answers(servers["qwen2"].url + "/health")
    assert check_server(servers["qwen2"].url, folders["qwen2"]) == 1


@pytest.mark.parametrize(
    ("inherited", "devices", "number", "size", "wanted"),
    [
        (None, (), 0, 2, "0,1"),
        (None, (), 1, 2, "2,3"),
        (None, (4, 5, 6, 7), 1, 2, "6,7"),
        ("4,5,6,7", (), 0, 2, "4,5"),
        ("4,5,6,7", (), 1, 2, "6,7"),
        ("4,5,6,7", (2, 3), 0, 2, "6,7"),
        ("GPU-a, MIG-b,GPU-c", (2, 1), 1, 1, "MIG-b"),
    ],
)
def test_devices_are_places_among_the_runs_own(
    inherited: str | None, devices: tuple[int, ...], number: int, size: int, wanted: str
) -> None:
    assert visible_devices(inherited, devices, number=number, size=size, first=0) == wanted
    if not devices and inherited is None:
        after = visible_devices(None, (), number=number, size=size, first=4)
        assert after == ",".join(str(4 + int(place)) for place in wanted.split(","))


def test_a_device_that_the_run_does_not_have_is_named() -> None:
    says = "launch.devices: server 1 is to have GPU 2, and CUDA_VISIBLE_DEVICES=4,5 leaves the run 2, counted"
    with pytest.raises(ServerFailed, match=says):
        visible_devices("4,5", (), number=1, size=2, first=0)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's environment")
def test_what_a_dead_trainer_left_over_is_ended_and_nothing_else(tmp_path: Path) -> None:
    """Servers of a trainer that lives, and those of another run, go on."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    log = tmp_path / "server_0.log"
    owners = (f"{log} {dead.pid}-1", servers_._owner(log, os.getpid()))
    owners += (f"{tmp_path / 'server_1.log'} {dead.pid}-1", f"{log} {os.getpid()}-1")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={servers_._OWNER: owner}
        )
        for owner in owners
    ]
    try:
        until(lambda: all(servers_._OWNER in psutil.Process(p.pid).environ() for p in started))
        end_left_over(log)
        assert [p.poll() is None for p in started] == [False, True, True, False]
    finally:
        for process in started:
            process.kill()
            process.wait()


# --- stand-ins for SGLang's interpreter ---------------------------------------------------------------

ORPHAN = """
import os, signal, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
tries = len(list(here.glob("*.pid")))
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
orphan = subprocess.Popen([sys.executable, "-c", child])
(here / f"{tries}.pid").write_text(str(orphan.pid))
"""
"""A process that leaves a child behind which SIGTERM does not end."""
BUSY = "[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use"
"""As SGLang 0.5.23 says it, half a minute after its start."""


@contextmanager
def stand_in(folder: Path, tmp_path: Path, code: str, first: str = ORPHAN) -> Iterator[ServerProcess]:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{first}{code}")
    python.chmod(0o700)
    server = start(folder, LaunchConfig(python=python), tmp_path / "log")
    try:
        yield server
    finally:
        server.stop()


def orphans(tmp_path: Path) -> list[int]:
    return sorted(int(file.read_text()) for file in tmp_path.glob("*.pid"))


@pytest.mark.parametrize("reaped", [False, True])
def test_children_of_a_server_that_ended_by_itself_end_too(
    reaped: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    with stand_in(folders["qwen2"], tmp_path, "sys.exit(1)") as server:
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)  # without reaping it
        assert not (reaped and server.is_alive())
        (orphan,) = orphans(tmp_path)
        assert psutil.pid_exists(orphan)
    assert not psutil.pid_exists(orphan)


def test_children_that_ignore_the_end_of_their_server_end_too(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with stand_in(folders["qwen2"], tmp_path, "time.sleep(300)"):
        until(lambda: orphans(tmp_path), "an orphan")
    (orphan,) = orphans(tmp_path)
    assert not psutil.pid_exists(orphan)


@pytest.mark.parametrize("then", ["sys.exit(1)", "time.sleep(300)"])
def test_a_server_whose_port_was_taken_meanwhile_gets_another(
    then: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Whether or not it ends by itself; and nothing is left of the first try."""
    serve = """
if tries == 0:
    print(BUSY, flush=True)
    THEN
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
""".replace("BUSY", repr(BUSY)).replace("THEN", then)
    with stand_in(folders["qwen2"], tmp_path, serve) as server:
        server.wait_ready(patience())
        assert answers(server.url + "/health")
        first, second = (int((tmp_path / f"{k}.pid").read_text()) for k in (0, 1))
        assert not psutil.pid_exists(first) and psutil.pid_exists(second)
    assert not psutil.pid_exists(second)


def test_a_server_that_gets_no_port_says_so_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    with stand_in(folders["qwen2"], tmp_path, f"print({BUSY!r}, flush=True)\ntime.sleep(300)") as server:
        began = time.monotonic()
        with pytest.raises(ServerFailed, match="(?s)ended with status.*address already in use"):
            server.wait_ready(patience())
        assert time.monotonic() - began < 60
        assert len(list(tmp_path.glob("*.pid"))) == 3


def test_the_port_of_a_server_that_loads_is_kept_for_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """The system gives it to nobody else, neither asked by number nor for any that is free."""
    with stand_in(folders["qwen2"], tmp_path, "time.sleep(300)") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        again = start(folders["qwen2"], LaunchConfig(python=tmp_path / "python"), tmp_path / "again")
        again.stop()
        assert again.url != server.url
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_another_nccl_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"

    def does(code: str) -> None:
        python.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
        python.chmod(0o700)

    does("print('2.28.9')")
    check_nccl(python, "2.28.9")
    with pytest.raises(ServerFailed, match="launch.python: its torch has NCCL 2.28.9, the trainer's 2.30.7"):
        check_nccl(python, "2.30.7")
    does("sys.exit('no module named torch')")
    with pytest.raises(ServerFailed, match="has no torch with NCCL: no module named torch"):
        check_nccl(python, "2.30.7")
    with pytest.raises(ServerFailed, match="launch.python: .*no_python"):
        check_nccl(tmp_path / "no_python", "2.30.7")


def test_a_server_finds_the_tools_of_its_own_environment(folders: dict[str, Path], tmp_path: Path) -> None:
    with stand_in(folders["qwen2"], tmp_path, "print(os.environ['PATH'])") as server:
        with pytest.raises(ServerFailed, match=f"\n{tmp_path}{os.pathsep}{os.environ['PATH']}"):
            server.wait_ready(patience())


def test_another_failure_is_not_taken_for_a_port_in_use(folders: dict[str, Path], tmp_path: Path) -> None:
    error = "import torch: CUDA out of memory, 79 GiB memory in use; port 30000"
    with stand_in(folders["qwen2"], tmp_path, f"sys.exit({error!r})") as server:
        with pytest.raises(ServerFailed, match="(?s)ended with status 1.*79 GiB memory in use"):
            server.wait_ready(patience())
        assert len(orphans(tmp_path)) == 1


def test_servers_that_start_side_by_side_share_their_time(folders: dict[str, Path], tmp_path: Path) -> None:
    """The ranks wait for all of them in one collective."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        stand_in(folders["qwen2"], tmp_path / "a", "time.sleep(300)", "import time\n") as one,
        stand_in(folders["qwen2"], tmp_path / "b", "time.sleep(300)", "import time\n") as two,
    ):
        with pytest.raises(ServerFailed, match="did not answer in 8 s"):
            one.wait_ready(8)
        began = time.monotonic()
        with pytest.raises(ServerFailed, match="did not answer in 8 s"):
            two.wait_ready(8)
        assert time.monotonic() - began < 7
