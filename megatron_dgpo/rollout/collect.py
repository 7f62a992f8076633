"""Prompts split over ranks, responses scored where they were generated, groups put together again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.rollout.ahead import Ahead
from megatron_dgpo.rollout.engine import Engine, EnginesLost, SamplingParams
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.types import Group, Prompt, Sample

log = logging.getLogger(__name__)

Score = Callable[[Sequence[Sample]], None]


class Recover(Protocol):
    """Told whether this rank has lost its engines; where any rank has, gets engines with the current
    weights for all and returns True. Collective over the run."""

    def __call__(self, *, needed: bool) -> bool: ...


def rank_share(prompts: Sequence[Prompt], group: dist.ProcessGroup) -> Sequence[Prompt]:
    """The prompts that this rank of a replica draws: every size-th."""
    return prompts[group.rank() :: group.size()]


def collect(
    engine: Engine | Ahead,
    score: Score,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    group: dist.ProcessGroup,
    *,
    race: Race | None = None,
    recover: Recover | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> list[Group]:
    """Generate and score groups for `prompts`, which are the same on every rank of `group`.

    Each rank takes its `rank_share`. Returns all groups in the order of the prompts, on every
    rank. `on_progress` is called with the number of samples that this rank has finished since the
    last call. A `race` scores groups as they come and may stop the engine; the groups that were not
    complete by then have no samples. With `recover`, prompts that lost engines left unfinished are
    generated again; all ranks of the run must then be in this call, as `recover` is.
    """
    size, share = group.size(), rank_share(prompts, group)
    drawn = _generate(engine, share, params, race, recover, on_progress)
    mine = [Group(p, []) if g is None else g for p, g in zip(share, drawn, strict=True)]
    if race is None:
        score([sample for g in mine for sample in g.samples])
    else:
        race.finish(mine)
    parts = platform.gather_objects(mine, group)
    return [parts[i % size][i // size] for i in range(len(prompts))]


def _generate(
    engine: Engine | Ahead,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    race: Race | None,
    recover: Recover | None,
    on_progress: Callable[[int], object] | None,
) -> list[Group | None]:
    """Groups of all prompts, in order, whatever engines are lost on the way; None for what a race ended."""
    done: list[Group | None] = [None] * len(prompts)
    while True:
        left = [i for i, g in enumerate(done) if g is None]
        lost = False
        try:
            new = engine.generate(
                [prompts[i] for i in left],
                params,
                on_progress=on_progress,
                on_group=None if race is None else race.on_group,
                should_stop=None if race is None else race.should_stop,
            )
        except EnginesLost as error:
            if recover is None:
                raise
            log.warning("%s; %d of %d prompts are unfinished", error, error.groups.count(None), len(prompts))
            new, lost = error.groups, True
        for i, g in zip(left, new, strict=True):
            done[i] = g
        if recover is None or not recover(needed=lost):
            return done
