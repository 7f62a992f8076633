"""How weights travel to servers, without any server: who shares what, and what becomes of a group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import patience

from megatron_dgpo.rollout.sglang import transport
from megatron_dgpo.rollout.sglang.client import ServerError, ServerGone
from megatron_dgpo.rollout.sglang.transport import Broadcast, handle_owners
from megatron_dgpo.types import WeightBucket


@pytest.mark.parametrize(
    ("ranks", "first_gpus", "gpus", "wanted"),
    [
        # One server over the trainer's four GPUs: each rank shares its own bucket with its own GPU.
        ({"a": 4}, {"a": 0}, [0, 1, 2, 3], {("a", r): r for r in range(4)}),
        # Two servers of two; the second one's ranks are on GPUs 2 and 3.
        (
            {"b": 2, "a": 2},
            {"a": 0, "b": 2},
            [0, 1, 2, 3],
            {("a", 0): 0, ("a", 1): 1, ("b", 0): 2, ("b", 1): 3},
        ),
        # A second pipeline stage on GPUs 4 to 7 has nobody on the first four, and takes turns there.
        ({"a": 8}, {"a": 0}, [4, 5, 6, 7], {("a", r): r % 4 for r in range(8)}),
        # Two TP ranks on the second half of four GPUs.
        ({"a": 1, "b": 1}, {"a": 3, "b": 0}, [2, 3], {("a", 0): 1, ("b", 0): 0}),
        # A CPU has no numbers.
        ({"a": 2, "b": 1}, {}, [None, None], {("a", 0): 0, ("a", 1): 1, ("b", 0): 0}),
    ],
)
def test_each_server_rank_has_a_handle_of_its_own_from_its_own_gpu(
    ranks: dict[str, int],
    first_gpus: dict[str, int],
    gpus: list[int | None],
    wanted: dict[tuple[str, int], int],
) -> None:
    assert handle_owners(ranks, first_gpus, gpus) == wanted


# --- what becomes of a group ----------------------------------------------------------------------------


class Group:
    """A process group that has been formed, and what is done with it."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def abort(self) -> None:
        self.did.append("abort")


class Servers:
    """Answers to control calls: at once, or, for what is in `answers`, that; None never comes."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], BaseException | None] = {}
        self.dead: dict[str, str] = {}
        self.left: list[str] = []
        """Servers that were asked to leave the group."""

    @property
    def live(self) -> list[str]:
        return [url for url in URLS if url not in self.dead]

    def mark_dead(self, url: str, reason: str) -> None:
        self.dead[url] = reason

    def submit(self, url: str, path: str, payload: Any, *, timeout: float) -> Future[Any]:
        if path == "/destroy_weights_update_group":
            self.left.append(url)
        answer: Future[Any] = Future()
        error = self.answers.get((path, url), answer)
        if error is answer:
            answer.set_result({})
        elif error is not None:
            answer.set_exception(error)  # type: ignore[arg-type]
        return answer


URLS = ("http://a", "http://b")
UPDATE = "/update_weights_from_distributed"


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Broadcast, Group, Servers]]:
    """A broadcast to two servers whose group has been formed; the trainer is on this kind of device."""
    group = Group()
    monkeypatch.setattr(transport, "_join", lambda joining, *_: joining.set_result(group))
    monkeypatch.setattr(transport, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(transport.dist, "destroy_process_group", lambda g: g.did.append("destroy"))
    monkeypatch.setattr(transport.dist, "broadcast", lambda flat, **_: SimpleNamespace(wait=lambda: None))

    def make(device: str) -> tuple[Broadcast, Group, Servers]:
        servers: Any = Servers()
        made = Broadcast(
            servers,
            dict.fromkeys(URLS, 1),
            name="x",
            address="127.0.0.1",
            device=torch.device(device),
            timeout_seconds=patience(),
        )
        assert not made.failed and made.group is group
        return made, group, servers

    return make


def bucket() -> WeightBucket:
    return WeightBucket(["w"], [(4,)], torch.float32, torch.zeros(4))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_group_that_is_well_is_left_and_not_aborted(device: str, formed: Any) -> None:
    """On one machine NCCL's members wait for each other when they leave: an abort leaves them waiting."""
    made, group, servers = formed(device)
    made.send(bucket(), 1)
    made.finish()
    made.close()
    assert group.did == ["destroy"] and not servers.dead
    assert servers.left == list(URLS)


def test_without_a_member_that_died_only_gloo_s_others_leave(formed: Any) -> None:
    for device, did, left in (("cpu", ["destroy"], [URLS[1]]), ("cuda", ["abort", "destroy"], [])):
        made, group, servers = formed(device)
        group.did.clear()
        servers.mark_dead(URLS[0], "killed between two syncs")
        made.close()
        assert (group.did, servers.left) == (did, left)


@pytest.mark.parametrize(
    ("device", "lost"),
    [
        ("cpu", [URLS[0]]),  # gloo's members are freed by the end of the connection, and kept
        ("cuda", list(URLS)),  # NCCL's have answered and wait in a kernel, which nobody ends from here
    ],
)
def test_who_is_lost_with_a_member_of_a_broadcast(device: str, lost: list[str], formed: Any) -> None:
    made, group, servers = formed(device)
    servers.answers[UPDATE, URLS[0]] = ServerGone(URLS[0], "killed")
    made.send(bucket(), 1)
    made.finish()
    assert made.failed and sorted(servers.dead) == lost
    made.close()
    assert group.did == ["abort", "destroy"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_refusal_costs_nobody(device: str, formed: Any) -> None:
    """The run ends with it, and the servers are left as they are."""
    made, group, servers = formed(device)
    servers.answers[UPDATE, URLS[0]] = ServerError(URLS[0], UPDATE, 400, "wrong shape")
    made.send(bucket(), 1)
    made.finish()
    assert made.failed and not servers.dead and list(made.refusals) == [URLS[0]]
    made.close()
    assert group.did[0] == "abort"
