"""Weights into real SGLang servers, from trainers of several splits, and what happens when one fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import sync_ranks
from patience import patience, until
from spawn import run_ranks
from tiny import write_model

from megatron_dgpo import platform
from megatron_dgpo.rollout.sglang.servers import ServerProcess

SPLITS = [{"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2}]
"""On four ranks, so that the last two have a second replica that sends nothing."""
BOUND = 1e-4


def test_engines_have_the_trainers_weights(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    urls = {
        "qwen2": (servers["qwen2"].url, servers["ends"].url),
        "qwen3": (servers["qwen3"].url,),
        "llama": (servers["llama"].url,),
    }
    cases = [(folders[family], given) for family, given in urls.items()]
    by_family = run_ranks(sync_ranks.syncs_at_splits, 4, cases, SPLITS)[0]
    for family, results in zip(urls, by_family, strict=True):
        assert [count for count, *_ in results] == [0, 1, 5, 1, 1]
        for count, from_transformers, from_trainer in results:
            assert from_transformers <= BOUND and from_trainer <= BOUND, (family, count, results)


def test_colocated_engines_get_the_weights_through_shared_memory(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    given = folders["llama"], servers["llama"].url, [{"tp": 2}, {"pp": 2}]
    results = run_ranks(sync_ranks.colocated, 2, *given)[0]
    assert len(results) == 4 and max(map(max, results)) <= BOUND, results


def test_another_model_is_refused(
    folders: dict[str, Path], servers: dict[str, ServerProcess], tmp_path: Path
) -> None:
    url = servers["ends"].url
    wider = write_model(tmp_path / "wider", tied=True, hidden_size=64)
    (error,) = run_ranks(sync_ranks.refused, 1, wider, url)
    assert error.startswith("WeightUpdateFailed") and url in error, error
    # The same shapes; only the log-probs can tell.
    other = tmp_path / "rope"
    shutil.copytree(folders["qwen2"], other)
    hf = json.loads((other / "config.json").read_text())
    hf["rope_parameters"]["rope_theta"] *= 3
    (other / "config.json").write_text(json.dumps(hf))
    (error,) = run_ranks(sync_ranks.refused, 1, other, url)
    assert error.startswith("SyncMismatch") and url in error and "sync.max_log_prob_gap" in error, error


def test_given_servers_that_die_are_dropped_until_they_answer_again(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    """The last test of this module that uses these servers: it ends them."""
    urls = (servers["qwen2"].url, servers["ends"].url)
    (seen,) = run_ranks(sync_ranks.given_servers_that_die, 1, folders["qwen2"], urls)
    assert seen["left"] == [urls[1]]
    assert seen["back"] == sorted(urls)
    assert max(seen["difference"]) <= BOUND
    assert seen["seconds"] < patience(300)
    assert seen["generate"].startswith("EnginesLost") and urls[1] in seen["generate"]
    assert seen["push"].startswith("FleetLost") and urls[1] in seen["push"]


def test_a_managed_server_that_dies_is_started_again(folders: dict[str, Path], warm_python: Path) -> None:
    (seen,) = run_ranks(
        sync_ranks.managed_server_killed_twice, 1, folders["qwen2"], warm_python, timeout=patience(1800)
    )
    assert seen["prompts"] == [f"p{i}" for i in range(16)]
    assert seen["samples"] == [2] * 16
    assert seen["scored once"]
    assert seen["versions"] == {3}
    assert max(seen["difference"]) <= BOUND
    assert seen["restarts"] == 2
    assert not _servers_of(folders["qwen2"] / "servers")


def test_a_server_that_waits_in_a_broadcast_ends_with_the_trainer(
    folders: dict[str, Path], sglang_python: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    command = [sys.executable, sync_ranks.__file__, str(folders["qwen2"]), str(sglang_python), str(note)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen(command, env=env)
    try:
        until(lambda: note.exists() or trainer.poll() is not None, "a server that waits")
        server = psutil.Process(int(note.read_text()))
        family = [server, *server.children(recursive=True)]
        assert len(family) > 2
        if sys.platform == "linux" and not platform.has_gpu():
            # All are forks of the first: another program would have been loaded to other addresses. SGLang's
            # own choice, to spawn them, makes a start three times as long.
            assert len({Path(f"/proc/{member.pid}/auxv").read_bytes() for member in family}) == 1
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    _, alive = psutil.wait_procs(family, timeout=patience())
    assert not alive


def _servers_of(log_folder: Path) -> list[int]:
    """Processes that still write to logs in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(f.path.startswith(str(log_folder)) for f in process.open_files()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
