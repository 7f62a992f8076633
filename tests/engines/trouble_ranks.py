"""What the ranks of test_sglang_trouble.py do; in a module of its own, which the ranks import."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in
from patience import patience
from stand_in import Answer
from sync_ranks import SMALL, Trainer, _differences, interrupted, kill, more_than, process_at, tensors
from tiny import config, split

from megatron_dgpo.config import LaunchConfig, SGLangConfig, SyncConfig
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.rollout.sglang import transport
from megatron_dgpo.rollout.sglang.engine import WeightUpdateFailed
from megatron_dgpo.types import Prompt
from megatron_dgpo.weights.export import stage_buckets
from megatron_dgpo.weights.sync import probe_ids

JOIN = "/init_weights_update_group"
UPDATE = "/update_weights_from_distributed"


def pushed(
    folder: Path, groups: Any, c: Any, urls: tuple[str, ...], seed: int, timeout: int | None = None
) -> dict[str, Any]:
    """What a sync of new weights to these servers ends with."""
    sync = SyncConfig(bucket_bytes=SMALL, timeout_seconds=timeout or patience())
    trainer = Trainer(folder, groups, c, SGLangConfig(urls=urls), sync)
    seen: dict[str, Any] = {"error": ""}
    started = time.monotonic()
    try:
        trainer.change_weights(seed)
        trainer.sync.push(seed)
        ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)
        seen["difference"] = max(_differences(trainer, ids, tensors(folder, seed)))
    except WeightUpdateFailed as error:
        seen["error"] = str(error)
    finally:
        seen |= {"seconds": time.monotonic() - started, "left": list(trainer.fleet.ranks)}
        seen["dead"] = trainer.engine.client.dead
        started = time.monotonic()
        trainer.engine.close()
        seen["closing"] = time.monotonic() - started
    return seen


def beside_one_that_does_not_join(rank: int, world: int, folder: Path, url: str) -> dict[str, Any]:
    """Syncs to a real server and one that refuses to join the group, or never answers; after the first of
    these, one to the real server alone."""
    c = config(folder)
    seen: dict[str, Any] = {"url": url}
    with split(c) as groups:
        with stand_in.stand_in(url, stand_in.dummy({JOIN: 400})) as (other, _):
            seen["refuses"] = pushed(folder, groups, c, (url, other), 20) | {"other": other}
        seen["alone"] = pushed(folder, groups, c, (url,), 21)
        with stand_in.stand_in(url, stand_in.dummy({JOIN: 0})) as (other, _):
            transport._GRACE_SECONDS = 4.0  # which passes where one hangs
            timeout = more_than(seen["alone"]["seconds"], 5)
            seen["hangs"] = pushed(folder, groups, c, (url, other), 20, timeout) | {"other": other}
    return seen


def other_servers(rank: int, world: int, folder: Path, url: str) -> dict[str, Any]:
    """A sync to each kind of server, and one to the real server behind it after all."""
    kinds: dict[str, Answer] = {
        "without sessions": stand_in.without_sessions,
        "500 at begin": stand_in.failing({"/begin_weight_update": 500}),
        "500 at update": stand_in.failing({UPDATE: 500}),
    }
    c = config(folder)
    seen: dict[str, Any] = {}
    with split(c) as groups:
        for name, answer in kinds.items():
            with stand_in.stand_in(url, answer) as (front, calls):
                seen[name] = pushed(folder, groups, c, (front,), 30)
                seen[name] |= {"url": front, "calls": list(calls)}
            seen[f"after {name}"] = pushed(folder, groups, c, (url,), 31)
    return seen


def managed_servers_killed_at_each_stage(rank: int, world: int, folder: Path, python: Path) -> dict[str, Any]:
    """Two managed servers; the first is killed while stage 0 sends, the second while stage 1 does, and in
    the end the first again, while nothing happens."""
    c = config(folder, tp=2, pp=2)
    launch = LaunchConfig(python=python, startup_timeout_seconds=patience(), count=2)
    sync = SyncConfig(bucket_bytes=SMALL, timeout_seconds=patience())
    seen: dict[str, Any] = {"differences": [], "pids": [], "probed": []}
    with split(c) as groups:
        trainer = Trainer(folder, groups, c, SGLangConfig(launch=launch, retries=0), sync)
        ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)

        def push(version: int, stage: int | None) -> None:
            victim = list(trainer.fleet.ranks)[stage or 0]
            first_try = iter([stage == groups.pp.rank() and groups.tp.rank() == 0])

            def buckets() -> Iterator[Any]:
                stream = stage_buckets(trainer.policy.model, groups, bucket_bytes=SMALL)
                return interrupted(stream, 2, (lambda: kill(victim)) if next(first_try, False) else None)

            trainer.change_weights(40 + version)
            replaced = trainer.engine.update_weights_by_stage(buckets, version)
            assert replaced == (stage is not None)
            seen["differences"].append(_differences(trainer, ids, tensors(folder, 40 + version)))
            if rank == 0:
                seen["pids"].append([process_at(url) for url in trainer.fleet.ranks])

        try:
            push(1, None)
            # A dead server's successor comes last.
            push(2, 0)
            push(3, 1)
            prompts = [Prompt(f"p{rank}.{i}", (1, 2, i + 1), "", "") for i in range(8)]
            for n in (0, 1):
                groups_ = trainer.engine.generate(prompts, SamplingParams(max_new_tokens=8, n=2))
                seen[f"versions {n}"] = {
                    v.version for g in groups_ if g for s in g.samples for v in s.weight_versions
                }
                seen[f"complete {n}"] = [len(g.samples) for g in groups_ if g] == [2] * 8
                if n == 0 and rank == 0:
                    kill(next(iter(trainer.fleet.ranks)))
        finally:
            trainer.engine.close()
    return seen


def to_one_server(rank: int, world: int, folder: Path, url: str) -> dict[str, Any]:
    """A sync, and how far its log-probs are off."""
    return to_servers(rank, world, folder, (url,))


def to_servers(rank: int, world: int, folder: Path, urls: tuple[str, ...], **sizes: int) -> dict[str, Any]:
    """A sync from a trainer of this split, and how far the servers' log-probs are off."""
    c = config(folder, **sizes)  # type: ignore[arg-type]
    with split(c) as groups:
        return pushed(folder, groups, c, urls, 50)


def from_stages(rank: int, world: int, folder: Path, urls: tuple[str, ...]) -> list[dict[str, Any]]:
    """From two stages by broadcast, and from two TP ranks through shared memory, each for the servers' ranks
    that are its own."""
    by_broadcast = to_servers(rank, world, folder, urls, pp=2)
    c = config(folder, tp=2)
    with split(c) as groups:
        trainer = Trainer(
            folder, groups, c, SGLangConfig(urls=urls, colocate=True), SyncConfig(bucket_bytes=SMALL)
        )
        trainer.change_weights(51)
        trainer.sync.push(51)
        shared: dict[str, Any] = {"left": list(trainer.fleet.ranks), "mine": trainer.engine.transport._mine}  # type: ignore[union-attr]
        ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)
        shared["difference"] = max(_differences(trainer, ids, tensors(folder, 51)))
        trainer.engine.close()
    return [by_broadcast, shared]
