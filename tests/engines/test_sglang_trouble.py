"""Real SGLang servers beside ones that refuse, hang or die in the middle of a weight sync.

Its tests change the weights of the session's servers, so they come after those of test_sglang_sync.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trouble_ranks
from patience import patience
from spawn import run_ranks

from megatron_dgpo.config import LaunchConfig
from megatron_dgpo.rollout.sglang.servers import ServerProcess

BOUND = 1e-4
SOON = patience(300)
"""Without waiting for a time-out, which is patience() where a test does not say another."""


def test_a_server_that_does_not_join_takes_no_other_down(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    given = folders["llama"], servers["llama"].url
    (seen,) = run_ranks(trouble_ranks.beside_one_that_does_not_join, 1, *given)
    refused, url = seen["refuses"], seen["url"]
    assert f"{refused['other']} refused a weight update" in refused["error"] and not refused["dead"]
    assert url not in refused["error"]
    assert seen["alone"]["difference"] <= BOUND
    hung = seen["hangs"]
    assert hung["left"] == [url] and hung["difference"] <= BOUND and not hung["error"]
    assert refused["seconds"] < SOON and hung["seconds"] < SOON, seen
    assert seen["alone"]["closing"] < SOON, seen


def test_servers_without_sessions_and_servers_that_fail(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    given = folders["llama"], servers["llama"].url
    (seen,) = run_ranks(trouble_ranks.other_servers, 1, *given)
    old = seen["without sessions"]
    assert old["difference"] <= BOUND and not old["error"]
    assert "/end_weight_update" not in old["calls"]
    for name, path in (("500 at begin", "/begin_weight_update"), ("500 at update", trouble_ranks.UPDATE)):
        failed = seen[name]
        assert failed["error"].startswith(f"{failed['url']} refused a weight update"), failed
        assert f"{path} answered 500: made to fail" in failed["error"]
        assert failed["seconds"] < SOON, failed
        # Drawing was stopped once, and goes on.
        assert failed["calls"].count("/pause_generation") == 1
        assert failed["calls"][-1] == "/continue_generation"
        assert seen[f"after {name}"]["difference"] <= BOUND
    assert seen["after without sessions"]["difference"] <= BOUND


def test_a_tensor_parallel_server_beside_a_small_one(
    folders: dict[str, Path],
    servers: dict[str, ServerProcess],
    warm_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three server ranks the first two are one server's."""
    # SGLang wants a NUMA node for each rank of a CPU server, or to be told its cores.
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    launch = LaunchConfig(python=warm_python, tensor_parallel_size=2)
    wide = ServerProcess(folders["llama"], launch, number=0, dtype="float32", log_file=tmp_path / "log")
    try:
        wide.wait_ready(patience())
        urls = (wide.url, servers["llama"].url)
        ranks = run_ranks(trouble_ranks.from_stages, 2, folders["llama"], urls)
    finally:
        wide.stop()
    for seen in ranks[0]:
        assert seen["left"] == list(urls) and seen["difference"] <= BOUND, seen
    # Colocated, each of the trainer's ranks makes the handles of the servers' ranks beside it.
    first, second = (shared["mine"] for _, shared in ranks)
    assert sorted(first) == sorted([(url, 0) for url in urls]) and second == [(wide.url, 1)]


def test_servers_killed_while_a_stage_sends_are_started_again(
    folders: dict[str, Path], warm_python: Path
) -> None:
    by_rank = run_ranks(
        trouble_ranks.managed_servers_killed_at_each_stage,
        4,
        folders["qwen3"],
        warm_python,
        timeout=patience(1800),
    )
    seen = by_rank[0]
    assert max(map(max, seen["differences"])) <= BOUND and len(seen["differences"]) == 3
    start, first, second = seen["pids"]
    # One was replaced each time, and the other went on.
    assert first[0] == start[1] and first[1] not in start
    assert second[0] == first[0] and second[1] not in (*start, *first)
    for each in by_rank:
        for n in (0, 1):  # with both servers, and with the one that is left
            assert each[f"complete {n}"] and each[f"versions {n}"] == {3}
