"""How weights travel to SGLang servers: one process group a pipeline stage, or shared memory.

A transport never raises for what a server does: it notes it, ignores what is still to be sent, and the
engine decides. Ranks that gather weights with this one must not be left waiting by an exception.
"""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_for
from datetime import timedelta
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.rollout.sglang.client import ServerError, SGLangClient
from megatron_dgpo.types import WeightBucket

log = logging.getLogger(__name__)

_GRACE_SECONDS = 15.0
"""After a group or a broadcast was broken off, how long a server that was in it may take to say so."""
_ARRIVAL_SECONDS = 1.0
"""How long a server may take, as a rule, from the request to join until it is there."""
_LEAVE_SECONDS = 4.0
"""How long it may take, here and at the servers, to leave a group that is not needed any more."""


class Transport(Protocol):
    """Sends buckets to a fixed set of servers."""

    refusals: dict[str, str]
    """What servers answered that would not join or take a bucket, by URL; they are alive."""
    failed: bool
    """Whether anything went wrong since it was made; then it sends nothing any more. Servers that are in
    neither `refusals` nor the client's dead were only held up by the others."""

    def send(self, bucket: WeightBucket, version: int) -> None:
        """Send a bucket; its buffer is free again when `bucket.in_use()` returns."""
        ...

    def finish(self) -> None:
        """Wait until every server took everything, or something failed."""
        ...

    def close(self) -> None:
        """Have the servers leave, if nothing failed. Takes a few seconds at most and raises nothing."""
        ...


