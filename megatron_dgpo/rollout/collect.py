"""Prompts split over ranks, responses scored where they were generated, groups put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.rollout.ahead import Ahead
from megatron_dgpo.rollout.engine import Engine, SamplingParams
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.types import Group, Prompt, Sample

Score = Callable[[Sequence[Sample]], None]


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
    on_progress: Callable[[int], object] | None = None,
) -> list[Group]:
    """Generate and score groups for `prompts`, which are the same on every rank of `group`.

    Each rank takes its `rank_share`. Returns all groups in the order of the prompts, on every
    rank. `on_progress` is called with the number of samples that this rank has finished since the
    last call. A `race` scores groups as they come and may stop the engine; the groups that were not
    complete by then have no samples.
    """
    size, share = group.size(), rank_share(prompts, group)
    if race is None:
        drawn = engine.generate(share, params, on_progress=on_progress)
    else:
        drawn = engine.generate(
            share,
            params,
            on_progress=on_progress,
            on_group=race.on_group,
            should_stop=race.should_stop,
        )
    mine = [Group(p, []) if g is None else g for p, g in zip(share, drawn, strict=True)]
    if race is None:
        score([sample for g in mine for sample in g.samples])
    else:
        race.finish(mine)
    parts = platform.gather_objects(mine, group)
    return [parts[i % size][i // size] for i in range(len(prompts))]
