"""How weights travel to SGLang servers: one process group a pipeline stage, or shared memory.

A transport never raises for what a server does: it notes it, ignores what is still to be sent, and the
engine decides. Ranks that gather weights with this one must not be left waiting by an exception.
"""

from __future__ import annotations

import base64
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
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

from megatron_dgpo.rollout.sglang.client import ServerError, SGLangClient
from megatron_dgpo.types import WeightBucket

log = logging.getLogger(__name__)

_GRACE_SECONDS = 15.0
"""After a broadcast was broken off, how long a server that was in it may take to say so."""


class Transport(Protocol):
    """Sends buckets to a fixed set of servers."""

    refusals: dict[str, str]
    """What servers answered that did not take a bucket, by URL; they are alive."""
    failed: bool
    """Whether anything went wrong since it was made; then it sends nothing any more."""

    def send(self, bucket: WeightBucket, version: int) -> None:
        """Send a bucket; its buffer is free again when `bucket.in_use()` returns."""
        ...

    def finish(self) -> None:
        """Wait until every server took everything, or something failed."""
        ...

    def close(self) -> None: ...


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
        self._answers = {
            url: self.client.submit(url, path, payload, timeout=self.timeout_seconds)
            for url, payload in payloads.items()
        }

    def post_bucket(self, path: str, payloads: Mapping[str, dict[str, Any]], bucket: WeightBucket) -> None:
        self.post(path, payloads)
        answers = self._answers
        # Its buffer is free once every server has answered, or given up; a later one's is another matter.
        bucket.in_use = lambda: self.settle() if self._answers is answers else None

    def finish(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Wait for the answers; at the first failure break off and find out who is still there."""
        answers, self._answers = self._answers, {}
        if not answers:
            return
        wait_for(answers.values(), return_when=FIRST_EXCEPTION)
        if not any(a.done() and a.exception() for a in answers.values()):
            self.answered()
            return
        self.failed = True
        self.break_off()
        wait_for(answers.values(), timeout=_GRACE_SECONDS)
        for url, answer in answers.items():
            error = answer.exception() if answer.done() else TimeoutError("it does not answer any more")
            if isinstance(error, ServerError):
                self.refusals[url] = str(error)
            elif error is not None:
                self.client.mark_dead(url, f"during a weight sync: {error}")

    def answered(self) -> None:
        """Every server took what was sent."""

    def break_off(self) -> None:
        """Free servers that wait for more of it."""


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
        self._work: dist.Work | None = None
        address = socket.gethostname() if address == "hostname" else address
        world_size = 1 + sum(ranks.values())
        limit = timedelta(seconds=timeout_seconds)
        # The store finds a free port by itself and keeps it.
        store = dist.TCPStore(address, 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)
        payloads, offset = {}, 1
        for url, size in ranks.items():
            payloads[url] = dict(
                master_address=address,
                master_port=store.port,
                rank_offset=offset,
                world_size=world_size,
                group_name=name,
                backend="nccl" if device.type == "cuda" else "gloo",
            )
            offset += size
        self.post("/init_weights_update_group", payloads)
        joining: Future[dist.ProcessGroup] = Future()
        threading.Thread(
            target=_join, args=(joining, store, name, world_size, device, limit), daemon=True
        ).start()
        # Joining waits for all; a server that cannot come says so long before that times out.
        wait_for([joining, *self._answers.values()], return_when=FIRST_EXCEPTION)
        if joining.done() and joining.exception() is None:
            self.group = joining.result()
        elif joining.done():
            log.warning("the group for weights was not formed: %s", joining.exception())
        self.settle()
        self.failed = self.failed or self.group is None

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
        self._work = dist.broadcast(
            bucket.flat.view(torch.uint8), group=self.group, group_src=0, async_op=True
        )

    def answered(self) -> None:
        # The servers have all of it, so this does not wait for long.
        if self._work is not None:
            self._work.wait()
            self._work = None

    def break_off(self) -> None:
        self._drop_group()

    def _drop_group(self) -> None:
        group, self.group, self._work = self.group, None, None
        if group is not None:
            group.abort()
            dist.destroy_process_group(group)

    def close(self) -> None:
        """Leave the group, here and at the servers that are there."""
        alive = [url for url in self.servers if url in self.client.live]
        if not self.failed:
            self.post("/destroy_weights_update_group", dict.fromkeys(alive, {"group_name": self.name}))
        self._drop_group()
        self.settle()


def _join(
    joined: Future[dist.ProcessGroup],
    store: dist.Store,
    name: str,
    world_size: int,
    device: torch.device,
    limit: timedelta,
) -> None:
    """Become rank 0 of a group that is none of torch's own: the servers' ranks belong to other worlds.

    torch has no public call for it; SGLang uses the same helper on its side.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    try:
        backend = Backend("nccl" if device.type == "cuda" else "gloo")
        group, _ = _new_process_group_helper(
            world_size,
            0,
            [],
            backend,
            PrefixStore(name, store),
            group_name=name,  # type: ignore[arg-type]
            timeout=limit,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        joined.set_result(group)
    except BaseException as error:
        joined.set_exception(error)


class SharedMemory(_Sender):
    """Buckets that the servers open in this machine's memory: CUDA IPC, or files in /dev/shm on a CPU.

    For servers on the trainer's own GPUs, where a broadcast has nowhere to go.

    Args:
        ranks: server URL -> its tensor-parallel size.
    """

    def __init__(self, client: SGLangClient, ranks: Mapping[str, int], *, timeout_seconds: float) -> None:
        super().__init__(client, list(ranks), timeout_seconds)
        self._ranks = ranks
        self._shared: Tensor | None = None

    def send(self, bucket: WeightBucket, version: int) -> None:
        self.settle()
        if self.failed:
            return
        whole = _shareable(bucket.flat)
        parts = whole.split([torch.Size(s).numel() for s in bucket.shapes])
        named = [(n, p.view(s)) for n, p, s in zip(bucket.names, parts, bucket.shapes, strict=True)]
        text = _pickled(named)
        payloads = {
            url: dict(serialized_named_tensors=[text] * size, flush_cache=True, weight_version=str(version))
            for url, size in self._ranks.items()
        }
        self._shared = whole  # kept until the servers have read it
        self.post_bucket("/update_weights_from_tensor", payloads, bucket)

    def answered(self) -> None:
        self._shared = None

    def close(self) -> None:
        self._shared = None


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
