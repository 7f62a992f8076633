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
from megatron_dgpo.data.shares import balanced_shares
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
        self._chosen: list[tuple[Place, int, int]] = []  # with the replica that has it, and its tokens

    @property
    def missing(self) -> int:
        """Groups that the step still lacks, over all replicas."""
        return self._wanted - len(self._chosen)

    def add(self, groups: Sequence[Group]) -> None:
        """Take this replica's groups of one more draw, of which it has every dp-th from its own number on;
        collective over the replicas."""
        mine = [(verdict(g, need_variance=self._need_variance), _num_tokens(g)) for g in groups]
        by_replica = platform.gather_objects(mine, self._dp)
        for position in range(sum(map(len, by_replica))):
            i, owner = divmod(position, len(by_replica))
            found, tokens = by_replica[owner][i]
            self.tally.verdicts[found] += 1
            if found is Verdict.USABLE and self.missing:
                place = (self.tally.rounds, position)
                self._chosen.append((place, owner, tokens))
                if owner == self._dp.rank():
                    self._held[place] = groups[i]
        self.tally.rounds += 1

    def minibatches(self, size: int) -> list[list[Group]]:
        """This replica's share of each mini-batch of `size` groups: as many groups and about as many tokens
        as the others have; collective over the replicas. Only what changes its replica travels."""
        me = self._dp.rank()
        owners, tokens = [c[1] for c in self._chosen], [c[2] for c in self._chosen]
        targets = deal(owners, tokens, size, self._dp.size())
        moved = {p for (p, owner, _), t in zip(self._chosen, targets, strict=True) if owner != t}
        held = dict(self._held)
        if moved:
            for part in platform.gather_objects({p: g for p, g in held.items() if p in moved}, self._dp):
                held.update(part)
        placed = list(zip([c[0] for c in self._chosen], targets, strict=True))
        starts = range(0, len(placed), size)
        return [[held[p] for p, target in placed[s : s + size] if target == me] for s in starts]


def deal(owners: Sequence[int], tokens: Sequence[int], size: int, replicas: int) -> list[int]:
    """The replica that trains each group of a step, given the one that has it.

    Each mini-batch of `size` groups is shared out by itself (`balanced_shares`). Raises ValueError where
    replicas cannot have equal numbers.
    """
    if size % replicas or len(owners) % size:
        raise ValueError(
            f"{len(owners)} groups, {size} a mini-batch, cannot be shared by {replicas} replicas"
        )
    parts = [slice(start, start + size) for start in range(0, len(owners), size)]
    return [t for part in parts for t in balanced_shares(owners[part], tokens[part], replicas)]


def _num_tokens(group: Group) -> int:
    """That the trainer computes: prompt and response of every sample."""
    return sum(len(s.prompt.token_ids) + len(s.token_ids) for s in group.samples)
