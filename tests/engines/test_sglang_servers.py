"""Starting and ending real SGLang servers, and what is asked of them first."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_dgpo.config import LaunchConfig
from megatron_dgpo.rollout.sglang.servers import (
    ServerFailed,
    ServerProcess,
    check_server,
    command_line,
    workers_of_router,
)


def start(folder: Path, launch: LaunchConfig, log_file: Path) -> ServerProcess:
    return ServerProcess(folder, launch, number=0, dtype="float32", log_file=log_file)


def test_a_port_that_is_taken_is_named(folders: dict[str, Path], sglang_python: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = LaunchConfig(python=sglang_python, args={"port": port})
        with pytest.raises(ServerFailed, match=f"launch.args.port: 127.0.0.1:{port} is in use"):
            start(folders["qwen2"], launch, tmp_path / "log")


def test_an_interpreter_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="rollout.sglang.launch.python: .*nothing.* `make sglang`"):
        start(folders["qwen2"], LaunchConfig(python=tmp_path / "nothing"), tmp_path / "log")


def test_a_server_that_cannot_start_says_why(
    folders: dict[str, Path], sglang_python: Path, tmp_path: Path
) -> None:
    launch = LaunchConfig(python=sglang_python, args={"no_such_option": 3})
    server = start(folders["qwen2"], launch, tmp_path / "log")
    try:
        with pytest.raises(ServerFailed, match="(?s)ended with status.*--no-such-option"):
            server.wait_ready(120)
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
