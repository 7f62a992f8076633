"""SGLang servers as the one rollout engine of all ranks.

Every rank sends its own prompts to all servers. The first rank of each machine starts and ends the managed
servers there. Rank 0 opens and closes weight updates; on each pipeline stage of the first data-parallel
replica, the first TP rank sends that stage's weights (colocated: each TP rank shares them with the servers of
its GPU).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence

import torch

from megatron_dgpo import platform
from megatron_dgpo.config import SGLangConfig, SyncConfig
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.rollout.sglang.client import ServerGone, ServerTimeout, SGLangClient
from megatron_dgpo.rollout.sglang.fleet import Fleet
from megatron_dgpo.rollout.sglang.servers import weight_version
from megatron_dgpo.rollout.sglang.session import UpdateSession
from megatron_dgpo.rollout.sglang.transport import Broadcast, SharedMemory, Transport
from megatron_dgpo.types import Group, Prompt, WeightBucket

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Full weight updates that are tried, each after the servers that failed were replaced."""


class WeightUpdateFailed(RuntimeError):
    """The servers could not be given the weights; nothing may be generated any more."""


class SGLangEngine:
    """`Engine` over the servers of a run; built and closed by all ranks together.

    It holds no usable weights until the first update, whatever the servers were started with. Which
    random numbers a server draws is its own business: samples are not reproducible.

    Args:
        fleet: the servers (see `Fleet`).
        decode: token ids to text, for the samples.
        vocab_size, max_positions: of the model; ids and lengths beyond them are refused.
        max_new_tokens: the most that a sample may have, from which its time-out follows; None: any.

    Raises:
        ServerFailed: on every rank, where the servers do not come up or serve another model.
    """

    def __init__(
        self,
        fleet: Fleet,
        groups: platform.Groups,
        config: SGLangConfig,
        sync: SyncConfig,
        *,
        decode: Callable[[Sequence[int]], str],
        vocab_size: int,
        max_positions: int,
        max_new_tokens: int | None = None,
    ) -> None:
        self.everywhere = config.colocate
        """Servers open the weights of colocated trainers where these are: on the GPU of each rank."""
        self._fleet = fleet
        self._groups = groups
        self._config = config
        self._timeout = sync.timeout_seconds
        self._version = -1
        self._group_number = 0
        self._dead: dict[str, str] = {}
        """What the last `_agree` found on any rank, and why; the same on every rank."""
        self.transport: Transport | None = None
        """How this rank's weights go to the servers, once they have; None on ranks that send none."""
        self.client = SGLangClient(
            list(fleet.ranks),
            generate_url=config.router or None,
            max_concurrency=max(1, config.max_concurrent_requests // groups.world_size),
            request_timeout=config.sample_timeout(max_new_tokens or max_positions),
            retries=config.retries,
            decode=decode,
            vocab_size=vocab_size,
            max_positions=max_positions,
        )
        self._session = UpdateSession(
            self.client, in_flight=sync.in_flight, timeout_seconds=sync.timeout_seconds
        )

    @property
    def weight_version(self) -> int:
        """The version of the weights in use; -1 before the first complete update."""
        return self._version

    def close(self) -> None:
        """Leave the servers; those that this rank started are ended."""
        self._disconnect()
        self.client.close()
        self._fleet.close()

    # --- drawing ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], object] | None = None,
        on_group: Callable[[Group], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Group | None]:
        """`params.n` samples for each prompt, groups in the order of the prompts.

        Raises EnginesLost with what is complete when no server is left, ValueError for a prompt that
        no server may see, RuntimeError without weights.
        """
        if self._version < 0:
            raise RuntimeError("the engine has no complete weights: update them first")
        return self.client.generate(
            prompts, params, on_progress=on_progress, on_group=on_group, should_stop=should_stop
        )

    def rest(self) -> None:
        """Nothing is drawn until the next update: colocated servers give their memory up meanwhile.

        Collective. Raises WeightUpdateFailed on all ranks where a server refuses.
        """
        if self._config.colocate:
            if self._groups.rank == 0:
                self._session.rest()
            self._agree()

    def probe(self, token_ids: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """On rank 0, the log-probs of given sequences by every live server, by URL; none elsewhere."""
        out = {}
        for url in sorted(self.client.live) if self._groups.rank == 0 else ():
            try:
                out[url] = self.client.log_probs(url, token_ids)
            except (ServerGone, ServerTimeout) as error:
                self.client.mark_dead(url, str(error))
        return out

    def log_probs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score given sequences at temperature 1, by one of the servers."""
        return self.client.log_probs(min(self.client.live), token_ids)

    # --- weights ----------------------------------------------------------------------------------

    def adopt(self, version: int) -> None:
        """The servers hold the right weights already, from their own start: they are this version.

        Raises ServerFailed for a server that does not say what it calls them. A server that has others
        later, by whatever hand, gives answers that raise BadAnswer.
        """
        self.client.own_names = {weight_version(url): version for url in self.client.live}
        self._version = self.client.version = version

    def update_weights_by_stage(self, buckets: Callable[[], Iterable[WeightBucket]], version: int) -> bool:
        """Give every server the weights; collective over all ranks. Whether servers were replaced.

        Servers that died since are replaced first, and so are those that fail on the way, after which
        the whole update is done again: a server never draws with weights of two versions.

        Args:
            buckets: what this rank's pipeline stage owns, gathered over TP, from the beginning.

        Raises (on all ranks):
            ValueError: for a version older than the one in use.
            WeightUpdateFailed: a server refused the weights, or none could be kept alive.
        """
        if version < max(self._version, 0):
            raise ValueError(f"weight version {version} is older than the engine's {self._version}")
        complete = changed = False
        self.client.hold()
        # From now on: rank 0 lets the servers draw again before the others know that the update is complete.
        self.client.version = version
        if self.client.own_names:
            self.client.own_names = {**self.client.own_names, str(version): version}
        if self._config.colocate:
            torch.cuda.empty_cache()  # what this process only keeps, the servers need when they wake
        try:
            changed = self._take_back()
            for _ in range(_ATTEMPTS):
                changed = self._heal() or changed
                if complete := self._attempt(buckets, version):
                    break
            else:
                raise WeightUpdateFailed(f"weight version {version} did not arrive in {_ATTEMPTS} attempts")
        finally:
            self._version = self.client.version = version if complete else -1
            if not complete:
                self._disconnect()  # a server that waits for more of it would hear nothing else
            if self._groups.rank == 0:
                self._session.resume(abort=not complete)
            if complete:
                self._agree()  # a server that does not draw again is dead to all ranks
            self.client.release()
        return changed

    def _attempt(self, buckets: Callable[[], Iterable[WeightBucket]], version: int) -> bool:
        """One whole update; whether all servers have it."""
        speaks = self._groups.rank == 0
        if speaks:
            self._session.pause()
            self._session.wake()
        for stage in range(self._groups.pp.size()):
            # One after the other: a server that joins one group is deaf for the next.
            if self._is_source(stage) and self.transport is None:
                self.transport = self._connect(stage)
            if not self._agree():
                return False
        if speaks:
            self._session.begin()
        ok = self._agree()
        mine = buckets() if ok and self._groups.dp.rank() == 0 else ()
        for stage in range(self._groups.pp.size()):
            if ok and self._groups.pp.rank() == stage:
                self._send(mine, version)
            agreed = self._agree()
            ok = ok and agreed
        if speaks and ok:
            self._session.end()
        return self._agree() and ok

    def _send(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Gather what this stage owns, to the end, and send it."""
        for bucket in buckets:
            if self.transport is not None:
                self.transport.send(bucket, version)
        if self.transport is not None:
            self.transport.finish()

    def _is_source(self, stage: int) -> bool:
        g = self._groups
        return g.pp.rank() == stage and g.dp.rank() == 0 and (self.everywhere or g.tp.rank() == 0)

    def _connect(self, stage: int) -> Transport:
        ranks = {url: size for url, size in self._fleet.ranks.items() if url in self.client.live}
        if self._config.colocate:
            return SharedMemory(self.client, ranks, self._groups, timeout_seconds=self._timeout)
        self._group_number += 1
        return Broadcast(
            self.client,
            ranks,
            name=f"megatron_dgpo-{self._fleet.id}-{stage}-{self._group_number}",
            address=self._fleet.address,
            device=self._groups.device,
            timeout_seconds=self._timeout,
        )

    # --- servers that fail ------------------------------------------------------------------------

    def _agree(self) -> bool:
        """Tell all ranks which servers are dead; whether the update can go on. The same on every rank.

        Raises WeightUpdateFailed on all ranks when a server that lives refused its part of it.
        """
        transport = self.transport
        refusals = {**self._session.refusals, **(transport.refusals if transport else {})}
        failed = transport is not None and transport.failed
        reports = platform.gather_objects((self.client.dead, refusals, failed), self._groups.world)
        # From what was gathered alone: what this rank's own client finds out meanwhile, others do not know.
        self._dead = {}
        for dead, _, _ in reports:
            self._dead = {**dead, **self._dead}
        for url, reason in self._dead.items():
            self.client.mark_dead(url, reason)
        if self._dead:
            return False  # a server that died makes others refuse; the next attempt does without it
        for _, refused, _ in reports:
            for url, message in refused.items():
                raise WeightUpdateFailed(f"{url} refused a weight update: {message}")
        return not any(failed for _, _, failed in reports)

    def _heal(self) -> bool:
        """Replace servers that are dead; a new set of servers gets new process groups. Whether it did."""
        for url, reason in self._fleet.exited().items():
            self.client.mark_dead(url, reason)
        if self._agree():
            return False
        self._disconnect()
        if not self._dead:
            return False
        self._fleet.replace(self._dead)
        self._set_servers(self._dead)
        return True

    def _take_back(self) -> bool:
        """Servers given by URL that were dropped and answer again are used again. Whether there are any."""
        if back := self._fleet.take_back():
            self._disconnect()  # the group is another one with them
            self._set_servers(back)
        return bool(back)

    def _set_servers(self, known: Container[str]) -> None:
        """Use the fleet's servers; but for `known` ones, what this rank found dead meanwhile stays so."""
        late = {url: reason for url, reason in self.client.dead.items() if url not in known}
        self.client.set_servers(list(self._fleet.ranks))
        for url, reason in late.items():
            self.client.mark_dead(url, reason)

    def _disconnect(self) -> None:
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.close()
