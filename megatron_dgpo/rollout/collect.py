"""Prompts split over ranks, responses scored where they were generated, groups put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.rollout.engine import Engine, SamplingParams
from megatron_dgpo.types import Group, Prompt, Sample

Score = Callable[[Sequence[Sample]], None]


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
    on_progress: Callable[[int], object] | None = None,
) -> list[Group]:
    """Generate and score groups for `prompts`, which are the same on every rank of `group`.

    Each rank takes every size-th prompt. Returns all groups in the order of the prompts, on every
    rank. `on_progress` is called with the number of samples that this rank has finished since the
    last call.
    """
    rank, size = group.rank(), group.size()
    mine = engine.generate(prompts[rank::size], params, on_progress=on_progress)
    score([sample for g in mine for sample in g.samples])
    parts = platform.gather_objects(mine, group)
    return [parts[i % size][i // size] for i in range(len(prompts))]
