"""Prompts split over ranks, responses scored where they were generated, groups put together again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.rollout.engine import Engine, EnginesLost, SamplingParams
from megatron_dgpo.types import Group, Prompt, Sample

log = logging.getLogger(__name__)

Score = Callable[[Sequence[Sample]], None]


class Recover(Protocol):
    """Told whether this rank has lost its engines; where any rank has, gets engines with the current
    weights for all and returns True. Collective over the run."""

    def __call__(self, *, needed: bool) -> bool: ...


def minibatch_shares(
    indices: Sequence[int], prompts_per_minibatch: int, replica: int, replicas: int
) -> list[list[int]]:
    """The prompts of a step that one data-parallel replica owns, by mini-batch.

    A mini-batch is a run of `prompts_per_minibatch` prompts of the step, whatever the number of
    replicas; each replica owns an equal share of each, so the split changes no mini-batch.
    """
    starts = range(0, len(indices), prompts_per_minibatch)
    return [list(indices[s : s + prompts_per_minibatch][replica::replicas]) for s in starts]


def collect(
    engine: Engine,
    score: Score,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    group: dist.ProcessGroup,
    *,
    recover: Recover | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> list[Group]:
    """Generate and score groups for `prompts`, which are the same on every rank of `group`.

    Each rank takes every size-th prompt. Returns all groups in the order of the prompts, on every
    rank. `on_progress` is called with the number of samples that this rank has finished since the
    last call. With `recover`, prompts that lost engines left unfinished are generated again; all ranks
    of the run must then be in this call, as `recover` is.
    """
    rank, size = group.rank(), group.size()
    mine = _generate(engine, prompts[rank::size], params, recover, on_progress)
    score([sample for g in mine for sample in g.samples])
    parts = platform.gather_objects(mine, group)
    return [parts[i % size][i // size] for i in range(len(prompts))]


def _generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    recover: Recover | None,
    on_progress: Callable[[int], object] | None,
) -> list[Group]:
    """Groups of all prompts, in order, whatever engines are lost on the way."""
    done: list[Group | None] = [None] * len(prompts)
    while True:
        left = [i for i, g in enumerate(done) if g is None]
        lost = False
        try:
            new: Sequence[Group | None] = engine.generate(
                [prompts[i] for i in left], params, on_progress=on_progress
            )
        except EnginesLost as error:
            if recover is None:
                raise
            log.warning("%s; %d of %d prompts are unfinished", error, error.groups.count(None), len(prompts))
            new, lost = error.groups, True
        for i, g in zip(left, new, strict=True):
            done[i] = g
        if recover is None or not recover(needed=lost):
            return [g for g in done if g is not None]
