"""Times full weight syncs into a real SGLang server against bare broadcasts of the same bytes.

    make sglang
    python tools/bench/weight_sync.py [--rounds 10]
    torchrun --standalone --nproc-per-node 2 tools/bench/weight_sync.py --tensor-model-parallel-size 2

A sync is everything that happens between two rollouts, but for the probe: pausing the server, gathering
and renaming the weights, sending them in buckets, loading them, resuming. The bare broadcast sends as
many bytes in as many pieces through the same process group, between the same two processes; they have a
name that SGLang's models pass over, so the server loads nothing. They take turns, and a ratio is between
two of the same round.

Printed: medians over the rounds, GB/s, the sync's rate over the bare one's as the median of the ratios
with the least and the most, and by how much this process's memory grew during the first sync, in buckets
(the largest one, which one large tensor may fill alone).

On CPUs, run it with the memory settings of `examples/quickstart/run.sh`: the trainer then keeps its buffers
from one sync to the next, as the servers do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import write_model

from megatron_dgpo import platform
from megatron_dgpo.config import LaunchConfig, ParallelConfig, SGLangConfig, SyncConfig
from megatron_dgpo.mcore.model import ModelShape, build_model
from megatron_dgpo.observe.machine import describe_machine
from megatron_dgpo.rollout.sglang.engine import SGLangEngine
from megatron_dgpo.rollout.sglang.fleet import Fleet
from megatron_dgpo.rollout.sglang.transport import Broadcast
from megatron_dgpo.types import WeightBucket
from megatron_dgpo.weights.export import stage_buckets

PASSED_OVER = "rotary_emb.inv_freq"
"""A name that SGLang's models do not load."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--layers", type=int, default=24 if on_gpu else 8)
    parser.add_argument("--vocab", type=int, default=151936 if on_gpu else 32768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-bytes", type=int, default=SyncConfig().bucket_bytes)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--python", type=Path, default=Path(".venv-sglang/bin/python"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/weight_sync.json"))
    args = parser.parse_args()
    args.prompt_tokens, args.response_tokens = 16, 112
    return args


def timed(call: Callable[[], object], groups: platform.Groups) -> float:
    dist.barrier(group=groups.world)
    started = time.perf_counter()
    call()
    dist.barrier(group=groups.world)
    return time.perf_counter() - started


def resident_peak(call: Callable[[], object]) -> int:
    """By how many bytes this process grew at most during the call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


class Bare:
    """The same bytes in the same pieces, and nothing else.

    Args:
        pieces: the buckets of a sync, uint8. Real ones: memory that was never written to is one page of
            zeros for the system, which stays in the processor's cache and travels faster than any weights.
    """

    def __init__(self, engine: SGLangEngine, group: Broadcast, pieces: list[torch.Tensor]) -> None:
        self._engine, self._group, self._pieces = engine, group, pieces

    def send(self) -> None:
        url = self._group.servers[0]
        for path in ("/pause_generation", "/begin_weight_update"):
            self._control(url, path)
        for piece in self._pieces:
            payload = dict(
                names=[PASSED_OVER],
                dtypes=["uint8"],
                shapes=[list(piece.shape)],
                group_name=self._group.name,
                flush_cache=False,
            )
            answer = self._engine.client.submit(
                url, "/update_weights_from_distributed", payload, timeout=self._group.timeout_seconds
            )
            dist.broadcast(piece, group=self._group.group, group_src=0)
            answer.result()
        for path in ("/end_weight_update", "/continue_generation"):
            self._control(url, path)

    def _control(self, url: str, path: str) -> None:
        mode: dict[str, Any] = {"mode": "retract"} if path == "/pause_generation" else {}
        self._engine.client.submit(url, path, mode, timeout=60).result()


def measure(args: argparse.Namespace, folder: Path, groups: platform.Groups, parallel: ParallelConfig) -> Any:
    write_model(folder, args)
    shape = ModelShape.from_folder(folder)
    model = build_model(shape, parallel, groups, params_dtype=getattr(torch, args.dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    sglang = SGLangConfig(launch=LaunchConfig(python=args.python, devices=(0,)))
    fleet = Fleet(sglang, groups, model_path=folder, dtype=args.dtype, log_folder=folder / "servers")
    engine = SGLangEngine(
        fleet,
        groups,
        sglang,
        SyncConfig(),
        decode=str,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
    )
    version = iter(range(1_000_000))

    def buckets() -> Iterator[WeightBucket]:
        return stage_buckets(model, groups, bucket_bytes=args.bucket_bytes)

    def sync() -> None:
        engine.update_weights_by_stage(buckets, next(version))

    pieces: list[torch.Tensor] = []

    def kept() -> Iterator[WeightBucket]:
        for bucket in buckets():
            pieces.append(bucket.flat.view(torch.uint8).clone())
            yield bucket

    try:
        grown = resident_peak(sync)  # the server joins the process group, and buffers come into being
        engine.update_weights_by_stage(kept, next(version))
        group = engine.transport
        calls: list[tuple[str, Callable[[], object]]] = [("sync", sync)]
        if isinstance(group, Broadcast):
            calls.append(("bare", Bare(engine, group, pieces).send))
        else:  # a rank that sends nothing
            calls.append(("bare", lambda: None))
        for _, call in calls:
            timed(call, groups)
        rounds = []
        for k in range(args.rounds):
            turns = calls[:: 1 if k % 2 == 0 else -1]
            rounds.append({name: timed(call, groups) for name, call in turns})
    finally:
        engine.close()
    return report(args, rounds, [piece.nbytes for piece in pieces], grown) if groups.rank == 0 else None


def report(args: argparse.Namespace, rounds: list[dict[str, float]], sizes: list[int], grown: int) -> Any:
    size = sum(sizes)
    ratios = sorted(r["bare"] / r["sync"] for r in rounds)
    seconds = {name: statistics.median(r[name] for r in rounds) for name in ("bare", "sync")}
    return {
        "bytes": size,
        "seconds": seconds,
        "gb_per_second": {name: size / value / 1e9 for name, value in seconds.items()},
        "sync_rate_over_bare": {
            "median": statistics.median(ratios),
            "least": ratios[0],
            "most": ratios[-1],
        },
        "memory_growth_bytes": grown,
        "largest_bucket_bytes": max(sizes),
        "memory_growth_in_largest_buckets": grown / max(sizes),
        "settings": {k: str(v) for k, v in vars(args).items()},
        "machine": describe_machine(),
        "rounds": rounds,
        "summary": [
            (
                f"sync of {size / 1e9:.2f} GB",
                f"{seconds['sync']:.3f} s, {statistics.median(ratios):.2f} of a bare broadcast's rate, "
                f"{grown / max(sizes):.2f} buckets of memory",
            )
        ],
    }


def main() -> None:
    args = parse_arguments()
    parallel = ParallelConfig(tensor_model_parallel_size=args.tensor_model_parallel_size)
    with tempfile.TemporaryDirectory() as name, platform.distributed(parallel, seed=1) as groups:
        folder = platform.gather_objects(Path(name), groups.world)[0]
        result = measure(args, folder, groups, parallel)
        if groups.rank == 0:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1))
            print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
            print(f"everything is in {args.json}")


if __name__ == "__main__":
    main()
