"""Counting groups over all ranks while they are drawn, so that no rank draws on when there are enough."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist

from megatron_dgpo.types import Group, Sample

_POLL_SECONDS = 0.1
"""How often a rank looks how far the others are."""


class Race:
    """Scores groups as they come and adds those that count to a number that all ranks share.

    Scoring and the store's round trips are in a thread of the race's own: `on_group` and `should_stop`
    never wait, so an engine may call them from wherever it likes.

    Args:
        store: shared by all ranks; `key` is used by this race alone.
        wanted: groups, over all ranks, that are enough.
        counts: whether a group, scored, is one of them.
    """

    def __init__(
        self,
        store: dist.Store,
        key: str,
        *,
        wanted: int,
        score: Callable[[Sequence[Sample]], None],
        counts: Callable[[Group], bool],
    ) -> None:
        self._store, self._key, self._wanted = store, key, wanted
        self._score, self._counts = score, counts
        self._come: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._enough = threading.Event()
        self._scored: set[int] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="race", daemon=True)
        self._thread.start()

    def on_group(self, group: Group) -> None:
        """A group is complete."""
        self._come.put(group)

    def should_stop(self) -> bool:
        """Whether there are enough groups over all ranks (or none can be scored any more)."""
        return self._enough.is_set()

    def finish(self, groups: Iterable[Group]) -> None:
        """Leave the race: when this returns, every sample of this rank's `groups` is scored.

        Raises what scoring or the store raised.
        """
        self.close()
        if self._error is not None:
            raise self._error
        self._score([s for g in groups if id(g) not in self._scored for s in g.samples])

    def close(self) -> None:
        """Leave the race, whatever came of it."""
        self._come.put(None)
        self._thread.join()  # scoring has time-outs of its own

    def _run(self) -> None:
        try:
            while True:
                found = 0
                try:
                    group = self._come.get(timeout=_POLL_SECONDS)
                    if group is None:
                        return
                    self._score(group.samples)
                    self._scored.add(id(group))
                    found = int(self._counts(group))
                except queue.Empty:
                    pass
                if self._store.add(self._key, found) >= self._wanted:
                    self._enough.set()
        except BaseException as error:  # raised by finish, in the thread that can end the run
            self._error = error
            self._enough.set()
