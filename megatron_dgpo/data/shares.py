"""Who trains which group of a mini-batch: data-parallel replicas with similar numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dgpo.data.packing import _packing

TOLERANCE_INVERSE = 50
"""Replicas that differ by less than a fiftieth of their mean are equal enough: each further swap would send
groups for nothing."""


def balanced_shares(owners: Sequence[int], lengths: Sequence[int], replicas: int) -> list[int]:
    """The replica that trains each group, given the one that has it and its number of tokens.

    Replicas get equal numbers of groups and similar totals, and few groups move: first the surplus of
    those that have more than their share, in order; then, again and again, the pair of groups whose swap
    brings the heaviest and the lightest replica closest.

    Computed in C++ where the extension was built and in Python otherwise, with equal answers.

    Raises ValueError where the groups cannot be shared equally or an owner is no replica.
    """
    if _packing is not None:
        targets: list[int] = _packing.balanced_shares(list(owners), list(lengths), replicas)
        return targets
    return balanced_shares_python(owners, lengths, replicas)


def balanced_shares_python(owners: Sequence[int], lengths: Sequence[int], replicas: int) -> list[int]:
    """The twin of the C++ function: same arguments, same answer, same errors."""
    if replicas < 1 or len(owners) % replicas or len(owners) != len(lengths):
        raise ValueError(
            f"{len(owners)} groups with {len(lengths)} lengths cannot be shared equally by {replicas} "
            "replicas"
        )
    targets = _equal_shares(owners, replicas)
    loads = [sum(x for x, t in zip(lengths, targets, strict=True) if t == r) for r in range(replicas)]
    while True:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[heavy] - loads[light]
        if gap * replicas * TOLERANCE_INVERSE <= sum(lengths):
            return targets
        swap = _best_swap(lengths, targets, heavy, light, gap)
        if swap is None:
            return targets
        i, j = swap
        moved = lengths[i] - lengths[j]  # between 0 and gap, so that the sum of squared loads falls
        loads[heavy] -= moved
        loads[light] += moved
        targets[i], targets[j] = light, heavy


def _equal_shares(owners: Sequence[int], replicas: int) -> list[int]:
    room = [len(owners) // replicas] * replicas
    kept: list[int | None] = []
    for owner in owners:
        if not 0 <= owner < replicas:
            raise ValueError(f"owner {owner} is none of {replicas} replicas")
        kept.append(owner if room[owner] else None)
        room[owner] -= room[owner] > 0
    free = iter([r for r in range(replicas) for _ in range(room[r])])
    return [next(free) if target is None else target for target in kept]


def _best_swap(
    lengths: Sequence[int], targets: Sequence[int], heavy: int, light: int, gap: int
) -> tuple[int, int] | None:
    """A group of the heavy replica and one of the light: the first of the best."""
    swaps = [
        (abs(gap - 2 * (lengths[i] - lengths[j])), i, j)
        for i, at in enumerate(targets)
        if at == heavy
        for j, other in enumerate(targets)
        if other == light
    ]
    left, i, j = min(swaps)
    return (i, j) if left < gap else None
