"""Drawing samples while the caller does something else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from megatron_dgpo.rollout.engine import Engine, SamplingParams
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.types import Group, Prompt

log = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5
_GIVE_UP_SECONDS = 60.0
"""How long an engine may take to end a call that was given up."""


class Ahead:
    """A call of `Engine.generate` that goes on in a thread from the moment this is made.

    It then stands in for the engine: the first `generate` waits for the call and gives what it gave, or
    raises what it raised; later ones, for what lost engines left over, go to the engine itself.

    Args:
        race: told of complete groups, and may stop the call.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        race: Race | None = None,
    ) -> None:
        self._engine, self._prompts, self._params, self._race = engine, prompts, params, race
        self._given_up = threading.Event()
        self._taken = False
        self._done = 0
        self._groups: Sequence[Group | None] = ()
        self._error: BaseException | None = None
        # A daemon: a call that never ends must not keep a failed run from ending.
        self._thread = threading.Thread(target=self._run, name="rollout ahead", daemon=True)
        self._thread.start()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], object] | None = None,
        on_group: Callable[[Group], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Sequence[Group | None]:
        """As the engine's. The first call has to be for what has begun, and its race is the one that was
        given then. Raises ValueError where it is for something else."""
        if self._taken:
            return self._engine.generate(
                prompts, params, on_progress=on_progress, on_group=on_group, should_stop=should_stop
            )
        if params != self._params or [p.id for p in prompts] != [p.id for p in self._prompts]:
            raise ValueError("other samples have been drawn ahead than are asked for now")
        self._taken = True
        reported = 0
        while True:
            self._thread.join(_REPORT_SECONDS)  # the engine's own time-outs end it
            ended, done = not self._thread.is_alive(), self._done
            if on_progress is not None and done > reported:
                on_progress(done - reported)
                reported = done
            if ended:
                break
        if self._error is not None:
            raise self._error
        return self._groups

    def give_up(self) -> None:
        """End the call; nobody wants its groups any more."""
        self._given_up.set()
        self._thread.join(_GIVE_UP_SECONDS)
        if self._thread.is_alive():
            log.warning("the engine still draws samples that were given up %g s ago", _GIVE_UP_SECONDS)

    def _run(self) -> None:
        try:
            self._groups = self._engine.generate(
                self._prompts,
                self._params,
                on_progress=self._count,
                on_group=None if self._race is None else self._race.on_group,
                should_stop=self._stops,
            )
        except BaseException as error:  # raised where the groups are asked for
            self._error = error

    def _count(self, samples: int) -> None:
        self._done += samples

    def _stops(self) -> bool:
        return self._given_up.is_set() or (self._race is not None and self._race.should_stop())
