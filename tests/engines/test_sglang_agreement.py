"""What ranks decide about servers that fail, without any server: each rank is a thread, and a server is
found dead by one rank's client at any moment of an update."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import patience

from megatron_dgpo import platform
from megatron_dgpo.config import LaunchConfig, SGLangConfig, SyncConfig
from megatron_dgpo.rollout.sglang import fleet as fleet_module
from megatron_dgpo.rollout.sglang.engine import SGLangEngine, WeightUpdateFailed
from megatron_dgpo.rollout.sglang.fleet import Fleet, FleetLost
from megatron_dgpo.rollout.sglang.servers import ServerFailed

URLS = ("http://a", "http://b")
RANKS = 2


class Gather:
    """`platform.gather_objects` between threads; `after[rank, number]` happens on a rank that has gathered
    what all say and has not gone on yet."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, int], Any] = {}
        self.counts = [0] * RANKS
        self._barrier = threading.Barrier(RANKS, timeout=patience())
        self._values: list[Any] = [None] * RANKS

    def __call__(self, value: Any, rank: int) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        out = list(self._values)
        self._barrier.wait()
        self.counts[rank] += 1
        self.after.get((rank, self.counts[rank]), lambda: None)()
        return out


class Session:
    """Servers that do whatever they are asked; `stubborn` do not go on afterwards."""

    def __init__(self, client: Any, stubborn: tuple[str, ...] = ()) -> None:
        self.refusals: dict[str, str] = {}
        self.client, self.stubborn = client, stubborn

    def pause(self) -> None: ...

    wake = begin = end = pause

    def resume(self, *, abort: bool = False) -> None:
        for url in self.stubborn:
            self.client.mark_dead(url, "it does not go on")


