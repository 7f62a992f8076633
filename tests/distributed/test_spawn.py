from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks


def _sum(rank, world_size, offset):
    x = torch.tensor(float(rank + offset))
    dist.all_reduce(x)
    return rank, float(x)


def _second_rank_fails(rank, world_size):
    if rank == 1:
        raise KeyError("first to fail")
    dist.barrier()


def test_results_come_back_in_rank_order():
    assert run_ranks(_sum, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_the_first_exception_is_raised_and_nothing_hangs():
    with pytest.raises(KeyError, match="first to fail"):
        run_ranks(_second_rank_fails, 2)
    assert not multiprocessing.active_children()


def _sleep(rank, world_size):
    time.sleep(300)


def test_timeout():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(_sleep, 2, timeout=1.0)
    assert not multiprocessing.active_children()
