"""Groups scored while others are drawn, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from megatron_dgpo.types import Group, Sample


class Scoring:
    """Scores groups one after the other, in the order in which they come, and hands each on.

    A reward may take its time or run an event loop of its own. Engines call `on_group` where they draw,
    which may be in an event loop too: it only puts the group in a queue.

    When the block ends, all groups that came are scored and handed on, also where drawing ended with an
    error (but not where the user ended it). Raises what `score` or `keep` raised; nothing is scored after
    that, and `failed` tells the engine to stop.

    Args:
        score: sets the samples' rewards.
        keep: gets each group when it is scored, in the thread.
    """

    def __init__(self, score: Callable[[Sequence[Sample]], None], keep: Callable[[Group], object]) -> None:
        self._score, self._keep = score, keep
        self._come: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._dropped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    def on_group(self, group: Group) -> None:
        self._come.put(group)

    def failed(self) -> bool:
        """Whether nothing more can be scored."""
        return self._error is not None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._dropped.set()
        self._come.put(None)
        self._thread.join()  # scoring has time-outs of its own
        if self._error is not None and not self._dropped.is_set():
            raise self._error

    def _run(self) -> None:
        try:
            while (group := self._come.get()) is not None and not self._dropped.is_set():
                self._score(group.samples)
                self._keep(group)
        except BaseException as error:  # raised at the block's end, in the thread that can end the program
            self._error = error
