"""What the ranks of the sync tests do; in a module of its own, which the ranks import."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from patience import patience, until
from tiny import config, split
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.config import LaunchConfig, SGLangConfig, SyncConfig
from megatron_dgpo.learner import score_sequences
from megatron_dgpo.mcore.model import ModelShape
from megatron_dgpo.rollout.collect import collect
from megatron_dgpo.rollout.engine import EnginesLost, SamplingParams
from megatron_dgpo.rollout.race import Race
from megatron_dgpo.rollout.sglang.client import SGLangClient
from megatron_dgpo.rollout.sglang.engine import SGLangEngine, WeightUpdateFailed
from megatron_dgpo.rollout.sglang.fleet import Fleet, FleetLost
from megatron_dgpo.rollout.sglang.servers import ServerFailed, ServerProcess, check_server
from megatron_dgpo.rollout.sglang.transport import Broadcast, SharedMemory
from megatron_dgpo.run import build_policy
from megatron_dgpo.types import Prompt
from megatron_dgpo.weights import convert
from megatron_dgpo.weights.export import stage_buckets
from megatron_dgpo.weights.sync import SyncMismatch, WeightSync, probe_ids

SMALL = 6_000
"""Bytes of a bucket: every tiny model takes many."""


class Trainer:
    """A policy at some split, an engine, and the sync between them."""

    def __init__(
        self,
        folder: Path,
        groups: platform.Groups,
        c: Any,
        sglang: SGLangConfig,
        sync: SyncConfig,
    ) -> None:
        self.folder, self.groups = folder, groups
        self.policy = build_policy(c, groups, total_updates=1, keep_reference=False)
        self.shape = ModelShape.from_folder(folder)
        self.fleet = Fleet(sglang, groups, model_path=folder, dtype="float32", log_folder=folder / "servers")
        self.engine = SGLangEngine(
            self.fleet,
            groups,
            sglang,
            sync,
            decode=lambda ids: " ".join(map(str, ids)),
            vocab_size=self.shape.vocab_size,
            max_positions=self.shape.max_positions,
        )
        self.score = partial(score_sequences, self.policy, max_tokens=256)
        self.sync = WeightSync(self.policy.model, groups, self.engine, sync, self.score)

    def change_weights(self, seed: int) -> None:
        """Random weights, the same at any split: see `tensors`."""
        found = tensors(self.folder, seed)
        convert.load_hf(self.policy.model, self.groups, list(found), found.__getitem__)


def tensors(folder: Path, seed: int) -> dict[str, Tensor]:
    """The folder's tensors, moved by noise that follows from seed and name."""
    names, read = convert.folder_source(folder)
    out = {}
    for name in names:
        g = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        tensor = read(name)
        out[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=g)
    return out


