"""How weights travel to servers, without any server: who shares what, and what becomes of a group."""

from __future__ import annotations

import pytest

from megatron_dgpo.rollout.sglang.transport import handle_owners


@pytest.mark.parametrize(
    ("ranks", "first_gpus", "gpus", "wanted"),
    [
        # One server over the trainer's four GPUs: each rank shares its own bucket with its own GPU.
        ({"a": 4}, {"a": 0}, [0, 1, 2, 3], {("a", r): r for r in range(4)}),
        # Two servers of two; the second one's ranks are on GPUs 2 and 3.
        (
            {"b": 2, "a": 2},
            {"a": 0, "b": 2},
            [0, 1, 2, 3],
            {("a", 0): 0, ("a", 1): 1, ("b", 0): 2, ("b", 1): 3},
        ),
        # A second pipeline stage on GPUs 4 to 7 has nobody on the first four, and takes turns there.
        ({"a": 8}, {"a": 0}, [4, 5, 6, 7], {("a", r): r % 4 for r in range(8)}),
        # Two TP ranks on the second half of four GPUs.
        ({"a": 1, "b": 1}, {"a": 3, "b": 0}, [2, 3], {("a", 0): 1, ("b", 0): 0}),
        # A CPU has no numbers.
        ({"a": 2, "b": 1}, {}, [None, None], {("a", 0): 0, ("a", 1): 1, ("b", 0): 0}),
    ],
)
def test_each_server_rank_has_a_handle_of_its_own_from_its_own_gpu(
    ranks: dict[str, int],
    first_gpus: dict[str, int],
    gpus: list[int | None],
    wanted: dict[tuple[str, int], int],
) -> None:
    assert handle_owners(ranks, first_gpus, gpus) == wanted
