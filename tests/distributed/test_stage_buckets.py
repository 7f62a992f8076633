"""The buckets that pipeline stages send to servers: every tensor once, bit for bit, in bounded pieces."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from tiny import config, hf_tensors, split, write_model

SPLITS = [{"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2}, {"tp": 4}, {}, {"tp": 2, "pp": 2, "everywhere": True}]
LIMIT = 19_000
"""Bytes of a bucket; the largest parameter, Qwen3's queries, keys and values, takes 18,432."""


def buckets_at(rank, world, folder, splits):
    """On rank 0, for each split: the tensors that came out, and the sizes of the buckets in bytes."""
    from megatron_dgpo import platform
    from megatron_dgpo.run import build_policy
    from megatron_dgpo.weights.export import stage_buckets

    out = []
    for sizes in splits:
        every_rank = sizes.pop("everywhere", False)
        c = config(folder, **sizes)
        with split(c) as groups:
            policy = build_policy(c, groups, total_updates=1, keep_reference=False)
            found, taken = {}, []
            in_flight = []
            stream = stage_buckets(policy.model, groups, bucket_bytes=LIMIT, everywhere=every_rank)
            for bucket in stream:
                assert every_rank or groups.tp.rank() == 0
                shapes = [torch.Size(s) for s in bucket.shapes]
                parts = bucket.flat.clone().split([s.numel() for s in shapes])
                found |= {n: p.view(s) for n, p, s in zip(bucket.names, parts, shapes, strict=True)}
                taken.append(bucket.flat.numel() * bucket.flat.element_size())
                bucket.in_use = partial(in_flight.append, len(taken))
            # Nothing is written again before the one who sends it has said that it may be.
            assert sorted(in_flight) == list(range(1, len(taken) + 1))
            everywhere = platform.gather_objects((found, taken), groups.world)
            if rank == 0:
                out.append([part for part in everywhere if part[0]])
    return out


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)])
def test_stages_send_every_tensor_once(family: str, tied: bool, tmp_path: Path) -> None:
    kv = {"num_key_value_heads": 4}  # so that four ranks have one each
    folder = write_model(tmp_path, family=family, tied=tied, **kv)
    want = hf_tensors(folder)
    results = run_ranks(buckets_at, 4, folder, SPLITS)[0]
    for sizes, parts in zip(SPLITS, results, strict=True):
        stages, replicas = sizes.get("pp", 1), 4 // (sizes.get("pp", 1) * sizes.get("tp", 1))
        if sizes.get("everywhere"):
            replicas = sizes["tp"]  # as if each TP rank were one
        assert len(parts) == stages * replicas
        names = [name for found, _ in parts for name in found]
        assert sorted(names) == sorted(list(want) * replicas), sizes
        for found, taken in parts:
            assert all(torch.equal(t, want[n]) for n, t in found.items()), sizes
            assert len(taken) > 2 and max(taken) <= LIMIT