def reference_log_probs(folder: Path, weights: dict[str, Tensor], ids: Sequence[Sequence[int]]) -> Tensor:
    """transformers' log-probs of the same ids with these weights, (sequences, T - 1)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # A tied head follows the embedding.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)


def syncs_at_splits(
    rank: int, world: int, cases: Sequence[tuple[Path, tuple[str, ...]]], splits: Sequence[dict[str, Any]]
) -> list[list[tuple[int, float, float]]]:
    """For each folder and its servers, on rank 0: (syncs, engine against transformers, engine against
    trainer), the largest differences over the probe's tokens after 0 syncs, one at each split, and five at
    the first."""
    return [_syncs(folder, urls, splits) for folder, urls in cases]


def _syncs(
    folder: Path, urls: tuple[str, ...], splits: Sequence[dict[str, Any]]
) -> list[tuple[int, float, float]]:
    out = []
    version = 0
    for sizes in splits:
        c = config(folder, **sizes)
        with split(c) as groups:
            trainer = Trainer(folder, groups, c, SGLangConfig(urls=urls), SyncConfig(bucket_bytes=SMALL))
            ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)
            if version == 0:  # what the servers loaded themselves, and the trainer too
                out.append((0, *_differences(trainer, ids, dict(_plain(folder)))))
            for count in range(1, 6 if sizes == splits[0] else 2):
                version += 1
                trainer.change_weights(version)
                trainer.sync.push(version)
                if count in (1, 5):
                    out.append((count, *_differences(trainer, ids, tensors(folder, version))))
            trainer.engine.close()
    return out


def colocated(
    rank: int, world: int, folder: Path, url: str, splits: Sequence[dict[str, Any]]
) -> list[tuple[float, float]]:
    """`_differences` after each of two syncs through shared memory at each split; between the two the
    server rests and the weights change."""
    out = []
    for number, sizes in enumerate(splits):
        c = config(folder, **sizes)
        with split(c) as groups:
            sglang = SGLangConfig(urls=(url,), colocate=True)
            trainer = Trainer(folder, groups, c, sglang, SyncConfig(bucket_bytes=SMALL))
            ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)
            for version in (1, 2):
                seed = 100 + 10 * number + version
                trainer.change_weights(seed)
                trainer.sync.push(version)
                out.append(_differences(trainer, ids, tensors(folder, seed)))
                if version == 1:
                    trainer.engine.rest()
            assert isinstance(trainer.engine.transport, SharedMemory)
            trainer.engine.close()
    return out


def _plain(folder: Path) -> Iterator[tuple[str, Tensor]]:
    names, read = convert.folder_source(folder)
    for name in names:
        yield name, read(name)


def _differences(trainer: Trainer, ids: list[list[int]], weights: dict[str, Tensor]) -> tuple[float, float]:
    ours = torch.tensor(trainer.score(ids))
    if trainer.groups.rank != 0:
        return 0.0, 0.0
    reference = reference_log_probs(trainer.folder, weights, ids)
    theirs = [torch.tensor(scores) for scores in trainer.engine.probe(ids).values()]
    assert len(theirs) == len(trainer.fleet.ranks)
    return (
        max(float((t - reference).abs().max()) for t in theirs),
        max(float((t - ours).abs().max()) for t in theirs),
    )


def more_than(seconds: float, least: float) -> int:
    """A time-out that a test waits for, and that does not end what took so many seconds before."""
    return math.ceil(max(least, 8 * seconds))


def process_at(url: str) -> int:
    """The main process of the server that listens at a URL."""
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        try:
            if any(c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections("tcp")):
                return process.pid
        except psutil.Error:
            continue
    raise AssertionError(f"nobody listens at {url}")


def kill(url: str) -> None:
    """End a server and all its processes, as the kernel does when memory is short."""
    os.killpg(os.getpgid(process_at(url)), signal.SIGKILL)


def interrupted(stream: Iterator[Any], at: int, action: Callable[[], object] | None) -> Iterator[Any]:
    """The stream; the action, if any, happens before item `at`."""
    for k, item in enumerate(stream):
        if k == at and action is not None:
            action()
        yield item


# --- faults: each on one rank -------------------------------------------------------------------------


def refused(rank: int, world: int, folder: Path, url: str) -> str:
    """The error of a sync to a server of another model, or of the same with another config."""
    c = config(folder)
    with split(c) as groups:
        trainer = Trainer(folder, groups, c, SGLangConfig(urls=(url,)), SyncConfig(bucket_bytes=SMALL))
        try:
            trainer.sync.push(1)
        except (WeightUpdateFailed, SyncMismatch) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            trainer.engine.close()
    return "no error"


def managed_server_killed_twice(rank: int, world: int, folder: Path, python: Path) -> dict[str, Any]:
    """A managed server is killed while it draws, and its successor in the middle of a sync."""
    c = config(folder)
    launch = LaunchConfig(python=python, startup_timeout_seconds=patience(), args={"max_running_requests": 2})
    sync = SyncConfig(bucket_bytes=SMALL, timeout_seconds=patience())
    seen: dict[str, Any] = {}
    with split(c) as groups:
        trainer = Trainer(folder, groups, c, SGLangConfig(launch=launch), sync)
        try:
            trainer.sync.push(3)
            done: list[int] = []

            def on_progress(count: int) -> None:
                done.append(count)
                if sum(done) == 4:
                    threading.Thread(target=kill, args=(next(iter(trainer.fleet.ranks)),)).start()

            prompts = [Prompt(f"p{i}", (1, 2, 3, i + 1), "", "") for i in range(16)]
            params = SamplingParams(max_new_tokens=40, n=2)
            scored: list[int] = []
            race = Race(
                dist.HashStore(),
                "race",
                wanted=10**6,
                score=lambda samples: scored.extend(map(id, samples)),
                counts=lambda group: True,
            )
            groups_ = collect(
                trainer.engine,
                lambda samples: None,
                prompts,
                params,
                groups.replica,
                race=race,
                recover=trainer.sync.recover,
                on_progress=on_progress,
            )
            seen["scored once"] = sorted(scored) == sorted(id(s) for g in groups_ for s in g.samples)
            seen["prompts"] = [g.prompt.id for g in groups_]
            seen["samples"] = [len(g.samples) for g in groups_]
            seen["versions"] = {
                span.version for g in groups_ for s in g.samples for span in s.weight_versions
            }
            trainer.change_weights(9)
            url = next(iter(trainer.fleet.ranks))
            first_try = iter([True])

            def buckets() -> Iterator[Any]:
                stream = stage_buckets(trainer.policy.model, groups, bucket_bytes=SMALL)
                return interrupted(stream, 2, (lambda: kill(url)) if next(first_try, False) else None)

            trainer.engine.update_weights_by_stage(buckets, 4)
            ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)
            seen["difference"] = _differences(trainer, ids, tensors(folder, 9))
            seen["restarts"] = len({url, *trainer.fleet.ranks})
        finally:
            trainer.engine.close()
    return seen


def given_servers_that_die(rank: int, world: int, folder: Path, urls: tuple[str, ...]) -> dict[str, Any]:
    """Of two servers one stops answering in the middle of a sync, and answers again later; then both are
    killed."""
    c = config(folder)
    seen: dict[str, Any] = {}
    with split(c) as groups:
        sync = SyncConfig(bucket_bytes=SMALL, timeout_seconds=patience())
        trainer = Trainer(folder, groups, c, SGLangConfig(urls=urls), sync)
        started = time.monotonic()
        trainer.sync.push(1)
        limit = more_than(time.monotonic() - started, 8)
        trainer.change_weights(5)
        pid = process_at(urls[0])
        stopped = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]

        def stop() -> None:
            for each in stopped:
                os.kill(each, signal.SIGSTOP)

        first_try = iter([True])

        def buckets() -> Iterator[Any]:
            stream = stage_buckets(trainer.policy.model, groups, bucket_bytes=SMALL)
            return interrupted(stream, 2, stop if next(first_try, False) else None)

        assert trainer.engine.transport is not None
        trainer.engine.transport.timeout_seconds = trainer.engine._timeout = limit  # type: ignore[attr-defined]
        started = time.monotonic()
        trainer.engine.update_weights_by_stage(buckets, 2)
        seen["seconds"] = time.monotonic() - started
        ids = probe_ids(trainer.shape.vocab_size, trainer.shape.max_positions)
        seen["left"] = list(trainer.fleet.ranks)
        seen["difference"] = _differences(trainer, ids, tensors(folder, 5))
        for each in stopped:
            os.kill(each, signal.SIGCONT)
        # Whatever it still does of the sync that it missed, it has done when it says what it serves.
        until(lambda: _serves(urls[0], folder), "a server that goes on")
        trainer.engine._timeout = patience()
        trainer.change_weights(6)
        trainer.sync.push(3)
        seen["back"] = sorted(trainer.engine.client.live)
        seen["difference"] += _differences(trainer, ids, tensors(folder, 6))
        kill(urls[0])
        kill(urls[1])
        for name, call in (
            ("generate", lambda: trainer.engine.generate([Prompt("p", (1,), "", "")], SamplingParams(8))),
            ("push", lambda: trainer.sync.push(4)),
        ):
            try:
                call()
            except (EnginesLost, FleetLost) as error:
                seen[name] = f"{type(error).__name__}: {error}"
        trainer.engine.close()
    return seen


def _serves(url: str, folder: Path) -> bool:
    try:
        return bool(check_server(url, folder, timeout=5.0))
    except ServerFailed:
        return False


def waits_in_a_broadcast(folder: Path, python: Path, note: Path) -> None:
    """Start a server, let it wait for a broadcast that never comes, and say so."""
    launch = LaunchConfig(python=python, startup_timeout_seconds=patience())
    server = ServerProcess(folder, launch, number=0, dtype="float32", log_file=folder / "waits.log")
    server.wait_ready(patience())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    client = SGLangClient(
        [server.url],
        max_concurrency=1,
        request_timeout=patience(),
        retries=0,
        decode=str,
        vocab_size=8,
        max_positions=8,
    )
    group = Broadcast(
        client,
        {server.url: 1},
        name="never",
        address="127.0.0.1",
        device=torch.device("cpu"),
        timeout_seconds=patience(),
    )
    client.submit(server.url, "/begin_weight_update", {"selector": "all"}, timeout=patience()).result()
    payload = dict(
        names=["model.norm.weight"],
        dtypes=["float32"],
        shapes=[[32]],
        group_name="never",
        load_format="flattened_bucket",
    )
    group.post("/update_weights_from_distributed", {server.url: payload})
    time.sleep(1.0)
    note.write_text(str(server.pid))
    time.sleep(300)


if __name__ == "__main__":
    waits_in_a_broadcast(*map(Path, sys.argv[1:]))
