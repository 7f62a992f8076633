"""The C++ and the Python sharing of groups over replicas agree, answers and errors."""

from __future__ import annotations

import random

import pytest

from megatron_dgpo.data import shares
from megatron_dgpo.data.shares import balanced_shares, balanced_shares_python


def test_the_extension_and_its_twin_agree() -> None:
    assert shares._packing is not None, "the extension is not built"
    g = random.Random(7)
    for _ in range(10_000):
        replicas = g.randint(1, 6)
        count = replicas * g.randint(0, 6)
        owners = [g.randrange(replicas) for _ in range(count)]
        longest = g.choice([1, 3, 50, 4096])
        lengths = [g.randint(0, longest) for _ in range(count)]
        assert balanced_shares(owners, lengths, replicas) == balanced_shares_python(owners, lengths, replicas)


@pytest.mark.parametrize(
    ("owners", "lengths", "replicas"),
    [([0, 1, 0], [1, 1, 1], 2), ([0, 2], [1, 1], 2), ([0, -1], [1, 1], 2), ([0], [1, 2], 1), ([0], [1], 0)],
)
def test_the_extension_refuses_what_its_twin_refuses(
    owners: list[int], lengths: list[int], replicas: int
) -> None:
    with pytest.raises(ValueError) as native:
        balanced_shares(owners, lengths, replicas)
    with pytest.raises(ValueError) as twin:
        balanced_shares_python(owners, lengths, replicas)
    assert str(native.value) == str(twin.value)


def test_without_the_extension_the_twin_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = balanced_shares([0, 0, 1, 1], [90, 60, 10, 20], 2)
    monkeypatch.setattr(shares, "_packing", None)
    assert balanced_shares([0, 0, 1, 1], [90, 60, 10, 20], 2) == wanted
