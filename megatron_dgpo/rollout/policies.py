"""How the groups of a step come about: draws of prompts, until enough of what they give is usable.

A draw is one batch of prompts, numbered through the run. Its number alone says which prompts it has and
which random numbers they meet. Without dynamic sampling and aborted samples every step is one draw.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from megatron_dgpo import platform
from megatron_dgpo.config import Config
from megatron_dgpo.rollout.ahead import Ahead
from megatron_dgpo.rollout.collect import Recover, Score, collect, rank_share
from megatron_dgpo.rollout.engine import Engine, SamplingParams
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.rollout.select import Selection, Tally, Verdict, verdict
from megatron_dgpo.types import Group, Prompt

Phase = Callable[[str, int, str], AbstractContextManager[Any]]
"""(name, how many, of what) -> progress with `update(samples)`."""


class NotEnoughGroups(RuntimeError):
    """Dynamic sampling has drawn as often as it may and the step is still not full."""


@dataclass
class Draw:
    """A draw as it begins."""

    number: int
    prompts: Sequence[Prompt]
    """This replica's: every dp-th."""
    params: SamplingParams
    race: Race | None
    ahead: Ahead | None = None
    """Where samples are being drawn already."""


@dataclass
class Rollout:
    """The groups of a step."""

    minibatches: list[list[Group]]
    """This replica's share of each."""
    tally: Tally

    @property
    def groups(self) -> list[Group]:
        return [g for groups in self.minibatches for g in groups]


def samples_of(groups: platform.Groups) -> str:
    """What this rank counts."""
    return "samples" if groups.world_size == 1 else f"samples of rank {groups.rank}"


class Rollouts:
    """Draws, scores and selects the groups of each step; the same calls on every rank.

    Args:
        prompts_of: the prompts of a draw in order, the same on every rank, none twice.
        params_of: the sampling parameters of a draw.
        recover: gets new engines where some were lost (see `collect`).
        stop_early: stop a draw on all ranks as soon as enough of its groups are usable; the engine must
            take `should_stop`. Which groups these are depends on time.
    """

    def __init__(
        self,
        config: Config,
        groups: platform.Groups,
        engine: Engine,
        score: Score,
        *,
        prompts_of: Callable[[int], Sequence[Prompt]],
        params_of: Callable[[int], SamplingParams],
        recover: Recover | None = None,
        stop_early: bool = False,
    ) -> None:
        self._config = config
        self._groups = groups
        self._engine = engine
        self._score = score
        self._prompts_of = prompts_of
        self._params_of = params_of
        self._recover = recover
        self._ahead: Draw | None = None
        self._store = None
        if stop_early:
            name = platform.gather_objects(uuid.uuid4().hex, groups.world)[0]
            self._store = platform.shared_store(f"rollouts-{name}")

    def step(self, first_draw: int, phase: Phase) -> Rollout:
        """The groups of a step whose first draw has this number; collective over all ranks.

        Raises NotEnoughGroups after rollout.max_rounds draws.
        """
        c = self._config
        selection = Selection(
            c.train.prompts_per_step, need_variance=c.rollout.dynamic_sampling, dp=self._groups.dp
        )
        tally = selection.tally
        while selection.missing:
            if tally.rounds == c.rollout.max_rounds:
                raise NotEnoughGroups(_shortage(c, selection))
            draw = self._begun(first_draw + tally.rounds, selection.missing)
            selection.add(self._collect(draw, phase))
        return Rollout(selection.minibatches(c.train.prompts_per_minibatch), tally)

    def start(self, first_draw: int) -> None:
        """Begin the first draw of the step after this one, in a thread that calls the engine and nothing
        else; the next `step` takes what came of it."""
        draw = self._begin(first_draw, self._config.train.prompts_per_step)
        mine = rank_share(draw.prompts, self._groups.replica)
        draw.ahead = Ahead(self._engine, mine, draw.params, draw.race)
        self._ahead = draw

    def close(self) -> None:
        """Give up what is being drawn ahead."""
        draw, self._ahead = self._ahead, None
        if draw is not None and draw.ahead is not None:
            draw.ahead.give_up()
            if draw.race is not None:
                draw.race.close()

    def _begun(self, number: int, wanted: int) -> Draw:
        """The draw of this number, which may have begun ahead."""
        draw, self._ahead = self._ahead, None
        if draw is None:
            return self._begin(number, wanted)
        if draw.number != number:
            raise ValueError(f"draw {number} is asked for, and draw {draw.number} has begun")
        return draw

    def _begin(self, number: int, wanted: int) -> Draw:
        dp = self._groups.dp
        mine = self._prompts_of(number)[dp.rank() :: dp.size()]
        return Draw(number, mine, self._params_of(number), self._race(number, wanted))

    def _collect(self, draw: Draw, phase: Phase) -> list[Group]:
        """This replica's groups of a draw, scored; those that were given up have no samples."""
        replica = self._groups.replica
        share = len(rank_share(draw.prompts, replica)) * draw.params.n
        with phase("rollout", share, samples_of(self._groups)) as bar:
            return collect(
                draw.ahead or self._engine,
                self._score,
                draw.prompts,
                draw.params,
                replica,
                race=draw.race,
                recover=self._recover,
                on_progress=bar.update,
            )

    def _race(self, draw: int, wanted: int) -> Race | None:
        if self._store is None:
            return None
        differ = self._config.rollout.dynamic_sampling
        return Race(
            self._store,
            str(draw),
            wanted=wanted,
            score=self._score,
            counts=lambda group: verdict(group, need_variance=differ) is Verdict.USABLE,
        )


def _shortage(c: Config, selection: Selection) -> str:
    n = selection.tally.verdicts
    right, wrong = n[Verdict.ALL_RIGHT], n[Verdict.ALL_WRONG]
    change = f"more rounds (rollout.max_rounds is {c.rollout.max_rounds})"
    if c.rollout.dynamic_sampling:
        change = (
            f"{'easier' if wrong > right else 'harder'} prompts in data.train, more "
            f"train.samples_per_prompt, {change}, or rollout.dynamic_sampling = false"
        )
    return (
        f"rollout: {c.train.prompts_per_step - selection.missing} of train.prompts_per_step = "
        f"{c.train.prompts_per_step} groups are usable after {selection.tally.rounds} draws of "
        f"{c.prompts_per_draw} prompts; of {n.total()} groups {right} were all right, {wrong} all wrong, "
        f"{n[Verdict.NO_REWARD]} without a reward, {n[Verdict.UNFINISHED]} not finished. Use {change}"
    )