class Channel:
    def __init__(self, refusals: Mapping[str, str]) -> None:
        self.refusals, self.failed = dict(refusals), bool(refusals)
        self.closed = False

    def send(self, bucket: Any, version: int) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class Ranks:
    """One engine a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusals: Mapping[str, str] = {}, **session: Any):
        self.gather = Gather()
        monkeypatch.setattr(platform, "gather_objects", lambda value, world: self.gather(value, world.rank()))
        self.channels: list[Channel] = []
        self.back: list[str] = []
        """Servers that were dropped and answer again."""
        self.engines = [self._engine(r, refusals, session) for r in range(RANKS)]

    def _engine(self, rank: int, refusals: Mapping[str, str], session: dict[str, Any]) -> SGLangEngine:
        def alone(r: int = 0, size: int = 1) -> Any:
            return SimpleNamespace(rank=lambda: r, size=lambda: size)

        groups: Any = SimpleNamespace(
            rank=rank,
            world_size=RANKS,
            device=torch.device("cpu"),
            world=alone(rank, RANKS),
            tp=alone(rank, RANKS),
            **{name: alone() for name in ("pp", "dp")},
        )
        fleet: Any = SimpleNamespace(ranks=dict.fromkeys(URLS, 1), id="x", exited=dict, close=lambda: None)
        fleet.replaced = []

        def replace(dead: Mapping[str, str]) -> None:
            fleet.replaced.append(dict(dead))
            fleet.ranks = {url: 1 for url in fleet.ranks if url not in dead}

        fleet.replace = replace
        fleet.take_back = lambda: [fleet.ranks.setdefault(u, 1) and u for u in self.back]
        engine = SGLangEngine(
            fleet, groups, SGLangConfig(), SyncConfig(), decode=str, vocab_size=8, max_positions=8
        )
        engine._session = Session(engine.client, **session)  # type: ignore[assignment]

        def connect(stage: int) -> Channel:
            self.channels.append(Channel(refusals))
            return self.channels[-1]

        engine._connect = connect  # type: ignore[method-assign,assignment]
        return engine

    def update(self, version: int = 1) -> list[Any]:
        """What the update gives, or raises, on each rank."""

        def one(engine: SGLangEngine) -> Any:
            try:
                return engine.update_weights_by_stage(lambda: (), version)
            except Exception as error:
                return error

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(one, self.engines))

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


@pytest.mark.parametrize("rank", range(RANKS))
def test_ranks_stay_together_whenever_a_server_is_found_dead(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathers = 1
    moment = 0
    while moment < gathers:  # of an update in which nothing happens; more where something does
        moment += 1
        ranks = Ranks(monkeypatch)
        ranks.gather.after[rank, moment] = lambda r=ranks: r.engines[rank].client.mark_dead(URLS[0], "gone")
        first = ranks.update()
        if moment == 1:
            gathers = ranks.gather.counts[0]
        assert first[0] == first[1] and isinstance(first[0], bool), (moment, first)
        assert ranks.gather.counts[0] == ranks.gather.counts[1], moment
        second = ranks.update(2)
        assert first[0] or second[0], moment
        for engine in ranks.engines:
            assert engine._fleet.replaced == [{URLS[0]: "gone"}], moment  # type: ignore[attr-defined]
            assert engine.client.live == [URLS[1]] and engine.weight_version == 2, moment
        ranks.close()
    assert gathers >= 4


def test_what_one_rank_finds_during_the_repair_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    for engine in ranks.engines:
        engine.client.mark_dead(URLS[0], "gone")
    ranks.gather.after[1, 1] = lambda: ranks.engines[1].client.mark_dead(URLS[1], "gone too")
    assert ranks.update() == [True, True]
    for engine in ranks.engines:
        replaced = engine._fleet.replaced  # type: ignore[attr-defined]
        assert replaced == [{URLS[0]: "gone"}, {URLS[1]: "gone too"}]
    ranks.close()


def test_a_server_that_does_not_draw_again_is_dead_to_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, stubborn=(URLS[1],))
    assert ranks.update() == [False, False]
    for engine in ranks.engines:
        assert engine.client.live == [URLS[0]] and "does not go on" in engine.client.dead[URLS[1]]
        assert engine.weight_version == 1
    ranks.close()


def test_a_refusal_ends_the_update_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, refusals={URLS[1]: "no"})
    for error in ranks.update():
        assert isinstance(error, WeightUpdateFailed) and f"{URLS[1]} refused" in str(error)
    for engine in ranks.engines:
        assert engine.client.live == list(URLS) and engine.weight_version == -1
    assert [c.closed for c in ranks.channels] == [True]
    ranks.close()


def test_new_weights_may_draw_before_a_rank_knows_that_they_are_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(monkeypatch)
    ranks.update(3)
    resumed, seen = threading.Event(), []

    def resume(*_: Any, **__: Any) -> None:
        seen.extend(engine.client.version for engine in ranks.engines)
        resumed.set()

    monkeypatch.setattr(Session, "resume", resume)
    # Of as many gathers again, the last is after that.
    ranks.gather.after[1, 2 * ranks.gather.counts[1] - 1] = lambda: resumed.wait(patience())
    ranks.update(4)
    assert seen == [4, 4] and resumed.is_set()
    ranks.close()


def test_a_server_that_answers_again_is_in_the_next_group(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    ranks.update(1)
    for engine in ranks.engines:
        engine.client.mark_dead(URLS[0], "gone")
    assert ranks.update(2) == [True, True]
    assert ranks.update(3) == [False, False]
    ranks.back = [URLS[0]]
    assert ranks.update(4) == [True, True]
    for engine in ranks.engines:
        assert sorted(engine.client.live) == list(URLS) and not engine.client.dead
    assert [c.closed for c in ranks.channels] == [True, True, False]
    ranks.close()


def test_closing_leaves_the_servers_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    ranks.update()
    assert not ranks.channels[0].closed
    ranks.close()
    assert [c.closed for c in ranks.channels] == [True]


# --- servers that cannot be started again ---------------------------------------------------------------


class Process:
    """A managed server that does not exist; `broken` numbers come up once only."""

    broken: tuple[int, ...] = ()
    made: list[int] = []

    def __init__(self, model_path: Any, launch: Any, *, number: int, **how: Any) -> None:
        self.how = how
        self.number, self.url = number, f"http://{number}.{len(self.made)}"
        self.again = number in self.made
        self.made.append(number)

    def wait_ready(self, timeout: float) -> None:
        if self.again and self.number in self.broken:
            raise ServerFailed(f"server {self.number} has no memory")

    def terminate(self) -> None: ...

    def stop(self) -> None: ...


@pytest.mark.parametrize("broken", [(), (0,), (0, 1)])
def test_a_server_that_cannot_be_started_again_is_done_without(
    broken: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet_module, "ServerProcess", Process)
    monkeypatch.setattr(fleet_module, "check_server", lambda url, folder: 1)
    monkeypatch.setattr(platform, "gather_objects", lambda value, world: [value])
    monkeypatch.setattr(Process, "broken", broken)
    monkeypatch.setattr(Process, "made", [])
    groups: Any = SimpleNamespace(rank=0, world=None)
    config = SGLangConfig(launch=LaunchConfig(count=2))
    fleet = Fleet(config, groups, model_path=tmp_path, dtype="float32", log_folder=tmp_path)
    assert list(fleet.ranks) == ["http://0.0", "http://1.1"]
    dead = {url: "killed" for url in (list(fleet.ranks) if len(broken) == 2 else ["http://0.0"])}
    if len(broken) == 2:
        with pytest.raises(FleetLost, match="killed.*server 0 has no memory; server 1 has no memory"):
            fleet.replace(dead)
        return
    fleet.replace(dead)
    assert list(fleet.ranks) == (["http://1.1"] if broken else ["http://1.1", "http://0.2"])
    assert ("server 0 has no memory" in caplog.text) == bool(broken)


def test_servers_given_by_url_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """As often as managed ones would be started again."""
    away: set[str] = set()

    def check(url: str, folder: Any, timeout: float = 30.0) -> int:
        if url in away:
            raise ServerFailed(f"{url} does not answer")
        return 2

    monkeypatch.setattr(fleet_module, "check_server", check)
    monkeypatch.setattr(platform, "gather_objects", lambda value, world: [value])
    groups: Any = SimpleNamespace(rank=0, world=None)
    for more, returns in (({}, 3), ({"launch": LaunchConfig(max_restarts=1)}, 1)):
        config = SGLangConfig(urls=URLS, **more)
        fleet = Fleet(config, groups, model_path=tmp_path, dtype="float32", log_folder=tmp_path)
        assert fleet.take_back() == []
        for count in range(1, returns + 2):
            fleet.replace({URLS[0]: "killed"})
            assert list(fleet.ranks) == [URLS[1]]
            away.add(URLS[0])
            assert fleet.take_back() == []
            away.clear()
            assert fleet.take_back() == ([URLS[0]] if count <= returns else [])
        assert list(fleet.ranks) == [URLS[1]]


@pytest.mark.parametrize(("rank", "local", "numbers"), [(4, "0", [0, 1]), (5, "1", [])])
def test_the_first_rank_of_each_machine_starts_its_servers(
    rank: int, local: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Devices go by the number on the machine, logs by that in the run; other machines' servers are known."""
    monkeypatch.setattr(fleet_module, "ServerProcess", Process)
    monkeypatch.setattr(fleet_module, "check_server", lambda url, folder: 1)
    monkeypatch.setattr(fleet_module, "answers", lambda url, timeout: "far" not in url)
    monkeypatch.setattr(Process, "made", [])
    for name, value in {"LOCAL_RANK": local, "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    other = ("id", {"http://other": 1}), None
    monkeypatch.setattr(platform, "gather_objects", lambda value, world: [other, value])
    groups: Any = SimpleNamespace(rank=rank, world=None)
    config = SGLangConfig(launch=LaunchConfig(count=2), address="10.0.0.6")

    def fleet() -> Fleet:
        return Fleet(config, groups, model_path=tmp_path, dtype="float32", log_folder=tmp_path)

    made = fleet()
    assert made.id == "id" and Process.made == numbers
    assert list(made.ranks) == ["http://other", *(f"http://{n}.{n}" for n in numbers)]
    for n, process in made._processes.items():
        assert process.how["log_file"].name == f"server_{2 + n}.log" and process.how["host"] == "10.0.0.6"
    made.close()
    if numbers:
        other[0][1]["http://far"] = 1
        with pytest.raises(FleetLost, match=r"address: machine 1 does not reach http://far, which another"):
            fleet()


def test_the_address_at_which_other_machines_reach_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own, default = fleet_module.own_address, SGLangConfig().address
    assert own("hostname", 1) == socket.gethostname() and own("10.0.0.7", 2) == "10.0.0.7"
    assert own(default, 1) == "127.0.0.1"
    monkeypatch.setenv(
        "MASTER_ADDR", "127.0.1.1"
    )  # as some distributions have a machine's name in /etc/hosts
    try:
        found = own(default, 2)
    except ServerFailed as error:  # a machine without a network
        assert "rollout.sglang.address: this machine has no address" in str(error)
    else:
        with socket.socket() as listening:
            listening.bind((found, 0))
        assert not found.startswith("127.")
        monkeypatch.setenv("MASTER_ADDR", found)
        assert own(default, 2) == found
