"""Training runs under torchrun on real SGLang servers that die, and with ranks that die.

They change the weights of a server of the session, so they come after the tests of test_sglang_sync.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import trouble_ranks
from launch import Launch
from patience import patience
from spawn import run_ranks
from test_sglang_sync import _servers_of
from tiny import write_tokenizer

from megatron_dgpo.observe.metrics import read_metrics
from megatron_dgpo.rollout.sglang.servers import ServerProcess

CONFIG = """
[model]
path = "{model}"
[run]
folder = "{folder}"
[parallel]
timeout_seconds = {patience}
[data]
train = ["{model}/data.jsonl"]
apply_chat_template = false
max_prompt_tokens = 16
[rollout]
engine = "sglang"
max_new_tokens = 24
[rollout.sglang]
request_timeout_seconds = {limit}
[rollout.sglang.launch]
startup_timeout_seconds = {limit}
[reward]
name = "exact_match"
[train]
prompts_per_step = 4
samples_per_prompt = 4
prompts_per_minibatch = 4
[optimizer]
lr = 1e-3
[sync]
timeout_seconds = {limit}
"""


@pytest.fixture(scope="module")
def model(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(folders["llama"], folder)
    write_tokenizer(folder)
    rows = [{"prompt": f"{n}+{n}=", "answer": str(n % 10)} for n in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(
    module: str, model: Path, folder: Path, *words: object, nproc: int = 2, log: str = "log", **how: Any
) -> Launch:
    config = folder / "run.toml"
    config.write_text(
        CONFIG.format(model=model, folder=folder / "run", patience=patience(1800), limit=patience())
    )
    return Launch(module, nproc, (config, *words), folder / log, **how)


def steps(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "run" / "metrics.jsonl").exists():
        return []
    return [row for row in read_metrics(folder / "run") if row["phase"] == "train"]


def server_of(launch: Launch) -> psutil.Process:
    """The one that the run has started."""
    family = psutil.Process(launch.process.pid).children(recursive=True)
    return next(p for p in family if os.getpgid(p.pid) == p.pid and p.parent() in launch.workers())


def test_a_server_that_is_killed_costs_a_run_with_async_steps_nothing(
    model: Path, warm_python: Path, tmp_path: Path
) -> None:
    words = ("--train.steps", 4, "--train.async_steps", 1, "--algorithm.tis_cap", 2.0)
    words += ("--parallel.tensor_model_parallel_size", 2)
    words += ("--rollout.sglang.launch.python", warm_python)
    launch = start("megatron_dgpo.train", model, tmp_path, *words)
    try:
        launch.wait_until(lambda: len(steps(tmp_path)) == 1)
        os.killpg(server_of(launch).pid, signal.SIGKILL)
        launch.succeed()
    finally:
        launch.kill()
    assert "starting SGLang server" in launch.output
    rows = steps(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["response_length"] > 0 and row["sync_log_prob_gap"] < 1e-4 for row in rows)
    stale = [row["staleness"] for row in rows]
    # What the dead server had not finished was drawn again, under the current weights.
    assert stale[0] == 0 and stale[-1] == 1 and max(stale) == 1, stale
    assert not _servers_of(tmp_path)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_server_whose_trainer_dies_in_a_sync_serves_the_next_start(
    rank: int,
    model: Path,
    servers: dict[str, ServerProcess],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 speaks for all and sends the first stage's weights; rank 1 sends the second stage's."""
    note, url = tmp_path / "note", servers["llama"].url
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("DIES", str(rank))
    monkeypatch.setenv("NOTE", str(note))
    words = ("--train.steps", 3, "--parallel.pipeline_model_parallel_size", 2)
    words += ("--rollout.sglang.urls", f'["{url}"]')
    launch = start("dies_in_sync", model, tmp_path, *words, max_restarts=1)
    try:
        launch.wait_until(note.exists)
        family = psutil.Process(launch.process.pid).children(recursive=True)
        launch.succeed()  # sooner than any collective's time-out
    finally:
        launch.kill()
    assert not psutil.wait_procs(family, timeout=patience())[1]
    assert [row["step"] for row in steps(tmp_path)] == [1, 2, 3]
    (seen,) = run_ranks(trouble_ranks.to_one_server, 1, model, url)
    assert not seen["error"] and seen["difference"] <= 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="several addresses of one machine stand for machines")
def test_each_machine_has_servers_and_all_of_it_starts_again(
    model: Path, sglang_python: Path, tmp_path: Path
) -> None:
    """Two torchruns, each with a rank and a server at an address of its own. A server that is killed is
    started again by its machine's rank; a rank that is killed costs both machines a start and new servers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    words = ("--train.steps", 4, "--checkpoint.every", 1, "--rollout.sglang.launch.python", sglang_python)
    words += ("--rollout.sglang.retries", 0)
    how: dict[str, Any] = dict(nproc=1, machines=2, meeting=meeting, max_restarts=1)
    launches = [
        start(
            "megatron_dgpo.train", model, tmp_path, *words, "--resume", "--rollout.sglang.address", address,
            log=f"log_{address}", **how,
        )
        for address in ("127.0.0.2", "127.0.0.3")
    ]  # fmt: skip
    first, second = launches
    try:
        second.wait_until(lambda: len(steps(tmp_path)) >= 1)
        before = [server_of(launch).pid for launch in launches]
        os.killpg(before[1], signal.SIGKILL)
        second.wait_until(lambda: len(steps(tmp_path)) >= 2)
        between = [server_of(launch).pid for launch in launches]
        assert between[0] == before[0] and between[1] != before[1]
        second.workers()[0].kill()
        for launch in launches:
            launch.succeed()
    finally:
        for launch in launches:
            launch.kill()
    again = [re.findall(r"starting SGLang server (\S+):\d+ again", launch.output) for launch in launches]
    assert again == [[], ["http://127.0.0.3"]]
    assert f"resumed from {tmp_path}" in first.output + second.output
    rows = steps(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sync_log_prob_gap"] < 1e-4 for row in rows)
    assert not _servers_of(tmp_path)
