"""Which groups make a step: a verdict on each, the first usable ones over all replicas, mini-batches.

Every decision follows from verdicts and positions over all data-parallel replicas, so that the split
does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch.distributed as dist

from megatron_dgpo import platform
from megatron_dgpo.types import Group

Place = tuple[int, int]
"""(round, position in the draw of that round): the order of a step's groups."""


class Verdict(Enum):
    """What a group is worth to the step it was drawn for."""

    USABLE = "usable"
    ALL_RIGHT = "all right"
    """Every reward that did not fail is the same, and above 0: no advantage, nothing to learn."""
    ALL_WRONG = "all wrong"
    """The same at 0 or below."""
    NO_REWARD = "without a reward"
    UNFINISHED = "not finished"


def verdict(group: Group, *, need_variance: bool) -> Verdict:
    """`need_variance`: a group is of use only where its rewards differ (dynamic sampling; DAPO,
    arXiv 2503.14476, section 3.2). A group that was given up while it was drawn has no samples."""
    if not group.samples:
        return Verdict.UNFINISHED
    if not need_variance:
        return Verdict.USABLE
    # Of a reward with terms, what the answer got: lengths differ in every group.
    rewards = {s.reward_parts.get("correct", s.reward) for s in group.samples if s.reward is not None}
    if not rewards:
        return Verdict.NO_REWARD
    if len(rewards) > 1:
        return Verdict.USABLE
    return Verdict.ALL_RIGHT if (rewards.pop() or 0.0) > 0 else Verdict.ALL_WRONG


@dataclass
class Tally:
    """What the draws of a step gave, over all replicas."""

    rounds: int = 0
    verdicts: Counter[Verdict] = field(default_factory=Counter)

    def metrics(self) -> dict[str, int]:
        return {
            "rollout_rounds": self.rounds,
            "groups_drawn": self.verdicts.total(),
            "groups_all_right": self.verdicts[Verdict.ALL_RIGHT],
            "groups_all_wrong": self.verdicts[Verdict.ALL_WRONG],
            "groups_without_reward": self.verdicts[Verdict.NO_REWARD],
            "groups_unfinished": self.verdicts[Verdict.UNFINISHED],
        }


class Selection:
    """The groups of one step, draw by draw: the first `wanted` usable ones in the order of the prompts.

    The same calls, on every rank of every replica; what a replica's ranks hold is equal.
    """

    def __init__(self, wanted: int, *, need_variance: bool, dp: dist.ProcessGroup) -> None:
        self.tally = Tally()
        self._wanted = wanted
        self._need_variance = need_variance
        self._dp = dp
        self._held: dict[Place, Group] = {}
        self._chosen: list[tuple[Place, int]] = []

    @property
    def missing(self) -> int:
        """Groups that the step still lacks, over all replicas."""
        return self._wanted - len(self._chosen)

    def add(self, groups: Sequence[Group]) -> None:
        """Take this replica's groups of one more draw, of which it has every dp-th from its own number on;
        collective over the replicas."""
        verdicts = [verdict(g, need_variance=self._need_variance) for g in groups]
        by_replica = platform.gather_objects(verdicts, self._dp)
        for position in range(sum(map(len, by_replica))):
            i, owner = divmod(position, len(by_replica))
            found = by_replica[owner][i]
            self.tally.verdicts[found] += 1
            if found is Verdict.USABLE and self.missing:
                place = (self.tally.rounds, position)
                self._chosen.append((place, owner))
                if owner == self._dp.rank():
                    self._held[place] = groups[i]
        self.tally.rounds += 1

    def minibatches(self, size: int) -> list[list[Group]]:
        """This replica's equal share of each mini-batch of `size` groups; collective over the replicas.

        Where a replica has more of a mini-batch than its share, the last of them go to replicas that
        have less; nothing else travels.
        """
        me = self._dp.rank()
        targets = deal([owner for _, owner in self._chosen], size, self._dp.size())
        moved = {p for (p, owner), t in zip(self._chosen, targets, strict=True) if owner != t}
        held = dict(self._held)
        if moved:
            for part in platform.gather_objects({p: g for p, g in held.items() if p in moved}, self._dp):
                held.update(part)
        placed = list(zip([p for p, _ in self._chosen], targets, strict=True))
        starts = range(0, len(placed), size)
        return [[held[p] for p, target in placed[s : s + size] if target == me] for s in starts]


def deal(owners: Sequence[int], size: int, replicas: int) -> list[int]:
    """The replica that trains each group of a step, given the one that has it.

    Each mini-batch of `size` groups is shared out equally. Raises ValueError where that cannot be.
    """
    if size % replicas or len(owners) % size:
        raise ValueError(
            f"{len(owners)} groups, {size} a mini-batch, cannot be shared by {replicas} replicas"
        )
    targets: list[int] = []
    for start in range(0, len(owners), size):
        room = [size // replicas] * replicas
        kept: list[int | None] = []
        for owner in owners[start : start + size]:
            kept.append(owner if room[owner] else None)
            room[owner] -= room[owner] > 0
        free = iter([r for r in range(replicas) for _ in range(room[r])])
        targets += [next(free) if target is None else target for target in kept]
    return targets
