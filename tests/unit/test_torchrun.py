"""Starts of the same run by torchrun: ranks that find each other, and errors that come back."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_dgpo import entry, torchrun
from megatron_dgpo.cli import ConfigError
from megatron_dgpo.entry import _goes_on, claim


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """A function that makes this process a rank of torchrun's, started again so many times."""

    def rank(number: int, restarts: int, left: int = 3) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts + left))
        monkeypatch.setenv("RANK", str(number))

    monkeypatch.setattr(torchrun, "_step", None)
    return rank


def meet_all(stores: list[dist.Store]) -> list[str]:
    """What each rank gets, of ranks that start in the opposite order."""
    got: dict[int, str] = {}

    def one(rank: int) -> None:
        got[rank] = torchrun.meet(stores[rank], rank, len(stores), 30)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(len(stores)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [got[rank] for rank in range(len(stores))]


def test_ranks_meet_under_a_new_name_at_each_start() -> None:
    """One store for all starts, as torchrun's agent keeps it; ranks that died while they waited have asked
    in it, and those of one machine may have been started more often than those of another."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3)]
    assert meet_all(stores) == ["start_1"] * 3
    server.set(f"{torchrun._MEETING}/asks/2", "asked by a rank that is dead")
    assert meet_all(stores) == ["start_2"] * 3
    with pytest.raises(TimeoutError, match=r"ranks \[2\] did not come in 0.1 s"):
        # Rank 1 has come, and rank 2's last token is that of the start before.
        server.set(f"{torchrun._MEETING}/asks/1", "new")
        server.set(f"{torchrun._MEETING}/has/new", "start_3")
        torchrun.meet(server, 0, 3, 0.1)
    server.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError):
        torchrun.meet(server, 1, 3, 0.1)


def test_a_run_goes_on_where_its_own_launch_began_it(
    tmp_path: Path, launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "_LEAVING_SECONDS", 0.3)
    config = SimpleNamespace(run=SimpleNamespace(resume=False, folder=tmp_path))
    assert not _goes_on(config)
    (tmp_path / ".lock").write_text("another machine's agent")
    (tmp_path / torchrun.FOLDER).mkdir()
    launched(0, 1)
    assert not _goes_on(config)  # a run that was there before
    launched(0, 0)
    lock = claim(tmp_path)
    assert lock is not None and not (tmp_path / torchrun.FOLDER).exists()
    with pytest.raises(ConfigError, match="another run is writing"):
        claim(tmp_path)
    threading.Timer(0.1, lock.close).start()  # as a process that an earlier start has left over
    again = claim(tmp_path)
    assert again is not None
    again.close()
    assert _goes_on(config)
    launched(1, 1)
    assert _goes_on(config)
    launched(1, 0)
    assert not _goes_on(config)
    config.run.resume = True
    assert _goes_on(config)


def test_an_error_that_comes_back_ends_the_run(tmp_path: Path, launched) -> None:
    def fail(restarts: int, error: Exception, *, step: int | None = None, lost: bool = False) -> str:
        launched(0, restarts)
        if step is not None:
            torchrun.reached(step)
        return torchrun.note_failure(tmp_path, 0, error, lost=lost)

    assert fail(0, FloatingPointError("7")) == ""
    assert fail(1, FloatingPointError("8"), step=3) == ""  # it got further
    assert fail(2, OSError("disk"), step=3) == ""
    assert fail(3, FloatingPointError("9"), step=3) == ""
    assert torchrun.ended(tmp_path) == ""
    why = fail(4, FloatingPointError("10"), step=3)
    assert why == "FloatingPointError after step 3, 2 times in a row: torchrun does not start the run again"
    assert torchrun.ended(tmp_path) == why
    assert [row["message"] for row in torchrun.failures(tmp_path, 0)] == ["7", "8", "disk", "9", "10"]
    torchrun.forget(tmp_path)
    # Machines may fail twice at one step; at the third time there is something about the step.
    lost = [fail(n, RuntimeError(f"peer {n}"), step=5, lost=True) for n in range(3)]
    assert lost[:2] == ["", ""] and lost[2].startswith("ranks were lost after step 5, 3 times in a row")
    torchrun.forget(tmp_path)
    launched(0, 3, left=0)  # torchrun says itself that it is over
    assert [torchrun.note_failure(tmp_path, 0, ValueError(), lost=False) for _ in range(2)] == ["", ""]


def test_only_an_agent_that_would_restart_and_listens_is_ended(
    launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    torchrun.end_agent()
    launched(0, 1, left=0)
    torchrun.end_agent()
    launched(0, 1)
    monkeypatch.setattr(torchrun, "_catches_sigterm", lambda pid: False)
    torchrun.end_agent()
    assert sent == []
    monkeypatch.setattr(torchrun, "_catches_sigterm", lambda pid: True)
    torchrun.end_agent()
    assert sent == [(os.getppid(), 15)]
