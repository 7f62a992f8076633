"""Times the attention of the torch layer spec on packed sequences against one padded grid of all of them.

    python tools/bench/attention.py [--sequences 32] [--median 300] [--spread 0.9] [--dtype bfloat16]

Both are `PackedSDPA`, forward and backward, on the same sequences of log-normal lengths: as the trainer lays
them out (grids of similar length; on a GPU in half precision torch's kernel for packed sequences), and as one
grid with a row a sequence. They take turns; printed are medians over the rounds, the median ratio with its
quartiles, and how many positions each lays out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_dgpo.mcore.layers import PackedLayout, PackedSDPA
from megatron_dgpo.observe.machine import describe_machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--median", type=int, default=2000 if on_gpu else 300, help="length, in tokens")
    parser.add_argument("--spread", type=float, default=0.9, help="sigma of the log-normal")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/attention.json"))
    return parser.parse_args()


def layouts(lengths: list[int], device: str) -> dict[str, PackedLayout]:
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
    rows_T = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )
    longest = max(lengths)
    one_grid = PackedLayout(
        qkv_format="thd", place_T=rows_T * longest + positions_T, grids=[(len(lengths), longest)]
    )
    return {"as trained": PackedLayout.from_cu_seqlens(ends, positions_T), "one grid": one_grid}


def seconds(attention: PackedSDPA, qkv: list[Tensor], layout: PackedLayout) -> float:
    """Of a forward and a backward pass."""

    def now() -> float:
        if qkv[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    out = attention(*qkv, layout)
    torch.autograd.grad(out, qkv, torch.ones_like(out))
    return now() - start


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(1)
    spread = (args.spread * torch.randn(args.sequences, generator=draw)).exp()
    lengths = (
        (args.median * spread)
        .round()
        .long()
        .clamp(1, round(args.median * math.exp(2.5 * args.spread)))
        .tolist()
    )
    shapes = [(sum(lengths), n, args.head_dim) for n in (args.heads, args.groups, args.groups)]
    dtype = getattr(torch, args.dtype)
    qkv = [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]
    config: Any = SimpleNamespace(context_parallel_size=1)
    attention = PackedSDPA(config)
    made = layouts(lengths, device)
    times: dict[str, list[float]] = {name: [] for name in made}
    for n in range(args.rounds + 1):
        for name in list(made)[:: 1 if n % 2 else -1]:
            spent = seconds(attention, qkv, made[name])
            if n:  # the first warms up
                times[name].append(spent)
    machine, settings = describe_machine(), {k: v for k, v in vars(args).items() if k != "json"}
    print(json.dumps(machine), json.dumps(settings), sep="\n")
    print(f"{sum(lengths)} tokens, longest {max(lengths)}")
    for name, layout in made.items():
        size = f"{layout.places:9d} places, {len(layout.grids)} grids"
        print(f"{name:12s}{statistics.median(times[name]):10.4f} s {size}")
    ratios = [a / b for a, b in zip(times["one grid"], times["as trained"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    ratio = (
        f"one grid takes {statistics.median(ratios):.2f} times as long (quartiles {low:.2f} to {high:.2f})"
    )
    print(ratio)
    lines = [(name, f"{statistics.median(times[name]):.4f} s") for name in made] + [("ratio", ratio)]
    out = {"machine": machine, "settings": settings, "seconds": times, "summary": lines}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