class _Sender:
    """Requests to all servers for one bucket at a time, and what became of them."""

    def __init__(self, client: SGLangClient, servers: Sequence[str], timeout_seconds: float) -> None:
        self.client = client
        self.servers = list(servers)
        self.timeout_seconds = timeout_seconds
        self.refusals: dict[str, str] = {}
        self.failed = False
        self._answers: dict[str, Future[Any]] = {}

    def post(self, path: str, payloads: Mapping[str, dict[str, Any]]) -> None:
        """Ask every server of `payloads`, without waiting."""
        # `settle` breaks off when the time is over. The request lasts longer: a server that only waited
        # for another one answers then, and is told apart by that from the one that hangs.
        limit = self.timeout_seconds + 2 * _GRACE_SECONDS
        self._answers = {
            url: self.client.submit(url, path, payload, timeout=limit) for url, payload in payloads.items()
        }

    def post_bucket(self, path: str, payloads: Mapping[str, dict[str, Any]], bucket: WeightBucket) -> None:
        self.post(path, payloads)
        answers = self._answers
        # Its buffer is free once every server has answered, or given up; a later one's is another matter.
        bucket.in_use = lambda: self.settle() if self._answers is answers else None

    def finish(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Wait for the answers; at the first failure break off and find out whose fault it was."""
        answers, self._answers = self._answers, {}
        if not answers:
            return
        waited_for = [*answers.values(), *self.beside()]
        done, late = wait_for(waited_for, timeout=self.timeout_seconds, return_when=FIRST_EXCEPTION)
        if not late and not any(a.exception() for a in done):
            self.answered()
            return
        self.failed = True
        first = {url: e for url, a in answers.items() if a.done() and (e := a.exception())}
        refused = any(isinstance(error, ServerError) for error in first.values())
        self.break_off(answers.values())
        for url, answer in answers.items():
            error = answer.exception() if answer.done() else TimeoutError("it does not answer any more")
            if not isinstance(error, ServerError | None):
                self.client.mark_dead(url, f"during a weight sync: {error}")
            elif url in first:
                self.refusals[url] = str(error)
            else:
                self.held_up(url, error, refused=refused)

    def beside(self) -> Sequence[Future[Any]]:
        """What else has to come to an end before the servers' answers mean success."""
        return ()

    def answered(self) -> None:
        """Every server took what was sent."""

    def break_off(self, answers: Collection[Future[Any]]) -> None:
        """Free servers that wait for more of it, and give them time to answer."""
        wait_for(answers, timeout=_GRACE_SECONDS)

    def held_up(self, url: str, error: ServerError | None, *, refused: bool) -> None:
        """A server that did its part, or would have but for another's failure, or refusal."""
        if error is not None:
            log.info("%s was held up by another server's failure: %s", url, error)


class Broadcast(_Sender):
    """A process group of this rank (0) and every server's ranks; each bucket is one broadcast in it.

    NCCL on GPUs, gloo on CPUs. Joining blocks the servers, so all are asked at once.

    Args:
        ranks: server URL -> its tensor-parallel size.
        name: of the group; never used before by these servers.
        address: where servers reach this process; "hostname": this machine's name.
    """

    def __init__(
        self,
        client: SGLangClient,
        ranks: Mapping[str, int],
        *,
        name: str,
        address: str,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        super().__init__(client, list(ranks), timeout_seconds)
        self.name = name
        self.group: dist.ProcessGroup | None = None
        """None once it was broken off."""
        self._device = device
        self._stuck = False
        """Whether servers may hang in a broadcast that was broken off."""
        self._work: dist.Work | None = None
        self._sending: Future[None] | None = None
        self._joining: list[Future[dist.ProcessGroup]] = []
        address = socket.gethostname() if address == "hostname" else address
        world_size = 1 + sum(ranks.values())
        limit = timedelta(seconds=timeout_seconds)
        # The store finds a free port by itself and keeps it. It lives as long as this: members that wait in
        # it for the others are freed when it goes.
        self._store_arguments: dict[str, Any] = dict(
            host_name=address,
            port=0,
            world_size=world_size,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
        )
        self._store: dist.TCPStore | None = dist.TCPStore(**self._store_arguments)
        port = self._store_arguments["port"] = self._store.port
        payloads, offset = {}, 1
        for url, size in ranks.items():
            payloads[url] = dict(
                master_address=address,
                master_port=port,
                rank_offset=offset,
                world_size=world_size,
                group_name=name,
                backend="nccl" if device.type == "cuda" else "gloo",
            )
            offset += size
        self.post("/init_weights_update_group", payloads)
        joining: Future[dist.ProcessGroup] = Future()
        self._joining = [joining]
        threading.Thread(
            target=_join,
            args=(joining, address, port, name, world_size, device, timeout_seconds),
            daemon=True,
        ).start()
        # Joining waits for all; a server that cannot come says so long before that times out.
        self.settle()
        if joining.done() and joining.exception() is not None:
            log.warning("the group for weights was not formed: %s", joining.exception())

    def beside(self) -> Sequence[Future[Any]]:
        return [*self._joining, *([self._sending] if self._sending else [])]

    def send(self, bucket: WeightBucket, version: int) -> None:
        self.settle()
        if self.failed or self.group is None:
            return
        payload = dict(
            names=bucket.names,
            dtypes=[str(bucket.dtype).removeprefix("torch.")] * len(bucket.names),
            shapes=bucket.shapes,
            group_name=self.name,
            load_format="flattened_bucket",
            flush_cache=True,
            weight_version=str(version),
        )
        self.post_bucket("/update_weights_from_distributed", dict.fromkeys(self.servers, payload), bucket)
        # In a thread: NCCL's first broadcast meets the servers, without a limit of time, before it returns.
        self._sending = Future()
        what = (bucket.flat.view(torch.uint8), self.group, self._sending)
        threading.Thread(target=self._broadcast, args=what, daemon=True).start()

    def _broadcast(self, flat: Tensor, group: dist.ProcessGroup, sent: Future[None]) -> None:
        try:
            if flat.is_cuda:
                # A new thread is on the first device; its stream is the default one, as the trainer's is.
                torch.cuda.set_device(flat.device)
            self._work = dist.broadcast(flat, group=group, group_src=0, async_op=True)
            sent.set_result(None)
        except Exception as error:
            log.warning("a broadcast of weights failed: %s", error)
            sent.set_exception(error.with_traceback(None))  # its frames would keep the bucket and the group

    def answered(self) -> None:
        if self._joining:
            self.group = self._joining.pop().result()
        self._sending = None
        # The servers have all of it, so this does not wait for long.
        if self._work is not None:
            self._work.wait()
            self._work = None

    def break_off(self, answers: Collection[Future[Any]]) -> None:
        joining, self._joining = self._joining, []
        for each in joining:
            each.add_done_callback(_discard)
            self._free_joiners(answers)
        self._stuck = self._device.type == "cuda" and self._sending is not None
        self._drop_group(abort=True)
        if not joining:
            super().break_off(answers)

    def held_up(self, url: str, error: ServerError | None, *, refused: bool) -> None:
        # A server answers before the data are there, and ending NCCL's group here does not end it there.
        # Where another one refused, the run ends, and nothing has to be replaced.
        if self._stuck and not refused:
            self.client.mark_dead(url, "it took part in a broadcast that was broken off")
        else:
            super().held_up(url, error, refused=refused)

    def _free_joiners(self, answers: Collection[Future[Any]]) -> None:
        """Members that wait for others answer at once when the store goes. One that comes too late for that
        would look for it for half an hour, so there is a store again for it, until that goes too."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            if not wait_for(answers, timeout=_ARRIVAL_SECONDS).not_done:
                break
            self._store = None
            if not wait_for(answers, timeout=_ARRIVAL_SECONDS).not_done:
                break
            try:
                self._store = dist.TCPStore(**self._store_arguments)
            except RuntimeError as error:
                log.info("no second store for late servers: %s", error)

    def _drop_group(self, *, abort: bool) -> None:
        held, self.group, self._work, self._sending = [self._work, self.group], None, None, None
        if held[1] is not None:
            # Its last reference must be the thread's: gloo waits, where that goes, until the group's time-out
            # for a server that refused what is being broadcast.
            leaving = threading.Thread(target=_destroy, args=(held, abort), daemon=True)
            leaving.start()
            leaving.join(_LEAVE_SECONDS)
        self._store = None

    def close(self) -> None:
        path, payload = "/destroy_weights_update_group", {"group_name": self.name}
        alive = [] if self.failed else [url for url in self.servers if url in self.client.live]
        # NCCL's members on one machine leave together: beside an abort, or without a member that died, they
        # would wait for ever. Then the servers keep the group, which nobody uses again.
        broken = self.failed or (self._device.type == "cuda" and len(alive) < len(self.servers))
        leaving = [] if broken else alive
        asked = [self.client.submit(url, path, payload, timeout=_LEAVE_SECONDS) for url in leaving]
        self._drop_group(abort=broken)
        for answer in asked:
            if (failure := answer.exception()) is not None:
                log.info("a server may still have the group for weights: %s", failure)


def _join(
    joined: Future[dist.ProcessGroup],
    address: str,
    port: int,
    name: str,
    world_size: int,
    device: torch.device,
    timeout_seconds: float,
) -> None:
    """Become rank 0 of a group that is none of torch's own: the servers' ranks belong to other worlds.

    torch has no public call for it; SGLang uses the same helper on its side.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    try:
        limit = timedelta(seconds=timeout_seconds)
        # A connection like the servers', so that this thread does not keep the store itself.
        store = dist.TCPStore(address, port, world_size, is_master=False, timeout=limit)
        on_gpu = device.type == "cuda"
        backend = Backend("nccl" if on_gpu else "gloo")
        # NCCL ends the whole process at this limit, so that whoever waits for the servers must give up first.
        lasting = 2 * limit + timedelta(minutes=2) if on_gpu else limit
        group, _ = _new_process_group_helper(
            world_size,
            0,
            [],
            backend,
            PrefixStore(name, store),
            group_name=name,  # type: ignore[arg-type]
            timeout=lasting,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        joined.set_result(group)
    except BaseException as error:
        joined.set_exception(error)


def _discard(joined: Future[dist.ProcessGroup]) -> None:
    """A group that came about after all, when it was not wanted any more."""
    if joined.exception() is None:
        _destroy([joined.result()], abort=True)


def _destroy(held: list[Any], abort: bool) -> None:
    """End a group, the last of these objects; `abort`: what is under way in it will not come to an end."""
    try:
        if abort:
            held[-1].abort()
        dist.destroy_process_group(held[-1])
    except Exception as error:
        log.warning("leaving the group for weights: %s", error)
    held.clear()


class SharedMemory(_Sender):
    """Buckets that the servers open in this machine's memory: CUDA IPC, or files in /dev/shm on a CPU.

    For servers on the trainer's own GPUs, where a broadcast has nowhere to go. Every TP rank of a stage has
    the bucket and makes the handles for the server's ranks on its GPU; the first one sends them all. A
    handle is opened once, by one rank: CUDA's counts of who still uses the memory go wrong otherwise.
    Built, used and closed by the stage's TP ranks together.

    Args:
        ranks: server URL -> its tensor-parallel size.
    """

    def __init__(
        self,
        client: SGLangClient,
        ranks: Mapping[str, int],
        groups: platform.Groups,
        *,
        timeout_seconds: float,
    ) -> None:
        super().__init__(client, list(ranks), timeout_seconds)
        self._tp, self._ranks = groups.tp, ranks
        self._first = groups.tp.rank() == 0
        known = (groups.device.index, self._first_gpus() if self._first else {})
        told = platform.gather_objects(known, groups.tp)
        owners = handle_owners(ranks, told[0][1], [gpu for gpu, _ in told])
        self._mine = [place for place, owner in owners.items() if owner == groups.tp.rank()]
        self._shared: Tensor | None = None

    def _first_gpus(self) -> dict[str, int]:
        """The GPU of each server's first rank; a server that does not say is found out by what follows."""
        asked = {
            url: self.client.submit(url, "/server_info", timeout=self.timeout_seconds, method="GET")
            for url in self.servers
        }
        wait_for(asked.values())
        found = {url: a.result() for url, a in asked.items() if a.exception() is None}
        return {url: int(info.get("base_gpu_id") or 0) for url, info in found.items()}

    def send(self, bucket: WeightBucket, version: int) -> None:
        self.settle()
        texts: dict[tuple[str, int], str] = {}
        if self._mine:
            whole = self._shared = _shareable(bucket.flat)  # kept until the servers have read it
            parts = whole.split([torch.Size(s).numel() for s in bucket.shapes])
            named = [(n, p.view(s)) for n, p, s in zip(bucket.names, parts, bucket.shapes, strict=True)]
            texts = {place: _pickled(named) for place in self._mine}
        for others in platform.gather_objects(texts, self._tp):
            texts |= others
        bucket.in_use = self._read
        if self._first and not self.failed:
            payloads = {
                url: dict(
                    serialized_named_tensors=[texts[url, r] for r in range(size)],
                    flush_cache=True,
                    weight_version=str(version),
                )
                for url, size in self._ranks.items()
            }
            self.post("/update_weights_from_tensor", payloads)

    def _read(self) -> None:
        """Wait until the servers have read the bucket, or given up; on all TP ranks."""
        self.settle()
        platform.gather_objects(None, self._tp)
        self._shared = None

    def close(self) -> None:
        self._shared = None
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()


def handle_owners(
    ranks: Mapping[str, int], first_gpus: Mapping[str, int], gpus: Sequence[int | None]
) -> dict[tuple[str, int], int]:
    """(server, its TP rank) -> which of the trainer's TP ranks makes its handle: the one on the same GPU
    where there is one (a server's rank on another opens a context on the maker's), else in turn.

    Args:
        ranks: server URL -> its tensor-parallel size.
        first_gpus: server URL -> the GPU of its first rank.
        gpus: of the trainer's TP ranks; None on a CPU.
    """
    return {
        (url, r): gpus.index(gpu) if (gpu := first_gpus.get(url, 0) + r) in gpus else r % len(gpus)
        for url, size in ranks.items()
        for r in range(size)
    }


def _shareable(flat: Tensor) -> Tensor:
    """Itself on a GPU, whose memory has handles; a copy in shared memory otherwise."""
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)  # the servers do not wait for this process's streams
        return flat
    # Descriptors would have to be passed over a socket that the server knows nothing of.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return torch.empty_like(flat).share_memory_().copy_(flat)


def _pickled(named: list[tuple[str, Tensor]]) -> str:
    out = BytesIO()
    ForkingPickler(out).dump(named)
    return base64.b64encode(out.getvalue()).decode()
